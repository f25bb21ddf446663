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
from xclip_fast.engine import Engine
from xclip_fast.engine.cuda import CudaTower
from xclip_fast.engine.packing import CUDA_REWRITES

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU runs the engine itself")


OPS = ("patch_tokens", "frame_attention", "folded_message", "layer_norm", "mean_norm_over_frames", "clip_logits")


def parts(model: Any, video: Tensor, tokens: Tensor) -> dict[str, Tensor]:
    """The same by a model in plain PyTorch."""
    features = model.encode_video(video)
    found = {"video": features.video, "patches": features.patches, "logits": model(video, tokens)}
    return found | {"video alone": features.video}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@torch.inference_mode()
def test_parity(dtype: torch.dtype) -> None:
    model, video, tokens = small_model(), random_video(), random_tokens()
    exact, eager = copy.deepcopy(model).double(), copy.deepcopy(model).to(dtype)
    engine = Engine(model, dtype, _rewrites=CUDA_REWRITES)
    engine._tower = CudaTower(model.visual, model.config, engine._packing)
    with interpreted_bfloat16(), checked_pointers() as launches, ops.backend("triton"):
        features = engine.encode_video(video)
        logits = engine.logits(features, engine.encode_texts(tokens)).to(dtype)
        found = {"video": features.video, "patches": features.patches, "logits": logits}
        found["video alone"] = engine.embed_video(video)
    assert {f"_{op}_fwd_kernel" for op in OPS} <= set(launches.names)
    same, truth = (parts(each, video, tokens) for each in (eager, exact))
    for name, ours in found.items():
        assert ours.dtype == dtype
        limit = model_allowance(relative_error(same[name], truth[name]), dtype)
        assert_within(ours, truth[name], limit, what=f"engine on kernels: {name}")
