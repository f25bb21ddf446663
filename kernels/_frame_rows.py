"""What the kernels of frame attention share: which head a program has, and the rows of it in memory."""

from __future__ import annotations

import math

import triton
import triton.language as tl

LOG2_E = tl.constexpr(math.log2(math.e))


@triton.jit
def place(TILES: tl.constexpr, HEADS: tl.constexpr):
    """Frame, head and tile of a program: the tiles of a head are neighbours, so that its keys stay in the cache."""
    program = tl.program_id(0)
    head = program // TILES
    return (head // HEADS).to(tl.int64), head % HEADS, program % TILES


@triton.jit
def load_rows(rows_ptr, row, row_stride, TOKENS: tl.constexpr, HEAD_DIM: tl.constexpr, MASKED: tl.constexpr):
    """One head of the given rows, [ROWS, HEAD_DIM]; zero past the last token."""
    element = rows_ptr + row.to(tl.int64)[:, None] * row_stride + tl.arange(0, HEAD_DIM)[None, :]
    if MASKED:
        return tl.load(element, mask=(row < TOKENS)[:, None], other=0.0)
    return tl.load(element)


@triton.jit
def store_rows(rows_ptr, row, row_stride, rows, TOKENS: tl.constexpr, HEAD_DIM: tl.constexpr, MASKED: tl.constexpr):
    """The opposite of ``load_rows``."""
    element = rows_ptr + row.to(tl.int64)[:, None] * row_stride + tl.arange(0, HEAD_DIM)[None, :]
    rows = rows.to(rows_ptr.dtype.element_ty)
    if MASKED:
        tl.store(element, rows, mask=(row < TOKENS)[:, None])
    else:
        tl.store(element, rows)


@triton.jit
def tail_rows(
    rows_ptr,
    message_ptr,
    row_stride,
    TOKENS: tl.constexpr,
    BODY: tl.constexpr,
    TAIL: tl.constexpr,
    HEAD_DIM: tl.constexpr,
):
    """Pointers to the tail of the keys, [TAIL, HEAD_DIM]: the rows the body left, then the message; and which exist."""
    lane = tl.arange(0, TAIL)
    rows = rows_ptr + (BODY + lane).to(tl.int64) * row_stride
    rows = tl.where(lane == TOKENS - BODY, message_ptr, rows)
    return rows[:, None] + tl.arange(0, HEAD_DIM)[None, :], lane <= TOKENS - BODY
