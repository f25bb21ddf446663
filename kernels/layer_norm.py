"""Layer norm: forward with a residual or constant added first, backward with the stream's gradient added last."""

from __future__ import annotations

import torch
import triton.language as tl
from torch import Tensor

from xclip_fast.kernels._launch import as_rows, cdiv, contiguous_like, kernel, next_power_of_2, on_device_of
from xclip_fast.tuning import Tile, every, tunable

# a program of the backward pass walks over many blocks of rows and writes one partial sum
BACKWARD_PROGRAMS = 512


@kernel
def _layer_norm_fwd_kernel(
    x_ptr,
    residual_ptr,
    constant_ptr,
    weight_ptr,
    bias_ptr,
    normed_ptr,
    stream_ptr,
    mean_ptr,
    rstd_ptr,
    rows,
    x_stride,
    residual_stride,
    eps,
    WIDTH: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_WIDTH: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
    HAS_CONSTANT: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    column = tl.arange(0, BLOCK_WIDTH)
    in_row = row < rows
    in_width = column < WIDTH
    inside = in_row[:, None] & in_width[None, :]
    # [BLOCK_ROWS, BLOCK_WIDTH]
    x = tl.load(x_ptr + row[:, None] * x_stride + column[None, :], mask=inside, other=0.0).to(tl.float32)
    out = row[:, None] * WIDTH + column[None, :]
    if HAS_RESIDUAL:
        residual = residual_ptr + row[:, None] * residual_stride + column[None, :]
        x += tl.load(residual, mask=inside, other=0.0).to(tl.float32)
        tl.store(stream_ptr + out, x.to(stream_ptr.dtype.element_ty), mask=inside)
    if HAS_CONSTANT:
        x += tl.load(constant_ptr + column, mask=in_width, other=0.0).to(tl.float32)[None, :]
    mean = tl.sum(x, axis=1) / WIDTH
    # the padding must not enter the variance: it is not at the mean
    centred = tl.where(in_width[None, :], x - mean[:, None], 0.0)
    rstd = 1.0 / tl.sqrt(tl.sum(centred * centred, axis=1) / WIDTH + eps)
    weight = tl.load(weight_ptr + column, mask=in_width, other=0.0).to(tl.float32)
    bias = tl.load(bias_ptr + column, mask=in_width, other=0.0).to(tl.float32)
    normed = centred * rstd[:, None] * weight[None, :] + bias[None, :]
    tl.store(normed_ptr + out, normed.to(normed_ptr.dtype.element_ty), mask=inside)
    tl.store(mean_ptr + row, mean, mask=in_row)
    tl.store(rstd_ptr + row, rstd, mask=in_row)


@kernel
def _layer_norm_bwd_kernel(
    grad_normed_ptr,
    grad_stream_ptr,
    stream_ptr,
    constant_ptr,
    weight_ptr,
    mean_ptr,
    rstd_ptr,
    grad_x_ptr,
    partial_ptr,
    rows,
    grad_normed_stride,
    grad_stream_stride,
    stream_stride,
    programs,
    WIDTH: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_WIDTH: tl.constexpr,
    HAS_GRAD_STREAM: tl.constexpr,
    HAS_CONSTANT: tl.constexpr,
):
    program = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK_WIDTH)
    in_width = column < WIDTH
    weight = tl.load(weight_ptr + column, mask=in_width, other=0.0).to(tl.float32)
    grad_weight = tl.zeros((BLOCK_WIDTH,), tl.float32)
    grad_bias = tl.zeros((BLOCK_WIDTH,), tl.float32)
    grad_constant = tl.zeros((BLOCK_WIDTH,), tl.float32)
    for block in range(program, tl.cdiv(rows, BLOCK_ROWS), programs):
        row = tl.cast(block, tl.int64) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
        in_row = row < rows
        inside = in_row[:, None] & in_width[None, :]
        mean = tl.load(mean_ptr + row, mask=in_row, other=0.0)
        rstd = tl.load(rstd_ptr + row, mask=in_row, other=0.0)
        # [BLOCK_ROWS, BLOCK_WIDTH]
        x = tl.load(stream_ptr + row[:, None] * stream_stride + column[None, :], mask=inside, other=0.0).to(tl.float32)
        if HAS_CONSTANT:
            x += tl.load(constant_ptr + column, mask=in_width, other=0.0).to(tl.float32)[None, :]
        grad = tl.load(grad_normed_ptr + row[:, None] * grad_normed_stride + column[None, :], mask=inside, other=0.0)
        grad = grad.to(tl.float32)
        normalised = tl.where(inside, (x - mean[:, None]) * rstd[:, None], 0.0)
        weighted = grad * weight[None, :]
        along_mean = tl.sum(weighted, axis=1) / WIDTH
        along_x = tl.sum(weighted * normalised, axis=1) / WIDTH
        grad_x = (weighted - along_mean[:, None] - normalised * along_x[:, None]) * rstd[:, None]
        grad_weight += tl.sum(grad * normalised, axis=0)
        grad_bias += tl.sum(grad, axis=0)
        if HAS_CONSTANT:
            grad_constant += tl.sum(tl.where(inside, grad_x, 0.0), axis=0)
        if HAS_GRAD_STREAM:
            grad_stream = grad_stream_ptr + row[:, None] * grad_stream_stride + column[None, :]
            grad_x += tl.load(grad_stream, mask=inside, other=0.0).to(tl.float32)
        out = row[:, None] * WIDTH + column[None, :]
        tl.store(grad_x_ptr + out, grad_x.to(grad_x_ptr.dtype.element_ty), mask=inside)
    # one row of partial sums a program, added up in a fixed order: no atomics
    partial = partial_ptr + program * 3 * WIDTH + column
    tl.store(partial, grad_weight, mask=in_width)
    tl.store(partial + WIDTH, grad_bias, mask=in_width)
    tl.store(partial + 2 * WIDTH, grad_constant, mask=in_width)


