"""Sums over the rows of a matrix, which is read once: the gradient of a bias."""

from __future__ import annotations

import torch
import triton.language as tl
from torch import Tensor

from xclip_fast.kernels._launch import as_rows, cdiv, kernel, on_device_of
from xclip_fast.tuning import Tile

# of a matrix of activations; of partial sums, whose few rows are read by few programs, narrower
TILE = Tile(64, 128)
PARTIAL_TILE = Tile(32, 32)
# of a matrix, whichever GPU it is: the order of the sums is the same everywhere
PROGRAMS = 512


@kernel
def _column_sums_bwd_kernel(
    x_ptr,
    out_ptr,
    rows,
    x_stride,
    part_rows,
    WIDTH: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
):
    columns: tl.constexpr = (WIDTH + BLOCK_COLUMNS - 1) // BLOCK_COLUMNS
    program = tl.program_id(0)
    part = (program // columns).to(tl.int64)
    column = program % columns * BLOCK_COLUMNS + tl.arange(0, BLOCK_COLUMNS)
    in_width = column < WIDTH
    acc = tl.zeros((BLOCK_ROWS, BLOCK_COLUMNS), tl.float32)
    for start in range(0, part_rows, BLOCK_ROWS):
        row = part * part_rows + start + tl.arange(0, BLOCK_ROWS)
        inside = (row < rows)[:, None] & in_width[None, :]
        # [BLOCK_ROWS, BLOCK_COLUMNS]
        acc += tl.load(x_ptr + row[:, None] * x_stride + column[None, :], mask=inside, other=0.0).to(tl.float32)
    sums = tl.sum(acc, axis=0)
    tl.store(out_ptr + part * WIDTH + column, sums.to(out_ptr.dtype.element_ty), mask=in_width)


def column_sums(x: Tensor) -> Tensor:
    """Launch the sums over the rows of x (M, N): (N,) in the dtype of x, summed in float32.

    Many rows are summed in parts first, whose sums are added up in a fixed order: no atomics.
    """
    rows = as_rows(x)
    parts = parts_of(*rows.shape, TILE)
    if parts == 1:
        return _sums_of(rows, TILE, len(rows), x.dtype)[0]
    return sum_of_parts(_sums_of(rows, TILE, rows_of_part(len(rows), parts, TILE), torch.float32), x.dtype)


def parts_of(rows: int, width: int, tile: Tile) -> int:
    """How many parts to sum so many rows in, at least one."""
    return max(1, min(PROGRAMS // max(1, cdiv(width, tile.columns)), cdiv(rows, tile.rows)))


def rows_of_part(rows: int, parts: int, tile: Tile) -> int:
    """Rows of each part, whole blocks; the last may have fewer, and there may be fewer parts."""
    return max(1, cdiv(cdiv(rows, parts), tile.rows)) * tile.rows


def sum_of_parts(partial: Tensor, dtype: torch.dtype) -> Tensor:
    """The sums (N,) of partial sums (P, N)."""
    return _sums_of(partial, PARTIAL_TILE, len(partial), dtype)[0]


def _sums_of(x: Tensor, tile: Tile, part_rows: int, dtype: torch.dtype) -> Tensor:
    """Sums (P, N) of so many rows of x (M, N) each."""
    rows, width = x.shape
    parts = max(1, cdiv(rows, max(1, part_rows)))
    out = x.new_empty(parts, width, dtype=dtype)
    if width:
        with on_device_of(x):
            _column_sums_bwd_kernel[(parts * cdiv(width, tile.columns),)](
                x_ptr=x,
                out_ptr=out,
                rows=rows,
                x_stride=x.stride(0),
                part_rows=part_rows,
                WIDTH=width,
                BLOCK_ROWS=tile.rows,
                BLOCK_COLUMNS=tile.columns,
                num_warps=tile.num_warps,
                num_stages=tile.num_stages,
            )
    return out
