"""Every launcher called as the model calls it, forward and then backward, on the example arguments of its op.

The compile gate calls them with production shapes on the meta device, the tests of memory and the sanitizers with small
ones. Each takes a draw and the sizes of ``xclip_fast.ops.cases``.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

from xclip_fast.kernels.clip_logits import clip_logits_bwd, clip_logits_fwd
from xclip_fast.kernels.column_sums import column_sums as column_sums_of
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
from xclip_fast.ops import inputs
from xclip_fast.ops.inputs import Draw
from xclip_fast.tuning import Sizes, override

EPS = 1e-5
AFFINE = [[0.02] * 3, [-1.5] * 3]


def layer_norm(draw: Draw, **sizes: Any) -> list[Tensor]:
    """With the stream's gradient where there is a residual."""
    given = inputs.layer_norm(draw, **sizes)
    x, weight, residual, constant = given["x"], given["weight"], given.get("residual"), given.get("constant")
    normed, stream, mean, rstd = layer_norm_fwd(x, weight, given["bias"], residual, constant, EPS)
    grads = [draw(*x.shape) if wanted else None for wanted in (residual is not None, True)]
    stream_or_x = x if residual is None else stream
    return [normed, stream, mean, rstd, *layer_norm_bwd(grads[1], grads[0], stream_or_x, weight, constant, mean, rstd)]


def quantize_rows(draw: Draw, **sizes: Any) -> list[Tensor]:
    """Forward alone: only the engine quantises."""
    given = inputs.quantize_rows(draw, **sizes)
    tensors = (given.get(name) for name in ("x", "weight", "bias", "residual", "constant"))
    return [*quantize_rows_fwd(*tensors, EPS, given["activation"])]


def linear_quick_gelu(draw: Draw, *, training: bool = True, **sizes: Any) -> list[Tensor]:
    """Only training keeps the pre-activation and has a backward pass."""
    activated, pre = linear_quick_gelu_fwd(*inputs.linear_quick_gelu(draw, **sizes).values(), training)
    if not training:
        return [activated]
    grad = draw(*activated.shape)
    return [activated, pre, *quick_gelu_bwd(grad, pre, False)[::2], *quick_gelu_bwd(grad, pre, True)]


def column_sums(draw: Draw, *, rows: int, width: int) -> list[Tensor]:
    """Of a gradient: no op's forward pass has them."""
    return [column_sums_of(draw(rows, width))]


def linear_quick_gelu_persistent(
    draw: Draw,
    rows: int,
    width: int,
    hidden: int,
    *,
    programs: int,
    training: bool = False,
    dtype: torch.dtype | None = None,
) -> list[Tensor]:
    """Forward alone; width and hidden are multiples of 8, so that rows begin where a descriptor takes them."""
    x, weight, bias = draw(rows, width, dtype=dtype), draw(hidden, width, dtype=dtype), draw(hidden, dtype=dtype)
    activated, pre = linear_quick_gelu_persistent_fwd(x, weight, bias, training, programs)
    return [activated, pre] if training else [activated]


def mean_norm_over_frames(draw: Draw, **sizes: Any) -> list[Tensor]:
    """Forward and backward."""
    given = inputs.mean_norm_over_frames(draw, **sizes)
    tokens, weight, bias = (given[name] for name in ("tokens", "weight", "bias"))
    added = given.get("residual"), given.get("constant")
    out = mean_norm_over_frames_fwd(tokens, weight, bias, *added, EPS)
    return [out, *mean_norm_over_frames_bwd(draw(*out.shape), tokens, weight, *added, EPS)]


def clip_logits(draw: Draw, **sizes: Any) -> list[Tensor]:
    """Only training, where texts are in the dtype of the videos, has a backward pass."""
    given = inputs.clip_logits(draw, **sizes)
    tensors = [given.get(name) for name in ("video", "text", "prompts", "alpha", "logit_scale", "residual")]
    logits = clip_logits_fwd(*tensors)
    return [logits] if sizes.get("text_dtype") else [logits, *clip_logits_bwd(draw(*logits.shape), *tensors)]


def patch_embed(draw: Draw, **sizes: Any) -> list[Tensor]:
    """Then the tokens of a GEMM of what the extension packs; planes of normalised numbers save what is normed."""
    given = inputs.patch_embed(draw, **sizes)
    planes = sizes.get("planes", False)
    frames = given.pop("frames")
    weight, _, positions, *_ = given.values()
    channels_last = frames.permute(0, 2, 3, 1) if planes else frames
    dtype = weight.dtype
    found = [*patch_embed_fwd(channels_last, *given.values(), EPS, AFFINE, dtype, planes)]
    count, (tokens, width) = len(frames), positions.shape
    product = draw(count * (tokens - 1), width, dtype=torch.float16).contiguous()
    scale, table = draw(width, dtype=torch.float32), draw(tokens, width, dtype=torch.float32)
    return [*found, *patch_tokens(product, scale, None, table, None, None, EPS, count, dtype, dtype, False)]


def prompt_attention(draw: Draw, **sizes: Any) -> list[Tensor]:
    """Forward and backward."""
    query, key, value, heads = inputs.prompt_attention(draw, **sizes).values()
    out, lse = prompt_attention_fwd(query, key, value, heads)
    return [out, lse, *prompt_attention_bwd(draw(*out.shape), query, key, value, out, lse, heads)]


def frame_attention(
    draw: Draw, *, training: bool = True, tile: Sizes | None = None, dtype: torch.dtype | None = None, **sizes: Any
) -> list[Tensor]:
    """Only training keeps the log-sum-exp and has a backward pass; ``tile`` is one as a table has it."""
    qkv, message_kv, heads = inputs.frame_attention(draw, **sizes, dtype=dtype).values()
    tuned: AbstractContextManager[object] = override("frame_attention", **tile) if tile else nullcontext()
    with tuned:
        out, lse = frame_attention_fwd(qkv, message_kv, heads, training)
    if not training:
        return [out]
    return [out, lse, *frame_attention_bwd(draw(*out.shape, dtype=dtype), qkv, message_kv, out, lse, heads)]


def message_attention(draw: Draw, **sizes: Any) -> list[Tensor]:
    """Forward alone: the backward pass has no kernel of its own."""
    given = inputs.message_attention(draw, **sizes)
    bounds, heads = given.pop("cu_frames", None), given.pop("heads")
    given.pop("max_frames", None)
    return [message_attention_fwd(*given.values(), bounds, heads, sizes["frames"], EPS)]


def message_key_value(draw: Draw, **sizes: Any) -> list[Tensor]:
    """The same."""
    return [message_key_value_fwd(*inputs.message_key_value(draw, **sizes).values(), EPS)]


def folded_message(draw: Draw, **sizes: Any) -> list[Tensor]:
    """Forward alone: only the engine folds weights."""
    class_tokens, weights, heads = inputs.folded_message(draw, **sizes).values()
    return [folded_message_fwd(class_tokens, *weights, heads, EPS, EPS)]


def temporal_block(draw: Draw, **sizes: Any) -> list[Tensor]:
    """Forward alone, as of ``message_attention``."""
    given = inputs.temporal_block(draw, **sizes)
    ends = [given.pop(name, None) for name in ("positions", "pooled_with", "cu_frames")]
    heads = given.pop("heads")
    given.pop("max_frames", None)
    return [temporal_block_fwd(*given.values(), *ends, heads, sizes["frames"], EPS)]
