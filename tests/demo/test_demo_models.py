"""The demo's models: what each can and can't see, and that the shipped weights see it."""

from __future__ import annotations

from math import sqrt

import numpy as np
import pytest
import torch
from torch import Tensor

from xclip_fast.demo.clips import CLASSES, FRAMES, HELD_OUT, SAMPLED, make_clip
from xclip_fast.demo.models import CONFIG, MODELS, FrameAverage, build_model, load_trained, weights_path
from xclip_fast.demo.scores import score
from xclip_fast.reference import XCLIP
from xclip_fast.text import get_tokenizer
from xclip_fast.video.sampling import uniform_indices

OTHER_ORDER = [3, 1, 0, 7, 5, 2, 6, 4]


@pytest.fixture(scope="module")
def held_out() -> tuple[Tensor, Tensor]:
    """Clips that no training or choice of recipe has seen, each with another seed: no two are reversals."""
    frames = uniform_indices(FRAMES, SAMPLED)
    labels = np.arange(len(CLASSES)).repeat(24)
    clips = [make_clip(label, 1000 + seed, HELD_OUT, frames) for seed, label in enumerate(labels.tolist())]
    return torch.from_numpy(np.stack(clips)), torch.from_numpy(labels)


@pytest.fixture
def videos() -> Tensor:
    return torch.from_numpy(
        np.stack([make_clip(label, 7, frames=uniform_indices(FRAMES, SAMPLED)) for label in (0, 6)])
    )


@torch.inference_mode()
def logits(model: XCLIP, videos: Tensor) -> Tensor:
    return model(videos, get_tokenizer(model.config)(CLASSES))


@torch.inference_mode()
def test_averaging_cannot_see_order(videos: Tensor) -> None:
    model = load_trained("average").double()
    torch.testing.assert_close(logits(model, videos[:, OTHER_ORDER]), logits(model, videos), rtol=0, atol=1e-9)


@torch.inference_mode()
def test_messages_alone_cannot_see_order(videos: Tensor) -> None:
    model = load_trained("xclip").double()
    assert (logits(model, videos[:, OTHER_ORDER]) - logits(model, videos)).abs().max() > 0.1
    model.mit = FrameAverage()
    torch.testing.assert_close(logits(model, videos[:, OTHER_ORDER]), logits(model, videos), rtol=0, atol=1e-9)


@pytest.mark.parametrize(("name", "sees"), [("xclip", True), ("no_cfa", False), ("average", False)])
@torch.inference_mode()
def test_only_messages_carry_other_frames(name: str, sees: bool, videos: Tensor) -> None:
    model = build_model(name, seed=0)
    changed = videos.clone()
    changed[:, -1] = 0
    features, patches = model.visual(model.normalise(videos))
    other_features, other_patches = model.visual(model.normalise(changed))
    assert torch.equal(features[:, :-1], other_features[:, :-1]) != sees
    assert torch.equal(patches[:, :-1], other_patches[:, :-1]) != sees


def test_models_share_their_first_weights() -> None:
    whole = build_model("xclip", seed=3).state_dict()
    for name in ("no_cfa", "average"):
        part = build_model(name, seed=3).state_dict()
        assert set(part) < set(whole)
        assert all(torch.equal(value, whole[key]) for key, value in part.items())
        assert not any(".message_" in key for key in part)
        assert any(key.startswith("mit.") for key in part) == (name == "no_cfa")


@pytest.mark.parametrize("name", MODELS)
def test_weights_load(name: str) -> None:
    model = load_trained(name)
    assert model.config == CONFIG
    assert not model.training
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}


def test_weights_are_small() -> None:
    sizes = [weights_path(name).stat().st_size for name in MODELS]
    assert sum(sizes) <= 8_000_000


def test_xclip_tells_time(held_out: tuple[Tensor, Tensor]) -> None:
    videos, labels = held_out
    result = score("xclip", logits(load_trained("xclip"), videos), labels)
    assert result.top1 >= 0.95
    assert min(result.pairs.values()) >= 0.9


def test_averaging_stays_at_chance(held_out: tuple[Tensor, Tensor]) -> None:
    videos, labels = held_out
    result = score("average", logits(load_trained("average"), videos), labels)
    # four standard deviations of as many fair coins
    bound = 4 * sqrt(0.25 / len(labels))
    assert abs(result.pair_accuracy - 0.5) <= bound
    assert result.top1 <= 0.5 + bound


def test_score_counts_by_hand() -> None:
    answers = torch.zeros(8, 8)
    labels = torch.arange(8)
    answers[0, 0] = 1  # right
    answers[1, 0] = 1  # its partner: wrong both ways
    answers[2, 7] = 1  # another pair: wrong, and undecided between its own two
    answers[3, 3] = 1
    answers[4, 5], answers[4, 4] = 2, 1
    answers[5, 5], answers[5, 4], answers[5, 0] = 1, 0.5, 2  # right between its own two alone
    answers[6, 6] = answers[7, 7] = 1
    result = score("xclip", answers, labels)
    assert result.top1 == 4 / 8
    assert list(result.pairs.values()) == [0.5, 0.75, 0.5, 1.0]
    assert result.pair_accuracy == 0.6875
