"""Frames to tokens: pixels of any layout normalised, gathered into patches, projected, with class and positions."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from xclip_fast.kernels._launch import as_rows, on_device_of
from xclip_fast.kernels.layer_norm import layer_norm_fwd
from xclip_fast.kernels.skinny_linear import dot_precision
from xclip_fast.tuning import tunable


class Tile(NamedTuple):
    """What one program computes, tokens by columns in steps of depth, and how it is launched."""

    rows: int
    columns: int
    depth: int
    warps: int
    stages: int


@tunable("patch_embed")
def tile(rows: int, dtype: torch.dtype) -> Tile:
    """Small tiles where the tokens of a video or two would leave multiprocessors without work."""
    if dtype == torch.float32:
        return Tile(rows=32, columns=64, depth=32, warps=4, stages=2)
    if rows <= 4096:
        return Tile(rows=64, columns=64, depth=64, warps=4, stages=3)
    return Tile(rows=128, columns=128, depth=32, warps=8, stages=3)


@triton.jit
def _patch_embed_fwd_kernel(
    frames_ptr,
    weight_ptr,
    class_ptr,
    positions_ptr,
    tokens_ptr,
    rows,
    tokens_of_frame,
    grid_width,
    frame_stride,
    row_stride,
    column_stride,
    channel_stride,
    positions_stride,
    scale_red,
    scale_green,
    scale_blue,
    offset_red,
    offset_green,
    offset_blue,
    WIDTH: tl.constexpr,
    PATCH: tl.constexpr,
    IS_BYTES: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
    BLOCK_DEPTH: tl.constexpr,
    PRECISION: tl.constexpr,
):
    PIXELS: tl.constexpr = PATCH * PATCH
    DEPTH: tl.constexpr = 3 * PIXELS
    program = tl.program_id(0).to(tl.int64)
    row_blocks = tl.cdiv(rows, BLOCK_ROWS)
    row = program % row_blocks * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    column = program // row_blocks * BLOCK_COLUMNS + tl.arange(0, BLOCK_COLUMNS)
    in_row = row < rows
    in_width = column < WIDTH
    token = row % tokens_of_frame
    is_patch = in_row & (token > 0)
    # the class token stands in the place of a patch: its row of the product is dropped
    patch = tl.maximum(token - 1, 0)
    start = row // tokens_of_frame * frame_stride
    start += (patch // grid_width * row_stride + patch % grid_width * column_stride) * PATCH
    total = tl.zeros((BLOCK_ROWS, BLOCK_COLUMNS), tl.float32)
    for depth in range(0, DEPTH, BLOCK_DEPTH):
        k = depth + tl.arange(0, BLOCK_DEPTH)
        in_depth = k < DEPTH
        channel, pixel = k // PIXELS, k % PIXELS
        offset = channel.to(tl.int64) * channel_stride
        offset += (pixel // PATCH).to(tl.int64) * row_stride + (pixel % PATCH).to(tl.int64) * column_stride
        # [BLOCK_ROWS, BLOCK_DEPTH]
        x = tl.load(frames_ptr + start[:, None] + offset[None, :], mask=is_patch[:, None] & in_depth[None, :], other=0)
        if IS_BYTES:
            scale = tl.where(channel == 0, scale_red, tl.where(channel == 1, scale_green, scale_blue))
            shift = tl.where(channel == 0, offset_red, tl.where(channel == 1, offset_green, offset_blue))
            x = x.to(tl.float32) * scale[None, :] + shift[None, :]
        # [BLOCK_COLUMNS, BLOCK_DEPTH]
        weight = weight_ptr + column[:, None] * DEPTH + k[None, :]
        weight = tl.load(weight, mask=in_width[:, None] & in_depth[None, :], other=0.0)
        total = tl.dot(x.to(weight.dtype), tl.trans(weight), total, input_precision=PRECISION)
    # [BLOCK_ROWS, BLOCK_COLUMNS]
    class_token = tl.load(class_ptr + column, mask=in_width, other=0.0).to(tl.float32)
    total = tl.where((token == 0)[:, None], class_token[None, :], total)
    inside = in_row[:, None] & in_width[None, :]
    position = positions_ptr + token[:, None] * positions_stride + column[None, :]
    total += tl.load(position, mask=inside, other=0.0).to(tl.float32)
    tokens = tokens_ptr + row[:, None] * WIDTH + column[None, :]
    tl.store(tokens, total.to(tokens_ptr.dtype.element_ty), mask=inside)


def patch_embed_fwd(
    pixels: Tensor,
    weight: Tensor,
    class_embedding: Tensor,
    positions: Tensor,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    eps: float,
    affine: Sequence[Sequence[float]],
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    """Launch the forward pass.

    Args:
        pixels: frames viewed as (F, H, W, 3), any strides.
        weight, class_embedding, positions, norm_weight, norm_bias, eps: as in ``ops.patch_embed``.
        affine: three factors and three summands that normalise bytes; floating point pixels need none.
        dtype: of the tokens.

    Returns:
        Tokens (F, 1 + N, D), and what they were before their norm (the same tensor without one).
    """
    width, _, patch, _ = weight.shape
    count, tokens_of_frame = pixels.shape[0], positions.shape[0]
    is_bytes = pixels.dtype == torch.uint8
    scale, offset = affine if is_bytes else ((1.0,) * 3, (0.0,) * 3)
    table = as_rows(positions)
    wide = torch.promote_types(weight.dtype, dtype)
    embedded = torch.empty(count, tokens_of_frame, width, dtype=wide, device=weight.device)
    rows = count * tokens_of_frame
    block = tile(rows, weight.dtype)
    if rows:
        with on_device_of(weight):
            _patch_embed_fwd_kernel[(triton.cdiv(rows, block.rows) * triton.cdiv(width, block.columns),)](
                frames_ptr=pixels,
                weight_ptr=weight.contiguous(),
                class_ptr=class_embedding.contiguous(),
                positions_ptr=table,
                tokens_ptr=embedded,
                rows=rows,
                tokens_of_frame=tokens_of_frame,
                grid_width=pixels.shape[2] // patch,
                frame_stride=pixels.stride(0),
                row_stride=pixels.stride(1),
                column_stride=pixels.stride(2),
                channel_stride=pixels.stride(3),
                positions_stride=table.stride(0),
                scale_red=scale[0],
                scale_green=scale[1],
                scale_blue=scale[2],
                offset_red=offset[0],
                offset_green=offset[1],
                offset_blue=offset[2],
                WIDTH=width,
                PATCH=patch,
                IS_BYTES=is_bytes,
                BLOCK_ROWS=block.rows,
                BLOCK_COLUMNS=block.columns,
                BLOCK_DEPTH=block.depth,
                PRECISION=dot_precision(weight),
                num_warps=block.warps,
                num_stages=block.stages,
            )
    if norm_weight is None or norm_bias is None:
        return embedded.to(dtype), embedded
    normed = layer_norm_fwd(embedded, norm_weight, norm_bias, None, None, eps)[0]
    return normed.to(dtype), embedded
