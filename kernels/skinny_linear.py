"""Linear layers on few rows: norm before, QuickGELU or a residual after, in one launch that spreads the weights."""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from xclip_fast.kernels._launch import as_rows, cdiv, kernel, next_power_of_2, on_device_of
from xclip_fast.kernels._tensors import dot_precision
from xclip_fast.kernels.layer_norm import layer_norm_fwd
from xclip_fast.tuning import Tile, listed, tunable

# more rows than this fill the GPU in PyTorch's own GEMM
MAX_ROWS = 128
# fewer programs than this leave most multiprocessors without work
ENOUGH_PROGRAMS = 96


class Norm(NamedTuple):
    """A layer norm in front of a GEMM: weight and bias (width,), and what is added to the variance."""

    weight: Tensor
    bias: Tensor
    eps: float


@triton.jit
def row_statistics(x_ptr, start, in_row, eps, WIDTH: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK_DEPTH: tl.constexpr):
    """Mean and reciprocal deviation of rows that begin at the offsets ``start``: float32, in two passes."""
    # [BLOCK_ROWS, BLOCK_DEPTH]
    total = tl.zeros((BLOCK_ROWS, BLOCK_DEPTH), tl.float32)
    for depth in range(0, WIDTH, BLOCK_DEPTH):
        column = depth + tl.arange(0, BLOCK_DEPTH)
        inside = in_row[:, None] & (column < WIDTH)[None, :]
        total += tl.load(x_ptr + start[:, None] + column[None, :], mask=inside, other=0.0).to(tl.float32)
    mean = tl.sum(total, axis=1) / WIDTH
    total = tl.zeros((BLOCK_ROWS, BLOCK_DEPTH), tl.float32)
    for depth in range(0, WIDTH, BLOCK_DEPTH):
        column = depth + tl.arange(0, BLOCK_DEPTH)
        inside = in_row[:, None] & (column < WIDTH)[None, :]
        x = tl.load(x_ptr + start[:, None] + column[None, :], mask=inside, other=0.0).to(tl.float32)
        # the padding must not enter the variance: it is not at the mean
        centred = tl.where(inside, x - mean[:, None], 0.0)
        total += centred * centred
    return mean, 1.0 / tl.sqrt(tl.sum(total, axis=1) / WIDTH + eps)


@triton.jit
def normalised(x, mean, rstd, weight_ptr, bias_ptr, column, WIDTH: tl.constexpr):
    """A tile of layer norm in the dtype of ``x``; columns beyond the width come out as zero."""
    in_width = column < WIDTH
    weight = tl.load(weight_ptr + column, mask=in_width, other=0.0).to(tl.float32)
    bias = tl.load(bias_ptr + column, mask=in_width, other=0.0).to(tl.float32)
    return ((x.to(tl.float32) - mean[:, None]) * rstd[:, None] * weight[None, :] + bias[None, :]).to(x.dtype)