@tunable("layer_norm", fixed=("columns",), candidates=every(num_warps=(4, 8), rows=(4, 1, 2, 8)))
def forward_tile(width: int) -> Tile:
    """Whole rows: wide ones alone, narrow ones four at a time."""
    columns = next_power_of_2(width)
    return Tile(rows=4 if columns <= 1024 else 1, columns=columns)


@tunable(
    "layer_norm_bwd",
    op="layer_norm",
    backward=True,
    fixed=("columns",),
    candidates=every(num_warps=(4, 8), rows=(4, 1, 2, 8)),
)
def backward_tile(width: int) -> Tile:
    """Half the rows: the sums over all rows of a program are held beside them, and more of both would spill."""
    tile = forward_tile.default(width)
    return tile._replace(rows=max(1, tile.rows // 2))


def layer_norm_fwd(
    x: Tensor, weight: Tensor, bias: Tensor, residual: Tensor | None, constant: Tensor | None, eps: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Launch the forward pass: normed, stream (empty without a residual), mean and rstd."""
    flat = as_rows(x)
    rows, width = flat.shape
    added = None if residual is None else as_rows(residual)
    normed = contiguous_like(x)
    stream = x.new_empty(0) if residual is None else contiguous_like(x)
    mean = x.new_empty(rows, dtype=torch.float32)
    rstd = torch.empty_like(mean)
    tile = forward_tile(width)
    if rows:
        with on_device_of(x):
            _layer_norm_fwd_kernel[(cdiv(rows, tile.rows),)](
                x_ptr=flat,
                residual_ptr=added,
                constant_ptr=None if constant is None else constant.contiguous(),
                weight_ptr=weight.contiguous(),
                bias_ptr=bias.contiguous(),
                normed_ptr=normed,
                stream_ptr=stream,
                mean_ptr=mean,
                rstd_ptr=rstd,
                rows=rows,
                x_stride=flat.stride(0),
                residual_stride=0 if added is None else added.stride(0),
                eps=eps,
                WIDTH=width,
                BLOCK_ROWS=tile.rows,
                BLOCK_WIDTH=tile.columns,
                HAS_RESIDUAL=added is not None,
                HAS_CONSTANT=constant is not None,
                num_warps=tile.num_warps,
                num_stages=tile.num_stages,
            )
    return normed, stream, mean, rstd


def layer_norm_bwd(
    grad_normed: Tensor,
    grad_stream: Tensor | None,
    stream: Tensor,
    weight: Tensor,
    constant: Tensor | None,
    mean: Tensor,
    rstd: Tensor,
) -> tuple[Tensor, Tensor]:
    """Launch the backward pass: gradient of the stream, and of weight, bias and constant as float32 (3, D)."""
    flat = as_rows(stream)
    grad = as_rows(grad_normed)
    grad_added = None if grad_stream is None else as_rows(grad_stream)
    rows, width = flat.shape
    tile = backward_tile(width)
    programs = min(cdiv(rows, tile.rows), BACKWARD_PROGRAMS)
    grad_x = contiguous_like(stream)
    partial = stream.new_empty(programs, 3, width, dtype=torch.float32)
    if rows:
        with on_device_of(stream):
            _layer_norm_bwd_kernel[(programs,)](
                grad_normed_ptr=grad,
                grad_stream_ptr=grad_added,
                stream_ptr=flat,
                constant_ptr=None if constant is None else constant.contiguous(),
                weight_ptr=weight.contiguous(),
                mean_ptr=mean,
                rstd_ptr=rstd,
                grad_x_ptr=grad_x,
                partial_ptr=partial,
                rows=rows,
                grad_normed_stride=grad.stride(0),
                grad_stream_stride=0 if grad_added is None else grad_added.stride(0),
                stream_stride=flat.stride(0),
                programs=programs,
                WIDTH=width,
                BLOCK_ROWS=tile.rows,
                BLOCK_WIDTH=tile.columns,
                HAS_GRAD_STREAM=grad_added is not None,
                HAS_CONSTANT=constant is not None,
                num_warps=tile.num_warps,
                num_stages=tile.num_stages,
                # left to choose, the assembler spills for one more program on a multiprocessor; 128 registers fit four,
                # all that BACKWARD_PROGRAMS gives to 128 multiprocessors. wide rows take what there is
                maxnreg=128 if tile.rows * tile.columns <= 2048 else None,
            )
    return grad_x, partial.sum(0)
