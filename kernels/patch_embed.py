"""Frames to tokens: pixels of any layout normalised, gathered into patches, projected, with class and positions."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton.language as tl
from torch import Tensor

from xclip_fast.kernels._launch import as_rows, cdiv, kernel, next_power_of_2, on_device_of
from xclip_fast.kernels.layer_norm import forward_tile

PIECE = 8  # columns that rows of patches are filled up to a multiple of: libraries want rows at 16 bytes
GATHERED = 16, 128  # the most rows, and the columns, of a program of the gather


@kernel
def _patch_rows_fwd_kernel(
    frames_ptr,
    rows_ptr,
    grid_height,
    grid_width,
    frame_stride,
    row_stride,
    column_stride,
    channel_stride,
    scale_red,
    scale_green,
    scale_blue,
    offset_red,
    offset_green,
    offset_blue,
    PATCH: tl.constexpr,
    WIDTH: tl.constexpr,
    IS_BYTES: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_WIDTH: tl.constexpr,
):
    PIXELS: tl.constexpr = PATCH * PATCH
    COLUMN_BLOCKS: tl.constexpr = (WIDTH + BLOCK_WIDTH - 1) // BLOCK_WIDTH
    program = tl.program_id(0).to(tl.int64)
    k = (program % COLUMN_BLOCKS).to(tl.int32) * BLOCK_WIDTH + tl.arange(0, BLOCK_WIDTH)
    # patches side by side: where they are is found once, and not by each thread for each row
    row_blocks = tl.cdiv(grid_width, BLOCK_ROWS)
    block = program // COLUMN_BLOCKS
    band = block // row_blocks
    right = (block % row_blocks).to(tl.int32) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    start = band // grid_height * frame_stride + band % grid_height * PATCH * row_stride
    start += right.to(tl.int64) * PATCH * column_stride
    channel, pixel = k // PIXELS, k % PIXELS
    offset = channel.to(tl.int64) * channel_stride
    offset += (pixel // PATCH).to(tl.int64) * row_stride + (pixel % PATCH).to(tl.int64) * column_stride
    # [BLOCK_WIDTH, BLOCK_ROWS]: where neither pixels nor patches touch, neighbouring threads take the first dimension
    in_patch, in_row = (k < 3 * PIXELS)[:, None], (right < grid_width)[None, :]
    x = tl.load(frames_ptr + offset[:, None] + start[None, :], mask=in_patch & in_row, other=0)
    if IS_BYTES:
        scale = tl.where(channel == 0, scale_red, tl.where(channel == 1, scale_green, scale_blue))
        shift = tl.where(channel == 0, offset_red, tl.where(channel == 1, offset_green, offset_blue))
        x = tl.where(in_patch, x.to(tl.float32) * scale[:, None] + shift[:, None], 0.0)
    out = rows_ptr + k[:, None] + (band * grid_width + right)[None, :] * WIDTH
    tl.store(out, x.to(rows_ptr.dtype.element_ty), mask=(k < WIDTH)[:, None] & in_row)


@kernel
def _patch_tokens_fwd_kernel(
    product_ptr,
    scale_ptr,
    class_ptr,
    table_ptr,
    norm_weight_ptr,
    norm_bias_ptr,
    tokens_ptr,
    embedded_ptr,
    frames,
    tokens_of_frame,
    table_stride,
    eps,
    WIDTH: tl.constexpr,
    BLOCK_FRAMES: tl.constexpr,
    BLOCK_WIDTH: tl.constexpr,
    HAS_SCALE: tl.constexpr,
    HAS_CLASS: tl.constexpr,
    HAS_NORM: tl.constexpr,
    SAVE_EMBEDDED: tl.constexpr,
):
    program = tl.program_id(0)
    # a program has one token of several frames, which share their row of the table
    token = program % tokens_of_frame
    frame = program // tokens_of_frame * BLOCK_FRAMES + tl.arange(0, BLOCK_FRAMES)
    column = tl.arange(0, BLOCK_WIDTH)
    in_width = column < WIDTH
    inside = (frame < frames)[:, None] & in_width[None, :]
    added = tl.load(table_ptr + token.to(tl.int64) * table_stride + column, mask=in_width, other=0.0).to(tl.float32)
    if HAS_CLASS:
        added += tl.load(class_ptr + column, mask=in_width & (token == 0), other=0.0).to(tl.float32)
    # [BLOCK_FRAMES, BLOCK_WIDTH]
    patch = frame.to(tl.int64) * (tokens_of_frame - 1) + (token - 1)
    x = tl.load(product_ptr + patch[:, None] * WIDTH + column[None, :], mask=inside & (token > 0), other=0.0)
    x = x.to(tl.float32)
    if HAS_SCALE:
        x *= tl.load(scale_ptr + column, mask=in_width, other=0.0)[None, :]
    x += added[None, :]
    out = (frame.to(tl.int64) * tokens_of_frame + token)[:, None] * WIDTH + column[None, :]
    if SAVE_EMBEDDED:
        tl.store(embedded_ptr + out, x.to(embedded_ptr.dtype.element_ty), mask=inside)
    if HAS_NORM:
        mean = tl.sum(x, axis=1) / WIDTH
        # the padding must not enter the variance: it is not at the mean
        centred = tl.where(in_width[None, :], x - mean[:, None], 0.0)
        rstd = 1.0 / tl.sqrt(tl.sum(centred * centred, axis=1) / WIDTH + eps)
        weight = tl.load(norm_weight_ptr + column, mask=in_width, other=0.0).to(tl.float32)
        bias = tl.load(norm_bias_ptr + column, mask=in_width, other=0.0).to(tl.float32)
        x = centred * rstd[:, None] * weight[None, :] + bias[None, :]
    tl.store(tokens_ptr + out, x.to(tokens_ptr.dtype.element_ty), mask=inside)


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
    save_embedded: bool = False,
) -> tuple[Tensor, Tensor]:
    """Launch the forward pass: patches gathered into rows, a GEMM of PyTorch's, and what follows it.

    Args:
        pixels: frames viewed as (F, H, W, 3), any strides.
        weight, class_embedding, positions, norm_weight, norm_bias, eps: as in ``ops.patch_embed``.
        affine: three factors and three summands that normalise bytes; floating point pixels need none.
        dtype: of the tokens.
        save_embedded: whether to return what the tokens were before their norm.

    Returns:
        Tokens (F, 1 + N, D), and the tokens before their norm, empty unless saved.
    """
    wide = torch.promote_types(weight.dtype, dtype)
    matrix = weight.flatten(1)
    if missing := -matrix.shape[1] % PIECE:
        # no columns at all would be a copy
        matrix = torch.nn.functional.pad(matrix, (0, missing))
    rows = patch_rows(pixels, weight.shape[-1], matrix.shape[1], affine, weight.dtype)
    # with a result to write to, so that autocast leaves the dtypes alone
    product = torch.mm(rows, matrix.T, out=rows.new_empty(len(rows), len(matrix)))
    norm = norm_weight, norm_bias, eps
    return patch_tokens(product, None, class_embedding, positions, *norm, len(pixels), dtype, wide, save_embedded)


def patch_rows(pixels: Tensor, patch: int, width: int, affine: Sequence[Sequence[float]], dtype: torch.dtype) -> Tensor:
    """Patches of frames viewed as (F, H, W, 3) as rows (F N, width) in the order of the weights.

    Bytes are normalised; zeros fill rows of 3 P P numbers up.
    """
    (count, height, across, _), is_bytes = pixels.shape, pixels.dtype == torch.uint8
    grid_height, grid_width = height // patch, across // patch
    scale, offset = affine if is_bytes else ((1.0,) * 3, (0.0,) * 3)
    rows = pixels.new_empty(count * grid_height * grid_width, width, dtype=dtype)
    most, block_width = GATHERED
    block_rows = min(most, next_power_of_2(grid_width))
    blocks = cdiv(grid_width, block_rows) * cdiv(width, block_width)
    if count:
        with on_device_of(pixels):
            _patch_rows_fwd_kernel[(count * grid_height * blocks,)](
                frames_ptr=pixels,
                rows_ptr=rows,
                grid_height=grid_height,
                grid_width=grid_width,
                frame_stride=pixels.stride(0),
                row_stride=pixels.stride(1),
                column_stride=pixels.stride(2),
                channel_stride=pixels.stride(3),
                scale_red=scale[0],
                scale_green=scale[1],
                scale_blue=scale[2],
                offset_red=offset[0],
                offset_green=offset[1],
                offset_blue=offset[2],
                PATCH=patch,
                WIDTH=width,
                IS_BYTES=is_bytes,
                BLOCK_ROWS=block_rows,
                BLOCK_WIDTH=block_width,
                num_warps=4,
            )
    return rows


def patch_tokens(
    product: Tensor,
    scale: Tensor | None,
    class_embedding: Tensor | None,
    table: Tensor,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    eps: float,
    frames: int,
    dtype: torch.dtype,
    wide: torch.dtype,
    save_embedded: bool,
) -> tuple[Tensor, Tensor]:
    """Rows of the GEMM with the table added, class tokens before them, and the norm.

    Args:
        product: (F N, D), contiguous.
        scale: float32 (D,) to multiply it by, or None.
        class_embedding: (D,), or None where the table holds it.
        table: (1 + N, D), added to the tokens of each frame.
        norm_weight, norm_bias, eps: as in ``ops.patch_embed``.
        frames: F.
        dtype: of the tokens.
        wide: of what they were before their norm.
        save_embedded: whether to return that.

    Returns:
        Tokens (F, 1 + N, D), and the tokens before their norm, empty unless saved.
    """
    table = as_rows(table)
    tokens_of_frame, width = table.shape
    tokens = product.new_empty(frames, tokens_of_frame, width, dtype=dtype)
    embedded = product.new_empty(tokens.shape if save_embedded else 0, dtype=wide)
    tile = forward_tile(width)
    if frames:
        with on_device_of(product):
            _patch_tokens_fwd_kernel[(tokens_of_frame * cdiv(frames, tile.rows),)](
                product_ptr=product,
                scale_ptr=scale,
                class_ptr=None if class_embedding is None else class_embedding.contiguous(),
                table_ptr=table,
                norm_weight_ptr=None if norm_weight is None else norm_weight.contiguous(),
                norm_bias_ptr=None if norm_bias is None else norm_bias.contiguous(),
                tokens_ptr=tokens,
                embedded_ptr=embedded,
                frames=frames,
                tokens_of_frame=tokens_of_frame,
                table_stride=table.stride(0),
                eps=eps,
                WIDTH=width,
                BLOCK_FRAMES=tile.rows,
                BLOCK_WIDTH=tile.columns,
                HAS_SCALE=scale is not None,
                HAS_CLASS=class_embedding is not None,
                HAS_NORM=norm_weight is not None,
                SAVE_EMBEDDED=save_embedded,
                num_warps=tile.num_warps,
                num_stages=tile.num_stages,
            )
    return tokens, embedded
