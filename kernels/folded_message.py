"""A message's key and value from folded weights: two GEMMs, attention over a clip's frames, a last division."""

from __future__ import annotations

from typing import Any

import triton.language as tl
from torch import Tensor

from xclip_fast.kernels._launch import as_rows, kernel, next_power_of_2, on_device_of
from xclip_fast.kernels._tensors import dot_precision
from xclip_fast.kernels.message_attention import FUSED_FRAMES, FUSED_TILE, LOG2_E, frame_block, launch_long
from xclip_fast.kernels.skinny_linear import MAX_ROWS, skinny_linear

# a message is read in as many pieces, each an instruction
FUSED_HEADS = 32


@kernel
def _folded_message_fwd_kernel(
    first_ptr,
    shift_ptr,
    out_ptr,
    frames,
    eps,
    scale,
    HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_FRAMES: tl.constexpr,
    PRECISION: tl.constexpr,
):
    WIDTH: tl.constexpr = HEADS * HEAD_DIM
    clip = tl.program_id(0).to(tl.int64) // HEADS
    head = tl.program_id(0) % HEADS
    channel = head * HEAD_DIM + tl.arange(0, HEAD_DIM)
    frame = tl.arange(0, BLOCK_FRAMES)
    in_clip = frame < frames
    row = clip * frames + frame
    start = row[:, None] * (6 * WIDTH) + tl.arange(0, HEAD_DIM)[None, :]
    inside = in_clip[:, None]
    # one layout for all that is read, no barrier between: it is on its way at once. [BLOCK_FRAMES, HEAD_DIM]
    part = first_ptr + start + 3 * WIDTH + head * HEAD_DIM
    query = tl.load(part, mask=inside, other=0.0).to(tl.float32)
    key = tl.load(part + WIDTH, mask=inside, other=0.0).to(tl.float32)
    value = tl.load(part + 2 * WIDTH, mask=inside, other=0.0).to(tl.float32)
    query_shift = tl.load(shift_ptr + channel).to(tl.float32)[None, :]
    key_shift = tl.load(shift_ptr + WIDTH + channel).to(tl.float32)[None, :]
    value_shift = tl.load(shift_ptr + 2 * WIDTH + channel).to(tl.float32)[None, :]
    total = tl.zeros((BLOCK_FRAMES, HEAD_DIM), tl.float32)
    for other in tl.static_range(HEADS):
        total += tl.load(first_ptr + start + other * HEAD_DIM, mask=inside, other=0.0).to(tl.float32)
    mean = tl.sum(total, axis=1) / WIDTH
    total = tl.zeros((BLOCK_FRAMES, HEAD_DIM), tl.float32)
    for other in tl.static_range(HEADS):
        # the compiler reads it once
        centred = tl.load(first_ptr + start + other * HEAD_DIM, mask=inside, other=0.0).to(tl.float32) - mean[:, None]
        total += centred * centred
    rstd = 1.0 / tl.sqrt(tl.sum(total, axis=1) / WIDTH + eps)
    dtype = out_ptr.dtype.element_ty
    query = (query * rstd[:, None] + query_shift).to(dtype)
    key = (key * rstd[:, None] + key_shift).to(dtype)
    # the weight of a frame beyond the clip is zero, and its value must be finite
    value = tl.where(inside, value * rstd[:, None] + value_shift, 0.0).to(dtype)
    # [BLOCK_FRAMES, BLOCK_FRAMES]
    scores = tl.dot(query, tl.trans(key), input_precision=PRECISION) * scale
    scores = tl.where(in_clip[None, :], scores, float("-inf"))
    weights = tl.exp2(scores - tl.max(scores, axis=1)[:, None])
    attended = tl.dot(weights.to(dtype), value, input_precision=PRECISION) / tl.sum(weights, axis=1)[:, None]
    tl.store(out_ptr + row[:, None] * WIDTH + channel[None, :], attended.to(dtype), mask=inside)


