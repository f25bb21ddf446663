"""Cross-frame attention: message projection, norm with QKV and attention over a clip's frames, out-projection."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from xclip_fast.kernels._launch import as_rows, cdiv, kernel, next_power_of_2, on_device_of
from xclip_fast.kernels._tensors import dot_precision
from xclip_fast.kernels.skinny_linear import (
    Norm,
    normalised,
    row_statistics,
    skinny_launches,
    skinny_linear,
)
from xclip_fast.tuning import Tile, every, listed, tunable

# every clip reads the weights anew
FUSED_CLIPS = 16
# the scores of a clip, frames by frames, stay in registers
FUSED_FRAMES = 64
# and so do its queries, keys and values of one head: frames times head_dim, by bytes of an element
FUSED_TILE = {2: 64 * 128, 4: 64 * 32}
LOG2_E = 1.4426950408889634


@triton.jit
def clip_extent(bounds_ptr, clip, longest, total_frames, RAGGED: tl.constexpr):
    """First frame and number of frames of a clip; inside the batch, whatever the bounds hold."""
    if RAGGED:
        first = tl.load(bounds_ptr + clip).to(tl.int64)
        last = tl.load(bounds_ptr + clip + 1).to(tl.int64)
        first = tl.minimum(tl.maximum(first, 0), total_frames)
        last = tl.minimum(tl.maximum(last, first), total_frames)
        length = tl.minimum(last - first, longest)
    else:
        first = clip * longest
        length = longest
    return first, length


@kernel
def _message_attention_fwd_kernel(
    message_ptr,
    norm_weight_ptr,
    norm_bias_ptr,
    weight_ptr,
    bias_ptr,
    bounds_ptr,
    positions_ptr,
    placed_ptr,
    out_ptr,
    longest,
    total_frames,
    message_stride,
    weight_stride,
    positions_stride,
    eps,
    scale,
    HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_FRAMES: tl.constexpr,
    BLOCK_DEPTH: tl.constexpr,
    RAGGED: tl.constexpr,
    HAS_POSITIONS: tl.constexpr,
    PRECISION: tl.constexpr,
):
    WIDTH: tl.constexpr = HEADS * HEAD_DIM
    clip = tl.program_id(0).to(tl.int64) // HEADS
    head = tl.program_id(0).to(tl.int64) % HEADS
    first, length = clip_extent(bounds_ptr, clip, longest, total_frames, RAGGED)
    frame = tl.arange(0, BLOCK_FRAMES)
    in_clip = frame < length
    channel = head * HEAD_DIM + tl.arange(0, HEAD_DIM)
    start = (first + frame) * message_stride
    if HAS_POSITIONS:
        for depth in range(0, WIDTH, BLOCK_DEPTH):
            column = depth + tl.arange(0, BLOCK_DEPTH)
            inside = in_clip[:, None] & (column < WIDTH)[None, :]
            # [BLOCK_FRAMES, BLOCK_DEPTH]
            x = tl.load(message_ptr + start[:, None] + column[None, :], mask=inside, other=0.0).to(tl.float32)
            position = positions_ptr + frame.to(tl.int64)[:, None] * positions_stride + column[None, :]
            x += tl.load(position, mask=inside, other=0.0).to(tl.float32)
            placed = placed_ptr + (first + frame)[:, None] * WIDTH + column[None, :]
            tl.store(placed, x.to(placed_ptr.dtype.element_ty), mask=inside)
        # all heads of a clip write the same rows, and each reads back what its own program wrote
        tl.debug_barrier()
        message_ptr = placed_ptr
        start = (first + frame) * WIDTH
    mean, rstd = row_statistics(message_ptr, start, in_clip, eps, WIDTH, BLOCK_FRAMES, BLOCK_DEPTH)
    query = tl.zeros((BLOCK_FRAMES, HEAD_DIM), tl.float32)
    key = tl.zeros((BLOCK_FRAMES, HEAD_DIM), tl.float32)
    value = tl.zeros((BLOCK_FRAMES, HEAD_DIM), tl.float32)
    for depth in range(0, WIDTH, BLOCK_DEPTH):
        column = depth + tl.arange(0, BLOCK_DEPTH)
        in_width = (column < WIDTH)[None, :]
        # [BLOCK_FRAMES, BLOCK_DEPTH]
        x = tl.load(message_ptr + start[:, None] + column[None, :], mask=in_clip[:, None] & in_width, other=0.0)
        x = normalised(x, mean, rstd, norm_weight_ptr, norm_bias_ptr, column, WIDTH)
        # [HEAD_DIM, BLOCK_DEPTH]
        weight = weight_ptr + channel[:, None] * weight_stride + column[None, :]
        query = tl.dot(x, tl.trans(tl.load(weight, mask=in_width, other=0.0)), query, input_precision=PRECISION)
        weight += WIDTH * weight_stride
        key = tl.dot(x, tl.trans(tl.load(weight, mask=in_width, other=0.0)), key, input_precision=PRECISION)
        weight += WIDTH * weight_stride
        value = tl.dot(x, tl.trans(tl.load(weight, mask=in_width, other=0.0)), value, input_precision=PRECISION)
    dtype = out_ptr.dtype.element_ty
    query = (query + tl.load(bias_ptr + channel).to(tl.float32)[None, :]).to(dtype)
    key = (key + tl.load(bias_ptr + WIDTH + channel).to(tl.float32)[None, :]).to(dtype)
    value = (value + tl.load(bias_ptr + 2 * WIDTH + channel).to(tl.float32)[None, :]).to(dtype)
    # a frame beyond the clip may hold anything: its weight is zero, and zero times NaN is not
    value = tl.where(in_clip[:, None], value, 0.0)
    # [BLOCK_FRAMES, BLOCK_FRAMES]
    scores = tl.dot(query, tl.trans(key), input_precision=PRECISION) * scale
    # an empty clip keeps one key, lest its unused rows divide zero by zero
    scores = tl.where((in_clip | (frame == 0))[None, :], scores, float("-inf"))
    weights = tl.exp2(scores - tl.max(scores, axis=1)[:, None])
    attended = tl.dot(weights.to(dtype), value, input_precision=PRECISION) / tl.sum(weights, axis=1)[:, None]
    out = out_ptr + (first + frame)[:, None] * WIDTH + channel[None, :]
    tl.store(out, attended.to(dtype), mask=in_clip[:, None])


@kernel
def _long_clip_attention_fwd_kernel(
    packed_ptr,
    bounds_ptr,
    out_ptr,
    longest,
    total_frames,
    splits,
    scale,
    HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_FRAMES: tl.constexpr,
    RAGGED: tl.constexpr,
    PRECISION: tl.constexpr,
):
    WIDTH: tl.constexpr = HEADS * HEAD_DIM
    program = tl.program_id(0).to(tl.int64)
    # neighbours share a head's keys
    clip = program // (splits * HEADS)
    channel = program // splits % HEADS * HEAD_DIM + tl.arange(0, HEAD_DIM)
    first, length = clip_extent(bounds_ptr, clip, longest, total_frames, RAGGED)
    dtype = out_ptr.dtype.element_ty
    for block in range(program % splits, tl.cdiv(length, BLOCK_FRAMES), splits):
        frame = block * BLOCK_FRAMES + tl.arange(0, BLOCK_FRAMES)
        in_clip = (frame < length)[:, None]
        # [BLOCK_FRAMES, HEAD_DIM]
        query = packed_ptr + (first + frame)[:, None] * (3 * WIDTH) + channel[None, :]
        query = tl.load(query, mask=in_clip, other=0.0)
        highest = tl.full((BLOCK_FRAMES,), float("-inf"), tl.float32)
        total = tl.zeros((BLOCK_FRAMES,), tl.float32)
        attended = tl.zeros((BLOCK_FRAMES, HEAD_DIM), tl.float32)
        for start in range(0, length, BLOCK_FRAMES):
            other = start + tl.arange(0, BLOCK_FRAMES)
            in_keys = other < length
            key = packed_ptr + (first + other)[:, None] * (3 * WIDTH) + WIDTH + channel[None, :]
            value = tl.load(key + WIDTH, mask=in_keys[:, None], other=0.0)
            key = tl.load(key, mask=in_keys[:, None], other=0.0)
            # [BLOCK_FRAMES, BLOCK_FRAMES]
            scores = tl.dot(query, tl.trans(key), input_precision=PRECISION) * scale
            scores = tl.where(in_keys[None, :], scores, float("-inf"))
            before, highest = highest, tl.maximum(highest, tl.max(scores, axis=1))
            weights = tl.exp2(scores - highest[:, None])
            shrink = tl.exp2(before - highest)
            total = total * shrink + tl.sum(weights, axis=1)
            attended = attended * shrink[:, None]
            attended = tl.dot(weights.to(dtype), value, attended, input_precision=PRECISION)
        out = out_ptr + (first + frame)[:, None] * WIDTH + channel[None, :]
        tl.store(out, (attended / total[:, None]).to(dtype), mask=in_clip)


def is_fused(clips: int, longest: int, head_dim: int, itemsize: int) -> bool:
    """Whether norm, QKV and attention of these clips run as one kernel, a program for each clip and head."""
    small = longest <= FUSED_FRAMES and frame_block(longest) * head_dim <= FUSED_TILE[itemsize]
    return small and clips <= FUSED_CLIPS


@tunable(
    "message_attention",
    fixed=("rows",),
    candidates=every(num_stages=(3, 2, 4)) + every(num_stages=(3,), depth=(32, 64), num_warps=(4, 8)),
)
def fused_tile(longest: int, head_dim: int, itemsize: int) -> Tile:
    """All frames of a clip; a step of depth loads three times HEAD_DIM weight rows, 12 or 24 KB."""
    frames = frame_block(longest)
    row_bytes = 8192 if itemsize == 2 and frames <= 32 else 4096
    depth = min(64, max(16, row_bytes // (head_dim * itemsize)))
    return Tile(rows=frames, depth=depth, num_warps=8 if frames * itemsize > 64 else 4)


@tunable(
    "message_attention_long",
    op="message_attention",
    candidates=listed(
        "rows num_warps num_stages", (64, 4, 2), (16, 2, 2), (16, 4, 2), (32, 4, 2), (64, 8, 2), (64, 4, 3)
    ),
)
def long_tile(head_dim: int, itemsize: int) -> Tile:
    """Square tiles of frames against frames, over the whole head."""
    frames = 64 if itemsize == 2 else min(32, 2048 // head_dim)
    return Tile(rows=frames, num_warps=8 if itemsize == 2 and head_dim > 64 else 4, num_stages=2)


def frame_block(longest: int) -> int:
    """Frames of a tile that holds a whole clip: the tensor cores take 16 at least."""
    return max(16, next_power_of_2(longest))


def clip_count(x: Tensor, cu_frames: Tensor | None, longest: int) -> int:
    """Clips of rows (..., D), without a look at the boundaries."""
    rows = x.numel() // x.shape[-1]
    return rows // max(longest, 1) if cu_frames is None else cu_frames.numel() - 1


def attend_launches(x: Tensor, cu_frames: Tensor | None, heads: int, longest: int, *, positions: bool = False) -> int:
    """Kernels that ``attend_frames`` launches; with ragged clips one clears the frames that belong to none."""
    rows, clips = x.numel() // x.shape[-1], clip_count(x, cu_frames, longest)
    if not rows:
        return 0
    cleared = cu_frames is not None
    if not clips:
        return cleared
    fused = is_fused(clips, longest, x.shape[-1] // heads, x.element_size())
    return cleared + (1 if fused else positions + skinny_launches(rows, norm=True) + 1)


def launches(class_tokens: Tensor, *arguments: Any) -> int:
    """Kernels that ``message_attention_fwd`` launches for its arguments, whose data it does not read (meta tensors do).

    Three up to MAX_ROWS rows; one more for clips that ``is_fused`` does not take, and one more for ragged ones. Above
    MAX_ROWS one more for the residual and, where not fused, for the norm.
    """
    cu_frames, heads, longest, _ = arguments[-4:]
    rows = class_tokens.numel() // class_tokens.shape[-1]
    ends = skinny_launches(rows) + skinny_launches(rows, residual=True)
    return ends + attend_launches(class_tokens, cu_frames, heads, longest)


def key_value_launches(messages: Tensor, *arguments: Any) -> int:
    """Kernels that ``message_key_value_fwd`` launches for its arguments: one up to MAX_ROWS rows, else two."""
    return skinny_launches(messages.numel() // messages.shape[-1], norm=True)


def attend_frames(
    x: Tensor,
    norm: Norm,
    weight: Tensor,
    bias: Tensor,
    cu_frames: Tensor | None,
    heads: int,
    longest: int,
    positions: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Multi-head attention of normalised rows (F, D) among the frames of their clip, before the out-projection.

    Args:
        x: rows (F, D) with unit stride along D.
        norm: in front of the projection.
        weight, bias: packed query, key and value rows (3D, D) and (3D,).
        cu_frames: (clips + 1,) int32, or None: then each ``longest`` rows are a clip.
        heads: attention heads.
        longest: no clip has more frames.
        positions: (longest, D), added to the frames of each clip first; not with ``cu_frames``.

    Returns:
        The attended rows (F, D), and the rows with their positions.
    """
    rows, width = x.shape
    clips = clip_count(x, cu_frames, longest)
    # a frame that belongs to no clip attends to nothing
    allocate = torch.empty if cu_frames is None else torch.zeros
    out = allocate(rows, width, dtype=x.dtype, device=x.device)
    bounds = None if cu_frames is None else cu_frames.contiguous()
    if not (rows and clips):
        return out, x
    with on_device_of(x):
        if is_fused(clips, longest, width // heads, x.element_size()):
            placed = x if positions is None else x.new_empty(rows, width)
            _launch_fused(
                x, norm, as_rows(weight), bias.contiguous(), bounds, heads, clips, longest, positions, placed, out
            )
        else:
            placed = x if positions is None else (x.view(clips, longest, width) + positions).view(rows, width)
            launch_long(skinny_linear(placed, weight, bias, norm=norm), bounds, heads, clips, longest, out)
    return out, placed


def _launch_fused(
    x: Tensor,
    norm: Norm,
    weight: Tensor,
    bias: Tensor,
    bounds: Tensor | None,
    heads: int,
    clips: int,
    longest: int,
    positions: Tensor | None,
    placed: Tensor,
    out: Tensor,
) -> None:
    rows, width = x.shape
    table = None if positions is None else as_rows(positions)
    head_dim = width // heads
    tile = fused_tile(longest, head_dim, x.element_size())
    _message_attention_fwd_kernel[(clips * heads,)](
        message_ptr=x,
        norm_weight_ptr=norm.weight.contiguous(),
        norm_bias_ptr=norm.bias.contiguous(),
        weight_ptr=weight,
        bias_ptr=bias,
        bounds_ptr=bounds,
        positions_ptr=table,
        placed_ptr=placed,
        out_ptr=out,
        longest=longest,
        total_frames=rows,
        message_stride=x.stride(0),
        weight_stride=weight.stride(0),
        positions_stride=0 if table is None else table.stride(0),
        eps=norm.eps,
        scale=head_dim**-0.5 * LOG2_E,
        HEADS=heads,
        HEAD_DIM=head_dim,
        BLOCK_FRAMES=tile.rows,
        BLOCK_DEPTH=tile.depth,
        RAGGED=bounds is not None,
        HAS_POSITIONS=table is not None,
        PRECISION=dot_precision(x),
        num_warps=tile.num_warps,
        num_stages=tile.num_stages,
    )


def launch_long(packed: Tensor, bounds: Tensor | None, heads: int, clips: int, longest: int, out: Tensor) -> None:
    """Attention among the frames of clips of any length, from queries, keys and values (F, 3D) to rows (F, D)."""
    rows, width = out.shape
    head_dim = width // heads
    tile = long_tile(head_dim, out.element_size())
    # ragged clips are split as if they were equally long: a longer one loops
    splits = cdiv(longest if bounds is None else cdiv(rows, clips), tile.rows)
    _long_clip_attention_fwd_kernel[(clips * heads * splits,)](
        packed_ptr=packed,
        bounds_ptr=bounds,
        out_ptr=out,
        longest=longest,
        total_frames=rows,
        splits=splits,
        scale=head_dim**-0.5 * LOG2_E,
        HEADS=heads,
        HEAD_DIM=head_dim,
        BLOCK_FRAMES=tile.rows,
        RAGGED=bounds is not None,
        PRECISION=dot_precision(out),
        num_warps=tile.num_warps,
        num_stages=tile.num_stages,
    )


def message_attention_fwd(
    class_tokens: Tensor,
    fc_weight: Tensor,
    fc_bias: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    in_proj_weight: Tensor,
    in_proj_bias: Tensor,
    out_weight: Tensor,
    out_bias: Tensor,
    cu_frames: Tensor | None,
    heads: int,
    longest: int,
    eps: float,
) -> Tensor:
    """Launch the forward pass: messages in the shape of the class tokens."""
    message = skinny_linear(as_rows(class_tokens), fc_weight, fc_bias)
    norm = Norm(norm_weight, norm_bias, eps)
    attended, _ = attend_frames(message, norm, in_proj_weight, in_proj_bias, cu_frames, heads, longest)
    return skinny_linear(attended, out_weight, out_bias, residual=message).view(class_tokens.shape)


def message_key_value_fwd(
    messages: Tensor, norm_weight: Tensor, norm_bias: Tensor, weight: Tensor, bias: Tensor, eps: float
) -> Tensor:
    """Launch the key and value projection of normalised messages (..., D): (..., 2D)."""
    packed = skinny_linear(as_rows(messages), weight, bias, norm=Norm(norm_weight, norm_bias, eps))
    return packed.view(*messages.shape[:-1], weight.shape[0])
