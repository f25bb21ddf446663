"""Every launcher called as the model calls it, forward and then backward, on tensors from a factory.

The compile gate calls them with production shapes on the meta device, the tests of memory with small tensors in
awkward places.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Protocol

import torch
from torch import Tensor

from xclip_fast.kernels.clip_logits import clip_logits_bwd, clip_logits_fwd
from xclip_fast.kernels.folded_message import folded_message_fwd
from xclip_fast.kernels.frame_attention import frame_attention_fwd
from xclip_fast.kernels.frame_attention_bwd import frame_attention_bwd
from xclip_fast.kernels.layer_norm import layer_norm_bwd, layer_norm_fwd
from xclip_fast.kernels.linear_quick_gelu import (
    linear_quick_gelu_fwd,
    linear_quick_gelu_persistent_fwd,
    quick_gelu_bwd,
)
from xclip_fast.kernels.mean_norm_over_frames import mean_norm_over_frames_bwd, mean_norm_over_frames_fwd
from xclip_fast.kernels.message_attention import message_attention_fwd, message_key_value_fwd
from xclip_fast.kernels.patch_embed import patch_embed_fwd, patch_tokens
from xclip_fast.kernels.prompt_attention import prompt_attention_bwd, prompt_attention_fwd
from xclip_fast.kernels.quantize_rows import quantize_rows_fwd
from xclip_fast.kernels.temporal_block import temporal_block_fwd
from xclip_fast.tuning import Sizes, override

EPS = 1e-5


class Make(Protocol):
    """A factory of input tensors; without a dtype, in that of the activations."""

    def __call__(self, *shape: int, dtype: torch.dtype | None = None) -> Tensor: ...


def layer_norm(
    make: Make,
    rows: int,
    width: int,
    *,
    residual: bool = False,
    constant: bool = False,
    norm_dtype: torch.dtype | None = None,
) -> list[Tensor]:
    """``norm_dtype`` is that of weight and bias: float32 under autocast."""
    x, weight, bias = make(rows, width), make(width, dtype=norm_dtype), make(width, dtype=norm_dtype)
    added = make(rows, width) if residual else None
    shift = make(width) if constant else None
    normed, stream, mean, rstd = layer_norm_fwd(x, weight, bias, added, shift, EPS)
    grad_stream = make(rows, width) if residual else None
    grads = layer_norm_bwd(make(rows, width), grad_stream, stream if residual else x, weight, shift, mean, rstd)
    return [normed, stream, mean, rstd, *grads]


def quantize_rows(
    make: Make,
    rows: int,
    width: int,
    *,
    norm: bool = False,
    residual: bool = False,
    constant: bool = False,
    activation: str | None = None,
) -> list[Tensor]:
    """Forward alone: only the engine quantises."""
    x, vectors = make(rows, width), (make(width), make(width)) if norm else (None, None)
    added = make(rows, width) if residual else None
    return [*quantize_rows_fwd(x, *vectors, added, make(width) if constant else None, EPS, activation)]


def linear_quick_gelu(make: Make, rows: int, width: int, hidden: int, *, training: bool) -> list[Tensor]:
    """Only training keeps the pre-activation and has a backward pass."""
    activated, pre = linear_quick_gelu_fwd(make(rows, width), make(hidden, width), make(hidden), training)
    if not training:
        return [activated]
    grad = make(rows, hidden)
    return [activated, pre, *quick_gelu_bwd(grad, pre, False)[:1], *quick_gelu_bwd(grad, pre, True)]


def linear_quick_gelu_persistent(
    make: Make, rows: int, width: int, hidden: int, *, programs: int, dtype: torch.dtype | None = None
) -> list[Tensor]:
    """Forward alone; width and hidden are multiples of 8, so that rows begin where a descriptor takes them."""
    x, weight, bias = make(rows, width, dtype=dtype), make(hidden, width, dtype=dtype), make(hidden, dtype=dtype)
    return [linear_quick_gelu_persistent_fwd(x, weight, bias, programs)]


def mean_norm_over_frames(
    make: Make,
    batch: int,
    frames: int,
    patches: int,
    width: int,
    *,
    residual: bool = False,
    constant: bool = False,
) -> list[Tensor]:
    """Patches are the tokens behind each frame's class token."""
    tokens, weight, bias = make(batch, frames, patches + 1, width)[:, :, 1:], make(width), make(width)
    # the branch is the tight result of a product
    added = make(batch, frames, patches, width) if residual else None
    shift = make(width) if constant else None
    out = mean_norm_over_frames_fwd(tokens, weight, bias, added, shift, EPS)
    return [out, *mean_norm_over_frames_bwd(make(batch, patches, width), tokens, weight, added, shift, EPS)]


def clip_logits(
    make: Make, batch: int, classes: int, width: int, *, residual: bool = False, text_dtype: torch.dtype | None = None
) -> list[Tensor]:
    """``text_dtype`` is that of texts, ``alpha`` and scale: float32 in the engine, whose residual is one row."""
    text, alpha, scale = (make(*shape, dtype=text_dtype) for shape in ((classes, width), (width,), ()))
    prompts, added = make(batch, classes, width), None
    if residual:
        added = make(batch, classes, width) if text_dtype is None else make(width).expand_as(prompts)
    inputs = make(batch, width), text, prompts, alpha, scale, added
    logits = clip_logits_fwd(*inputs)
    return [logits] if text_dtype else [logits, *clip_logits_bwd(make(batch, classes), *inputs)]


