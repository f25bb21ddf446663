"""Every launcher at a size the interpreter is quick with: more than one program, odd sizes, masked edges."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch

from benchmarks.static import calls

# each is called with a factory of inputs, and returns its outputs
CASES: dict[str, Callable[..., Any]] = {
    "layer_norm": partial(calls.layer_norm, rows=9, width=40),
    "layer_norm residual": partial(calls.layer_norm, rows=9, width=40, residual=True),
    "layer_norm both": partial(calls.layer_norm, rows=6, width=33, residual=True, constant=True),
    "layer_norm constant, autocast": partial(
        calls.layer_norm, rows=5, width=64, constant=True, norm_dtype=torch.float32
    ),
    "layer_norm wide": partial(calls.layer_norm, rows=3, width=1025),
    "linear_quick_gelu": partial(calls.linear_quick_gelu, rows=70, width=40, hidden=72, training=False),
    "linear_quick_gelu training": partial(calls.linear_quick_gelu, rows=33, width=24, hidden=66, training=True),
    "linear_quick_gelu tiles": partial(calls.linear_quick_gelu, rows=64, width=64, hidden=128, training=True),
    "mean_norm_over_frames": partial(calls.mean_norm_over_frames, batch=2, frames=3, patches=5, width=40),
    "mean_norm_over_frames one": partial(calls.mean_norm_over_frames, batch=3, frames=1, patches=2, width=33),
    "clip_logits": partial(calls.clip_logits, batch=2, classes=7, width=40),
    "clip_logits wide": partial(calls.clip_logits, batch=3, classes=2, width=1030),
    "prompt_attention": partial(
        calls.prompt_attention, batch=2, classes=35, patches=37, width=64, heads=2, shared=False
    ),
    "prompt_attention shared": partial(
        calls.prompt_attention, batch=2, classes=5, patches=9, width=64, heads=1, shared=True
    ),
    "frame_attention": partial(calls.frame_attention, frames=2, tokens=66, heads=2, head_dim=32, training=True),
    "frame_attention one": partial(calls.frame_attention, frames=2, tokens=1, heads=1, head_dim=32, training=True),
    "frame_attention tail": partial(calls.frame_attention, frames=2, tokens=17, heads=1, head_dim=64, training=False),
    "message_attention": partial(calls.message_attention, clips=2, frames=3, heads=2, head_dim=32),
    "message_attention ragged": partial(calls.message_attention, clips=2, frames=5, heads=1, head_dim=32, ragged=True),
    # more clips than one launch takes, rows few enough for the skinny product
    "message_attention long": partial(calls.message_attention, clips=20, frames=2, heads=1, head_dim=32),
    "message_attention long ragged": partial(
        calls.message_attention, clips=2, frames=66, heads=1, head_dim=32, ragged=True
    ),
    "temporal_block": partial(calls.temporal_block, clips=2, frames=9, heads=1, head_dim=32),
}