@kernel
def _skinny_linear_fwd_kernel(
    x_ptr,
    norm_weight_ptr,
    norm_bias_ptr,
    weight_ptr,
    bias_ptr,
    residual_ptr,
    pooled_ptr,
    out_ptr,
    rows,
    x_stride,
    weight_stride,
    residual_stride,
    pooled_stride,
    eps,
    WIDTH: tl.constexpr,
    OUT_WIDTH: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
    BLOCK_DEPTH: tl.constexpr,
    HAS_NORM: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
    QUICK_GELU: tl.constexpr,
    POOL: tl.constexpr,
    PRECISION: tl.constexpr,
):
    program = tl.program_id(0).to(tl.int64)
    row_blocks = tl.cdiv(rows, BLOCK_ROWS)
    # neighbours read the same weights
    row = program % row_blocks * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    out_column = program // row_blocks * BLOCK_COLUMNS + tl.arange(0, BLOCK_COLUMNS)
    in_row = row < rows
    in_out = out_column < OUT_WIDTH
    start = row * x_stride
    if HAS_NORM:
        mean, rstd = row_statistics(x_ptr, start, in_row, eps, WIDTH, BLOCK_ROWS, BLOCK_DEPTH)
    total = tl.zeros((BLOCK_ROWS, BLOCK_COLUMNS), tl.float32)
    for depth in range(0, WIDTH, BLOCK_DEPTH):
        column = depth + tl.arange(0, BLOCK_DEPTH)
        in_width = (column < WIDTH)[None, :]
        # [BLOCK_ROWS, BLOCK_DEPTH]
        x = tl.load(x_ptr + start[:, None] + column[None, :], mask=in_row[:, None] & in_width, other=0.0)
        if HAS_NORM:
            x = normalised(x, mean, rstd, norm_weight_ptr, norm_bias_ptr, column, WIDTH)
        # [BLOCK_COLUMNS, BLOCK_DEPTH]
        weight = weight_ptr + out_column[:, None] * weight_stride + column[None, :]
        weight = tl.load(weight, mask=in_out[:, None] & in_width, other=0.0)
        total = tl.dot(x, tl.trans(weight), total, input_precision=PRECISION)
    total += tl.load(bias_ptr + out_column, mask=in_out, other=0.0).to(tl.float32)[None, :]
    if QUICK_GELU:
        # x * sigmoid(1.702 x)
        total = total / (1.0 + tl.exp2(total * -2.4554669595930157))
    inside = in_row[:, None] & in_out[None, :]
    if HAS_RESIDUAL:
        residual = residual_ptr + row[:, None] * residual_stride + out_column[None, :]
        total += tl.load(residual, mask=inside, other=0.0).to(tl.float32)
    if POOL > 1:
        pooled = pooled_ptr + row[:, None] * pooled_stride + out_column[None, :]
        total += tl.load(pooled, mask=inside, other=0.0).to(tl.float32)
        # a block holds whole clips: [BLOCK_ROWS / POOL, POOL, BLOCK_COLUMNS]
        total = tl.sum(tl.reshape(total, (BLOCK_ROWS // POOL, POOL, BLOCK_COLUMNS)), axis=1) / POOL
        rows //= POOL
        row = program % row_blocks * (BLOCK_ROWS // POOL) + tl.arange(0, BLOCK_ROWS // POOL)
        inside = (row < rows)[:, None] & in_out[None, :]
    out = out_ptr + row[:, None] * OUT_WIDTH + out_column[None, :]
    tl.store(out, total.to(out_ptr.dtype.element_ty), mask=inside)


@tunable(
    "skinny_linear",
    op="message_key_value",
    candidates=listed(
        "rows columns depth num_warps num_stages",
        (16, 32, 128, 4, 4),
        (16, 32, 128, 4, 3),
        (16, 64, 128, 4, 3),
        (16, 32, 256, 4, 2),
        (16, 16, 128, 4, 4),
        (32, 32, 128, 4, 4),
        (64, 32, 64, 4, 4),
        (16, 64, 64, 4, 4),
    ),
)
def forward_tile(rows: int, width: int, out_width: int, itemsize: int) -> Tile:
    """The tallest tile that still gives every multiprocessor work: tall tiles read the weights less often."""
    columns = 32
    # rows off the 16-byte grid are read number by number, which takes registers
    aligned = width * itemsize % 16 == 0
    height = min(64, max(16, next_power_of_2(rows))) if aligned else 16
    while height > 16 and cdiv(rows, height) * cdiv(out_width, columns) < ENOUGH_PROGRAMS:
        height //= 2
    wide = itemsize > 2
    # tall tiles with a norm would spill at twice the depth
    depth = 64 if wide or height > 16 else 128
    return Tile(height, columns, depth, num_warps=8 if wide else 4, num_stages=4)


def skinny_launches(rows: int, *, norm: bool = False, residual: bool = False, quick_gelu: bool = False) -> int:
    """Kernels that ``skinny_linear`` launches."""
    if rows <= MAX_ROWS:
        return min(rows, 1)
    return 1 + norm + (residual and not quick_gelu)


def pools(rows: int, width: int, out_width: int, itemsize: int, frames: int) -> bool:
    """Whether ``skinny_linear_mean`` means clips of this many frames in the GEMM's own launch."""
    if rows > MAX_ROWS or frames < 2:
        return False
    return forward_tile(rows, width, out_width, itemsize).rows % frames == 0


def skinny_linear_mean(
    x: Tensor, weight: Tensor, bias: Tensor, *, residual: Tensor, pooled_with: Tensor, frames: int
) -> Tensor:
    """Mean over each ``frames`` rows of ``pooled_with + residual + linear(x)``: rows (M, K) to (M / frames, N)."""
    out_width = weight.shape[0]
    if pools(x.shape[0], x.shape[1], out_width, x.element_size(), frames):
        return _launch(as_rows(x), as_rows(weight), bias.contiguous(), None, residual, False, pooled_with, frames)
    out = skinny_linear(x, weight, bias, residual=residual).add_(pooled_with)
    return out.view(-1, frames, out_width).mean(1)


def skinny_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    *,
    norm: Norm | None = None,
    residual: Tensor | None = None,
    quick_gelu: bool = False,
) -> Tensor:
    """``[residual +] [quick_gelu](linear([norm] x))`` on rows (M, K): (M, N) in the dtype of ``x``, sums in float32.

    One launch up to MAX_ROWS rows. Above, the norm, PyTorch's GEMM and the residual are launched one by one; only
    with QuickGELU does the GEMM stay here, since another pass over its result costs more than it gains.
    """
    if norm is not None and x.shape[0] > MAX_ROWS:
        x, norm = layer_norm_fwd(x, norm.weight, norm.bias, None, None, norm.eps)[0], None
    if x.shape[0] > MAX_ROWS and not quick_gelu:
        out = torch.addmm(bias, x, weight.t())
        return out if residual is None else out.add_(residual)
    return _launch(as_rows(x), as_rows(weight), bias.contiguous(), norm, residual, quick_gelu)


def _launch(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    norm: Norm | None,
    residual: Tensor | None,
    quick_gelu: bool,
    pooled_with: Tensor | None = None,
    pool: int = 1,
) -> Tensor:
    rows, width = x.shape
    out_width = weight.shape[0]
    out = x.new_empty(rows // pool, out_width)
    pooled = None if pooled_with is None else as_rows(pooled_with)
    added = None if residual is None else as_rows(residual)
    tile = forward_tile(rows, width, out_width, x.element_size())
    if rows:
        with on_device_of(x):
            _skinny_linear_fwd_kernel[(cdiv(rows, tile.rows) * cdiv(out_width, tile.columns),)](
                x_ptr=x,
                norm_weight_ptr=None if norm is None else norm.weight.contiguous(),
                norm_bias_ptr=None if norm is None else norm.bias.contiguous(),
                weight_ptr=weight,
                bias_ptr=bias,
                residual_ptr=added,
                pooled_ptr=pooled,
                out_ptr=out,
                rows=rows,
                x_stride=x.stride(0),
                weight_stride=weight.stride(0),
                residual_stride=0 if added is None else added.stride(0),
                pooled_stride=0 if pooled is None else pooled.stride(0),
                eps=0.0 if norm is None else norm.eps,
                WIDTH=width,
                OUT_WIDTH=out_width,
                BLOCK_ROWS=tile.rows,
                BLOCK_COLUMNS=tile.columns,
                BLOCK_DEPTH=tile.depth,
                HAS_NORM=norm is not None,
                HAS_RESIDUAL=added is not None,
                QUICK_GELU=quick_gelu,
                POOL=pool,
                PRECISION=dot_precision(x),
                num_warps=tile.num_warps,
                num_stages=tile.num_stages,
            )
    return out
