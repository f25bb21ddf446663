"""Launches of one call: the goals, and the count beside what the launchers really launch."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

from benchmarks.compile_gate.capture import captured_launches
from xclip_fast.bench import launches
from xclip_fast.bench.launches import CLASSES, INPUTS, count, launches_of
from xclip_fast.bench.record import Case
from xclip_fast.model import create_model
from xclip_fast.ops import backend
from xclip_fast.ops.cases import config_of

CASE = Case("model", "tiny", 4, 1, CLASSES, "float32", "forward", "normalised", "meta")
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


def of(variant: str, **parts: str) -> Case:
    return replace(CASE, variant=variant, frames=config_of(variant).frames, **parts)


# the patches' product is a launch of its own, and weights of patches of 14 are filled up for it by two more
@pytest.mark.parametrize(("variant", "goal"), [("B/32", 161), ("B/16", 161), ("L/14", 295), ("L/14-336", 295)])
@pytest.mark.parametrize("input", INPUTS)
def test_launches_reach_the_goal(variant: str, goal: int, input: str) -> None:
    assert launches_of(of(variant, input=input), "layers") <= goal
    # its stream has no biases, neither in the blocks nor in the prompts
    assert launches_of(of(variant, input=input), "engine") <= goal - 5
    assert launches_of(of(variant, input=input, dtype="bfloat16"), "engine") <= goal - 5


def test_bytes_are_counted_with_what_they_need_first() -> None:
    case = of("B/32", dtype="bfloat16")
    more = {}
    for provider, counted in launches.PROVIDERS.items():
        with_bytes = counted(replace(case, input="uint8"))
        more[provider] = {name: n for name, n in (with_bytes - counted(case)).items() if n}
    assert more["engine"] == more["layers"] == {}
    # to float32, scaled, and back
    assert more["hf-sdpa"] == {"to": 2, "addcmul": 1}
    assert sum(more["reference"].values()) > 3
    assert launches_of(replace(case, direction="train"), "layers") is None
    assert launches_of(case, "optimized") is None


def test_what_gives_back_its_argument_launches_nothing() -> None:
    x = torch.empty(4, 6, device="meta")

    def run() -> Tensor:
        same = x.to(torch.float32).reshape(6, 4).contiguous()
        parts = torch.dropout(same, 0.5, False).chunk(2)
        return parts[0].double() + x.t().reshape(3, 8)[:, :4] + x.add_(1)[0, 0]

    assert count(run) == {"to": 1, "reshape": 1, "add": 2, "add_": 1}


def test_a_case_is_counted_once_for_hugging_face(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("transformers")
    first = launches_of(CASE, "hf-sdpa")
    monkeypatch.setattr(launches, "model_of", lambda *arguments: pytest.fail("counted again"))
    assert launches_of(replace(CASE, device="cpu"), "hf-sdpa") == first


def test_fused_ops_are_counted_as_they_launch() -> None:
    counted = launches.layers(CASE)
    model = create_model(config_of("tiny"))
    size = model.config.image_size
    video = torch.zeros(1, model.config.frames, 3, size, size)
    with torch.inference_mode(), backend("triton"), captured_launches() as found:
        model.logits(model.encode_video(video), torch.zeros(CLASSES, model.config.embed_dim))
    # of an MLP's two GEMMs the second is PyTorch's, as is that of the patches
    fused = sum(counted[name] for name in FUSED) + counted["feed_forward"] // 2 - 1
    assert len(found) == fused
