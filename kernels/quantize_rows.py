"""Rows to float8 e4m3 with a float32 scale each, after a layer norm, with a residual added first, or an activation."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from xclip_fast.kernels._launch import as_rows, cdiv, kernel, on_device_of
from xclip_fast.kernels.layer_norm import forward_tile as layer_norm_tile
from xclip_fast.kernels.linear_quick_gelu import EXPONENT
from xclip_fast.kernels.mean_norm_over_frames import _normalise
from xclip_fast.tuning import Tile, every, tunable

E4M3_MAX = tl.constexpr(448.0)
# below it a row counts as zeros: the reciprocal of its scale would be infinite
SMALLEST = tl.constexpr(1e-30)
SILU_EXPONENT = tl.constexpr(-1.4426950408889634)
SQRT_HALF = tl.constexpr(0.7071067811865476)


@triton.jit
def _activate(x, ACTIVATION: tl.constexpr):
    """SiLU, QuickGELU or GELU in float32."""
    if ACTIVATION == "gelu":
        return 0.5 * x * (1.0 + tl.erf(x * SQRT_HALF))
    if ACTIVATION == "silu":
        return x / (1.0 + tl.exp2(x * SILU_EXPONENT))
    return x / (1.0 + tl.exp2(x * EXPONENT))


@kernel
def _quantize_rows_fwd_kernel(
    x_ptr,
    residual_ptr,
    constant_ptr,
    weight_ptr,
    bias_ptr,
    quantized_ptr,
    scale_ptr,
    stream_ptr,
    rows,
    x_stride,
    residual_stride,
    eps,
    WIDTH: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_WIDTH: tl.constexpr,
    HAS_NORM: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
    HAS_CONSTANT: tl.constexpr,
    ACTIVATION: tl.constexpr,
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
    if HAS_NORM:
        if HAS_CONSTANT:
            x += tl.load(constant_ptr + column, mask=in_width, other=0.0).to(tl.float32)[None, :]
        x, _ = _normalise(x, in_width, eps, WIDTH)
        weight = tl.load(weight_ptr + column, mask=in_width, other=0.0).to(tl.float32)
        bias = tl.load(bias_ptr + column, mask=in_width, other=0.0).to(tl.float32)
        x = x * weight[None, :] + bias[None, :]
    if ACTIVATION is not None:
        x = _activate(x, ACTIVATION)
    largest = tl.max(tl.abs(x), axis=1)
    # one division a row, rounded as PyTorch rounds it, and a multiplication a number
    scale = tl.where(largest > SMALLEST, tl.div_rn(largest, E4M3_MAX), 1.0)
    quantized = x * tl.div_rn(1.0, scale)[:, None]
    tl.store(quantized_ptr + out, quantized.to(quantized_ptr.dtype.element_ty), mask=inside)
    tl.store(scale_ptr + row, scale, mask=in_row)


@tunable("quantize_rows", fixed=("columns",), candidates=every(num_warps=(4, 8), rows=(4, 1, 2, 8)))
def forward_tile(width: int) -> Tile:
    """Whole rows, as of a layer norm."""
    return layer_norm_tile.default(width)


def quantize_rows_fwd(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    constant: Tensor | None,
    eps: float,
    activation: str | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Launch it: e4m3 rows like ``x``, the float32 scale (..., 1) of each, and the stream (empty without residual)."""
    flat = as_rows(x)
    rows, width = flat.shape
    added = None if residual is None else as_rows(residual)
    quantized = x.new_empty(x.shape, dtype=torch.float8_e4m3fn)
    scale = x.new_empty((*x.shape[:-1], 1), dtype=torch.float32)
    stream = x.new_empty(x.shape if residual is not None else 0)
    tile = forward_tile(width)
    if rows:
        with on_device_of(x):
            _quantize_rows_fwd_kernel[(cdiv(rows, tile.rows),)](
                x_ptr=flat,
                residual_ptr=added,
                constant_ptr=None if constant is None else constant.contiguous(),
                weight_ptr=None if weight is None else weight.contiguous(),
                bias_ptr=None if bias is None else bias.contiguous(),
                quantized_ptr=quantized,
                scale_ptr=scale,
                stream_ptr=stream,
                rows=rows,
                x_stride=flat.stride(0),
                residual_stride=0 if added is None else added.stride(0),
                eps=eps,
                WIDTH=width,
                BLOCK_ROWS=tile.rows,
                BLOCK_WIDTH=tile.columns,
                HAS_NORM=weight is not None,
                HAS_RESIDUAL=added is not None,
                HAS_CONSTANT=constant is not None,
                ACTIVATION=activation,
                num_warps=tile.num_warps,
                num_stages=tile.num_stages,
            )
    return quantized, scale, stream