@kernel
def _scaled_parts_fwd_kernel(
    x_ptr,
    bias_ptr,
    shift_ptr,
    out_ptr,
    x_width,
    eps,
    WIDTH: tl.constexpr,
    FIRST: tl.constexpr,
    PARTS: tl.constexpr,
    BLOCK_WIDTH: tl.constexpr,
    HAS_BIAS: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64) // PARTS
    part = tl.program_id(0) % PARTS
    column = tl.arange(0, BLOCK_WIDTH)
    in_width = column < WIDTH
    # [BLOCK_WIDTH]
    message = tl.load(x_ptr + row * x_width + column, mask=in_width, other=0.0).to(tl.float32)
    place = (FIRST + part) * WIDTH + column
    x = tl.load(x_ptr + row * x_width + place, mask=in_width, other=0.0).to(tl.float32)
    shift = tl.load(shift_ptr + part * WIDTH + column, mask=in_width, other=0.0).to(tl.float32)
    if HAS_BIAS:
        message += tl.load(bias_ptr + column, mask=in_width, other=0.0).to(tl.float32)
        x += tl.load(bias_ptr + place, mask=in_width, other=0.0).to(tl.float32)
    # the padding must not enter the variance: it is not at the mean
    centred = tl.where(in_width, message - tl.sum(message, axis=0) / WIDTH, 0.0)
    rstd = 1.0 / tl.sqrt(tl.sum(centred * centred, axis=0) / WIDTH + eps)
    out = out_ptr + (row * PARTS + part) * WIDTH + column
    tl.store(out, (x * rstd + shift).to(out_ptr.dtype.element_ty), mask=in_width)


def is_fused(frames: int, heads: int, head_dim: int, itemsize: int) -> bool:
    """Whether scale, shift and attention of clips of this many frames run as one kernel."""
    small = frames <= FUSED_FRAMES and frame_block(frames) * head_dim <= FUSED_TILE[itemsize]
    return small and heads <= FUSED_HEADS


def launches(class_tokens: Tensor, *arguments: Any) -> int:
    """Kernels that ``folded_message_fwd`` launches for its arguments, whose data it does not read: four, or five."""
    heads = arguments[-3]
    frames, width = class_tokens.shape[-2:]
    if not class_tokens.numel():
        return 0
    return 4 if is_fused(frames, heads, width // heads, class_tokens.element_size()) else 5


def folded_message_fwd(
    class_tokens: Tensor,
    weight: Tensor,
    bias: Tensor,
    shift: Tensor,
    out_weight: Tensor,
    out_bias: Tensor,
    pair_shift: Tensor,
    heads: int,
    eps: float,
    pair_eps: float,
) -> Tensor:
    """Launch the forward pass on class tokens (B, T, D): (B, T, 2 D)."""
    rows, frames, width = as_rows(class_tokens), class_tokens.shape[1], class_tokens.shape[2]
    first = skinny_linear(rows, weight, bias)
    attended = rows.new_empty(rows.shape[0], width)
    if not first.numel():
        return attended.new_empty(*class_tokens.shape[:2], 2 * width)
    with on_device_of(rows):
        _attend(first, shift.contiguous(), attended, heads, frames, eps)
        stream, late_bias = first[:, : 3 * width], None
        if len(rows) > MAX_ROWS:
            # PyTorch's GEMM accumulates in place, but adds no bias then
            stream, late_bias = stream.addmm_(attended, out_weight.t()), out_bias.contiguous()
        else:
            stream = skinny_linear(attended, out_weight, out_bias, residual=stream)
        pair = _scaled_parts(stream, late_bias, pair_shift.contiguous(), 1, 2, pair_eps)
    return pair.view(*class_tokens.shape[:2], 2 * width)


def _attend(first: Tensor, shift: Tensor, attended: Tensor, heads: int, frames: int, eps: float) -> None:
    rows, width = attended.shape
    clips, head_dim = rows // frames, width // heads
    if not is_fused(frames, heads, head_dim, first.element_size()):
        launch_long(_scaled_parts(first, None, shift, 3, 3, eps), None, heads, clips, frames, attended)
        return
    block = frame_block(frames)
    _folded_message_fwd_kernel[(clips * heads,)](
        first_ptr=first,
        shift_ptr=shift,
        out_ptr=attended,
        frames=frames,
        eps=eps,
        scale=head_dim**-0.5 * LOG2_E,
        HEADS=heads,
        HEAD_DIM=head_dim,
        BLOCK_FRAMES=block,
        PRECISION=dot_precision(first),
        # a row within one warp, whose sums need no barrier
        num_warps=4 if block == 16 else 8,
    )


def _scaled_parts(x: Tensor, bias: Tensor | None, shift: Tensor, first: int, parts: int, eps: float) -> Tensor:
    """Parts (rows, parts * D) of rows (rows, N) by the deviation of their first D numbers, the bias added, shifted."""
    width = shift.shape[0] // parts
    out = x.new_empty(x.shape[0], parts * width)
    block = next_power_of_2(width)
    _scaled_parts_fwd_kernel[(x.shape[0] * parts,)](
        x_ptr=x,
        bias_ptr=bias,
        shift_ptr=shift,
        out_ptr=out,
        x_width=x.stride(0),
        eps=eps,
        WIDTH=width,
        FIRST=first,
        PARTS=parts,
        BLOCK_WIDTH=block,
        HAS_BIAS=bias is not None,
        num_warps=4 if block <= 1024 else 8,
    )
    return out