def patch_embed(
    make: Make, frames: int, grid: int, patch: int, width: int, *, pixels: torch.dtype | None = None
) -> list[Tensor]:
    """``pixels`` is their dtype: bytes with channels last, or planes of normalised numbers."""
    side = grid * patch
    images = make(frames, 3, side, side, dtype=pixels).permute(0, 2, 3, 1)
    if pixels == torch.uint8:
        images = make(frames, side, side, 3, dtype=pixels)
    weights = make(width, 3, patch, patch), make(width), make(1 + grid**2, width), make(width), make(width)
    last = weights[0].dtype
    found = [*patch_embed_fwd(images, *weights, EPS, [[0.02] * 3, [-1.5] * 3], last, pixels is None)]
    # the product of what the extension packs
    product = make(frames * grid**2, width, dtype=torch.float16).contiguous()
    scale, table = make(width, dtype=torch.float32), make(1 + grid**2, width, dtype=torch.float32)
    return [*found, *patch_tokens(product, scale, None, table, None, None, EPS, frames, last, last, False)]


def prompt_attention(
    make: Make, batch: int, classes: int, patches: int, width: int, heads: int, *, shared: bool
) -> list[Tensor]:
    """Keys and values are halves of one projection; ``shared`` queries are the same for all videos."""
    query = make(1 if shared else batch, classes, width)
    key, value = make(batch, patches, 2 * width).chunk(2, -1)
    out, lse = prompt_attention_fwd(query, key, value, heads)
    return [out, lse, *prompt_attention_bwd(make(batch, classes, width), query, key, value, out, lse, heads)]


def frame_attention(
    make: Make,
    frames: int,
    tokens: int,
    heads: int,
    *,
    head_dim: int = 64,
    training: bool,
    tile: Sizes | None = None,
    dtype: torch.dtype | None = None,
) -> list[Tensor]:
    """Only training keeps the log-sum-exp and has a backward pass; ``tile`` is one as a table has it."""
    width = heads * head_dim
    qkv, message_kv = make(frames, tokens, 3 * width, dtype=dtype), make(frames, 2 * width, dtype=dtype)
    tuned: AbstractContextManager[object] = override("frame_attention", **tile) if tile else nullcontext()
    with tuned:
        out, lse = frame_attention_fwd(qkv, message_kv, heads, training)
    if not training:
        return [out]
    grad = make(frames, tokens, width, dtype=dtype)
    return [out, lse, *frame_attention_bwd(grad, qkv, message_kv, out, lse, heads)]


def message_attention(
    make: Make, clips: int, frames: int, heads: int, *, head_dim: int = 64, ragged: bool = False
) -> list[Tensor]:
    """Class tokens lie in front of each frame's patches; then the key and value of the messages for the frames."""
    width = heads * head_dim
    tokens = make(clips, frames, 2, width)[:, :, 0]
    weights = (make(width, width), make(width), make(width), make(width), *_attention_weights(make, width))
    bounds = _bounds(tokens) if ragged else None
    messages = message_attention_fwd(tokens, *weights, bounds, heads, frames, EPS)
    key_value = message_key_value_fwd(messages, make(width), make(width), make(2 * width, width), make(2 * width), EPS)
    return [messages, key_value]


def folded_message(make: Make, clips: int, frames: int, heads: int, *, head_dim: int = 64) -> list[Tensor]:
    """Class tokens as for ``message_attention``; what no product of PyTorch's reads is in float32. Forward alone."""
    width = heads * head_dim
    tokens = make(clips, frames, 2, width)[:, :, 0]
    first = make(6 * width, width), make(6 * width), make(3 * width, dtype=torch.float32)
    last = make(3 * width, width), make(3 * width, dtype=torch.float32), make(2 * width, dtype=torch.float32)
    return [folded_message_fwd(tokens, *first, *last, heads, EPS, EPS)]


def temporal_block(
    make: Make, clips: int, frames: int, heads: int, *, head_dim: int = 64, ragged: bool = False, whole: bool = False
) -> list[Tensor]:
    """The perceptron is four times as wide as the rows; ``whole`` is all of MIT, with positions and mean."""
    width = heads * head_dim
    x = make(clips, frames, width)
    ends = (make(frames, width), make(clips, frames, width)) if whole else (None, None)
    attention = (make(width), make(width), *_attention_weights(make, width))
    perceptron = make(width), make(width), make(4 * width, width), make(4 * width), make(width, 4 * width), make(width)
    bounds = _bounds(x) if ragged else None
    return [temporal_block_fwd(x, *attention, *perceptron, *ends, bounds, heads, frames, EPS)]


def _attention_weights(make: Make, width: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Weight and bias of the packed projection, then of the out-projection."""
    return make(3 * width, width), make(3 * width), make(width, width), make(width)


def _bounds(clips: Tensor) -> Tensor:
    """The first row of each clip (clips, frames, ...) and the end: one clip lacks a frame, one frame has no clip."""
    count, frames = clips.shape[:2]
    return torch.arange(0, (count + 1) * frames, frames, dtype=torch.int32, device=clips.device).sub(1).clamp(min=0)
