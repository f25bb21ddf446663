"""Launches of a forward pass: the goals, and the count beside what the launchers really launch."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton")

from benchmarks.static.capture import captured_launches
from xclip_fast.bench.launches import CLASSES, ours
from xclip_fast.config import VARIANTS, XCLIPConfig
from xclip_fast.model import create_model
from xclip_fast.ops import backend

FUSED = {
    "clip_logits",
    "frame_attention",
    "layer_norm",
    "mean_norm_over_frames",
    "message_attention",
    "message_key_value",
    "patch_embed",
    "prompt_attention",
    "temporal_block",
}


@pytest.mark.parametrize(("variant", "goal"), [("B/32", 160), ("B/16", 160), ("L/14", 292), ("L/14-336", 292)])
def test_launches_reach_the_goal(variant: str, goal: int) -> None:
    assert ours(VARIANTS[variant]).total() <= goal


def test_fused_ops_are_counted_as_they_launch() -> None:
    config = XCLIPConfig(
        image_size=8, patch_size=4, vision_width=64, vision_layers=2, embed_dim=64, text_width=64, text_layers=1
    )
    counted = ours(config)
    model = create_model(config)
    video = torch.zeros(1, config.frames, 3, config.image_size, config.image_size)
    with torch.inference_mode(), backend("triton"), captured_launches() as launches:
        model.logits(model.encode_video(video), torch.zeros(CLASSES, config.embed_dim))
    # of a perceptron's two products the second is PyTorch's
    fused = sum(counted[name] for name in FUSED) + counted["feed_forward"] // 2
    assert len(launches) == fused
