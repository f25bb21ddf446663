"""Parameters and multiply-accumulates (MACs) of the named variants equal the published ones, counted on meta."""

from __future__ import annotations

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from xclip_fast.config import VARIANTS
from xclip_fast.reference import XCLIP

# counted on the official modules: GMACs of one video and one text
GIGA_MACS = {
    ("B/32", 8): 39.01,
    ("B/32", 16): 74.99,
    ("B/32", 32): 146.95,
    ("B/16", 8): 144.91,
    ("B/16", 16): 286.63,
    ("B/16", 32): 570.08,
    ("L/14", 8): 659.05,
    ("L/14", 16): 1310.85,
    ("L/14", 32): 2614.45,
    ("L/14-336", 8): 1541.65,
    ("L/14-336", 16): 3075.29,
    ("L/14-336", 32): 6142.58,
}
# the paper's and the official README's "GFLOPs", which are GMACs
PUBLISHED_GIGA_MACS = {
    ("B/32", 8): 39,
    ("B/32", 16): 75,
    ("B/16", 8): 145,
    ("B/16", 16): 287,
    ("B/16", 32): 571,
    ("L/14", 8): 658,
    ("L/14-336", 16): 3086,
}
MEGA_PARAMETERS = {("B/32", 8): 196.586, ("B/16", 8): 194.929, ("L/14", 8): 575.674, ("L/14-336", 16): 576.007}


def on_meta(variant: str, frames: int) -> XCLIP:
    with torch.device("meta"):
        return XCLIP(VARIANTS[variant].with_frames(frames))


@pytest.mark.parametrize(("variant", "frames"), GIGA_MACS)
def test_macs(variant: str, frames: int) -> None:
    model = on_meta(variant, frames)
    side = model.config.image_size
    video = torch.empty(1, frames, 3, side, side, device="meta")
    tokens = torch.empty(1, model.config.context_length, dtype=torch.int64, device="meta")
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(video, tokens)
    counted = counter.get_total_flops() / 2e9
    assert counted == pytest.approx(GIGA_MACS[variant, frames], rel=1e-3)
    if (variant, frames) in PUBLISHED_GIGA_MACS:
        assert counted == pytest.approx(PUBLISHED_GIGA_MACS[variant, frames], rel=1e-2)


@pytest.mark.parametrize(("variant", "frames"), MEGA_PARAMETERS)
def test_parameters(variant: str, frames: int) -> None:
    counted = sum(parameter.numel() for parameter in on_meta(variant, frames).parameters())
    assert round(counted / 1e6, 3) == MEGA_PARAMETERS[variant, frames]


def test_longer_clips_add_temporal_positions_alone() -> None:
    counts = [sum(p.numel() for p in on_meta("B/16", frames).parameters()) for frames in (8, 32)]
    assert counts[1] - counts[0] == 24 * VARIANTS["B/16"].embed_dim
