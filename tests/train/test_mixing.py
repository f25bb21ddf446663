"""Mixup and CutMix: what a pair becomes, and that nothing else decides it."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from xclip_fast.train import Mixing, mix

SEEDS = [(1, 0, place) for place in range(64)]


def clips(count: int, size: int = 20) -> Tensor:
    return torch.randint(256, (count, 3, size, size, 3), dtype=torch.uint8)


def test_mixup_is_one_share_for_a_pair() -> None:
    videos, targets = clips(6), torch.eye(6)
    mixed, found = mix(videos, targets, Mixing(cutmix=0), SEEDS[:6])
    shares = set()
    for first in (0, 2, 4):
        share = found[first, first].double()
        shares.add(share.item())
        for place, other in ((first, first + 1), (first + 1, first)):
            exact = share * videos[place].double() + (1 - share) * videos[other].double()
            assert (mixed[place].double() - exact).abs().max() <= 0.5 + 1e-3
            torch.testing.assert_close(found[place, place].double(), share)
            torch.testing.assert_close(found[place, other].double(), 1 - share)
    assert len(shares) == 3
    torch.testing.assert_close(found.sum(dim=1), torch.ones(6))


def test_cutmix_swaps_one_box_in_all_frames_and_its_area_is_the_share() -> None:
    videos, targets = clips(40), torch.eye(40)
    mixed, found = mix(videos, targets, Mixing(mixup=0), SEEDS[:40])
    sizes = set()
    for first in range(0, 40, 2):
        # random bytes of two clips are equal by chance in a few places alone: a pixel of all frames and channels never
        from_other = (mixed[first] == videos[first + 1]).all(dim=-1).all(dim=0)
        rows, columns = from_other.any(dim=1).nonzero(), from_other.any(dim=0).nonzero()
        if from_other.any():
            box = from_other[rows.min() : rows.max() + 1, columns.min() : columns.max() + 1]
            assert box.all()
        assert torch.equal(mixed[first][:, ~from_other], videos[first][:, ~from_other])
        assert torch.equal(mixed[first + 1][:, from_other], videos[first][:, from_other])
        assert torch.equal(mixed[first + 1][:, ~from_other], videos[first + 1][:, ~from_other])
        area = from_other.float().mean().item()
        sizes.add(area)
        assert found[first, first + 1].item() == pytest.approx(area, abs=1e-6)
        assert found[first + 1, first].item() == pytest.approx(area, abs=1e-6)
    assert len(sizes) > 10


def test_both_kinds_come_as_often_as_the_switch_says() -> None:
    black, white = torch.zeros(1, 1, 8, 8, 3, dtype=torch.uint8), torch.full((1, 1, 8, 8, 3), 200, dtype=torch.uint8)
    greys = 0
    for place in range(400):
        mixed, _ = mix(torch.cat([black, white]), torch.eye(2), Mixing(switch=0.25), [(0, 0, place), (0, 0, place + 1)])
        greys += bool(((mixed > 0) & (mixed < 200)).any())
    # 300 expected, some of them too close to black and white to tell; four standard deviations are 35
    assert 250 < greys < 335


def test_a_last_video_without_neighbour_and_none_at_all_stay() -> None:
    videos = clips(3)
    mixed, targets = mix(videos, torch.eye(3), Mixing(), SEEDS[:3])
    assert torch.equal(mixed[2], videos[2])
    assert targets[2].tolist() == [0, 0, 1]
    mixed, targets = mix(videos[:0], torch.eye(3)[:0], Mixing(), [])
    assert mixed.shape == (0, 3, 20, 20, 3)
    mixed, targets = mix(videos, torch.eye(3), Mixing(mixup=0, cutmix=0), SEEDS[:3])
    assert torch.equal(mixed, videos)
    assert torch.equal(targets, torch.eye(3))


def test_a_pair_is_mixed_alike_in_any_batch_and_inputs_stay() -> None:
    videos = clips(8)
    before = videos.clone()
    whole, targets = mix(videos, torch.eye(8), Mixing(), SEEDS[:8])
    part, some = mix(videos[4:6], torch.eye(8)[4:6], Mixing(), SEEDS[4:6])
    assert torch.equal(whole[4:6], part)
    assert torch.equal(targets[4:6], some)
    assert torch.equal(videos, before)
    # the global random state has no say
    np.random.seed(5)
    torch.manual_seed(5)
    assert torch.equal(mix(videos, torch.eye(8), Mixing(), SEEDS[:8])[0], whole)
