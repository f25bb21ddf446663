"""What the engine computes on a GPU, but for its graphs and streams: on the Triton kernels, in their interpreter."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from engine_cases import random_tokens, random_video, small_model
from interpreted_bfloat16 import interpreted_bfloat16
from numerics import assert_within, model_allowance, relative_error
from pointer_check import checked_pointers
from torch import Tensor

from xclip_fast import ops
from xclip_fast.engine import Engine, cuda
from xclip_fast.engine.cuda import CudaTower
from xclip_fast.engine.packing import CUDA_REWRITES, Packing

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU runs the engine itself")


OPS = (
    "patch_rows",
    "patch_tokens",
    "frame_attention",
    "layer_norm",
    "mean_norm_over_frames",
    "clip_logits",
)


def parts(model: Any, video: Tensor, tokens: Tensor) -> dict[str, Tensor]:
    """The same by a model in plain PyTorch."""
    features = model.encode_video(video)
    found = {"video": features.video, "patches": features.patches, "logits": model(video, tokens)}
    return found | {"video alone": features.video}


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("backend", ["triton", "torch"])
@torch.inference_mode()
@pytest.mark.slow
def test_normalised_frames_are_rounded_as_patches_are_gathered(
    monkeypatch: pytest.MonkeyPatch, backend: str, dtype: torch.dtype
) -> None:
    model = small_model()
    tower = CudaTower(model.visual, model.config, Packing(torch.device("cpu"), dtype, CUDA_REWRITES))
    video = torch.randn(2, 4, 3, 32, 32)
    given = []
    inner = cuda.patch_embed

    def spy(frames: Tensor, *arguments: Any, **options: Any) -> Tensor:
        given.append(frames)
        return inner(frames, *arguments, **options)

    monkeypatch.setattr(cuda, "patch_embed", spy)
    with interpreted_bfloat16(), ops.backend(backend):
        found, rounded = tower._embed(video), tower._embed(video.to(dtype))
    assert given[0].data_ptr() == video.data_ptr()
    assert found.dtype == dtype
    assert torch.equal(found, rounded)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@torch.inference_mode()
@pytest.mark.slow
def test_parity(dtype: torch.dtype) -> None:
    # the first block, whose message is a constant, and one behind it; of two videos two frames each
    model, video, tokens = small_model(vision_layers=2), random_video(2, 2), random_tokens()
    exact, eager = copy.deepcopy(model).double(), copy.deepcopy(model).to(dtype)
    engine = Engine(model, dtype, _rewrites=CUDA_REWRITES)
    engine._tower = CudaTower(model.visual, model.config, engine._packing)
    with interpreted_bfloat16(), checked_pointers() as launches, ops.backend("triton"):
        features = engine.encode_video(video)
        logits = engine.logits(features, engine.encode_texts(tokens)).to(dtype)
        found = {"video": features.video, "patches": features.patches, "logits": logits}
        found["video alone"] = engine.embed_video(video)
    message = "message_attention" if dtype is torch.float16 else "folded_message"
    assert {f"_{op}_fwd_kernel" for op in (*OPS, message)} <= set(launches.names)
    same, truth = (parts(each, video, tokens) for each in (eager, exact))
    for name, ours in found.items():
        assert ours.dtype == dtype
        limit = model_allowance(relative_error(same[name], truth[name]), dtype)
        assert_within(ours, truth[name], limit, what=f"engine on kernels: {name}")


@torch.inference_mode()
def test_large_messages_stay_finite_in_float16() -> None:
    model, video = small_model(), random_video()
    for block in model.visual.transformer.resblocks:
        # up to a tenth of what float16 holds; a norm follows, so that little else changes
        block.message_fc.weight.mul_(4000)
        block.message_attn.in_proj_weight.mul_(10)
    dtype = torch.float16
    exact, eager = copy.deepcopy(model).double(), copy.deepcopy(model).to(dtype)
    engine = Engine(model, dtype, _rewrites=CUDA_REWRITES)
    engine._tower = CudaTower(model.visual, model.config, engine._packing)
    found = engine.encode_video(video).video
    wanted, plain = (each.encode_video(video).video for each in (exact, eager))
    assert plain.isfinite().all()
    assert_within(found, wanted, model_allowance(relative_error(plain, wanted), dtype), what="large messages")
