"""Attention of a frame's tokens over themselves and the frame's message: forward pass by one program a head.

Keys and values are loaded once and stay in shared memory, where the tensor cores read them; the queries pass in a loop.
All scores of a block of queries are in registers at once, so that their maximum is known before the first weight and
nothing is rescaled. This limits the tokens: see ``KEPT_TOKENS``.
"""

from __future__ import annotations

import triton
import triton.language as tl

from xclip_fast.kernels._frame_rows import LOG2_E, load_rows, place, store_rows, tail_rows
from xclip_fast.kernels._launch import kernel

# the narrowest result of a tensor core instruction
SUM_COLUMNS = tl.constexpr(8)


@triton.jit
def _weigh(scores, peak, value, acc, sums, SCALE: tl.constexpr):
    # [QUERIES, HEAD_DIM] and [QUERIES, SUM_COLUMNS] from scores [QUERIES, KEYS]
    weights = tl.exp2(scores * SCALE - peak[:, None]).to(value.dtype)
    acc = tl.dot(weights, value, acc, input_precision="ieee")
    # the tensor cores have time for it, and sum what the values are weighed by; all columns are the same
    ones = tl.full((value.shape[0], SUM_COLUMNS), 1.0, tl.float32).to(value.dtype)
    sums = tl.dot(weights, ones, sums, input_precision="ieee")
    return acc, sums


@kernel
def _frame_attention_head_kernel(
    qkv_ptr,
    message_ptr,
    out_ptr,
    lse_ptr,
    frame_stride,
    row_stride,
    message_stride,
    TOKENS: tl.constexpr,
    HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    QUERY_BLOCK: tl.constexpr,
    KEY_FIRST: tl.constexpr,
    KEY_SECOND: tl.constexpr,
    KEY_TAIL: tl.constexpr,
    STORE_LSE: tl.constexpr,
):
    SCALE: tl.constexpr = LOG2_E / HEAD_DIM**0.5
    WIDTH: tl.constexpr = HEADS * HEAD_DIM
    KEY_BODY: tl.constexpr = KEY_FIRST + KEY_SECOND
    MASKED: tl.constexpr = TOKENS % QUERY_BLOCK > 0
    frame, head, _ = place(1, HEADS)
    query_ptr = qkv_ptr + frame * frame_stride + head * HEAD_DIM
    message_ptr += frame * message_stride + head * HEAD_DIM
    out_ptr += frame * (TOKENS * WIDTH) + head * HEAD_DIM
    lse_ptr += (frame * HEADS + head) * TOKENS
    key_ptr = query_ptr + WIDTH
    tail, valid = tail_rows(key_ptr, message_ptr, row_stride, TOKENS, KEY_BODY, KEY_TAIL, HEAD_DIM)
    first_row = tl.arange(0, KEY_FIRST)
    second_row = KEY_FIRST + tl.arange(0, KEY_SECOND)
    # three pieces, since the sides of a tile are powers of two: [KEY_FIRST | KEY_SECOND | KEY_TAIL, HEAD_DIM]
    first_key = load_rows(key_ptr, first_row, row_stride, TOKENS, HEAD_DIM, False)
    second_key = load_rows(key_ptr, second_row, row_stride, TOKENS, HEAD_DIM, False)
    tail_key = tl.load(tail, mask=valid[:, None], other=0.0)
    first_value = load_rows(key_ptr + WIDTH, first_row, row_stride, TOKENS, HEAD_DIM, False)
    second_value = load_rows(key_ptr + WIDTH, second_row, row_stride, TOKENS, HEAD_DIM, False)
    tail_value = tl.load(tail + WIDTH, mask=valid[:, None], other=0.0)
    for start in tl.range(0, TOKENS, QUERY_BLOCK):
        row = start + tl.arange(0, QUERY_BLOCK)
        query = load_rows(query_ptr, row, row_stride, TOKENS, HEAD_DIM, MASKED)
        tail_scores = tl.dot(query, tl.trans(tail_key), input_precision="ieee")
        tail_scores = tl.where(valid[None, :], tail_scores, -float("inf"))
        first_scores = tl.dot(query, tl.trans(first_key), input_precision="ieee")
        second_scores = tl.dot(query, tl.trans(second_key), input_precision="ieee")
        peak = tl.maximum(tl.max(first_scores, axis=1), tl.max(second_scores, axis=1))
        peak = tl.maximum(peak, tl.max(tail_scores, axis=1)) * SCALE
        acc = tl.zeros((QUERY_BLOCK, HEAD_DIM), tl.float32)
        sums = tl.zeros((QUERY_BLOCK, SUM_COLUMNS), tl.float32)
        acc, sums = _weigh(first_scores, peak, first_value, acc, sums, SCALE)
        acc, sums = _weigh(second_scores, peak, second_value, acc, sums, SCALE)
        # the tail last: in front, Triton 3.8 runs out of registers at 257 tokens
        acc, sums = _weigh(tail_scores, peak, tail_value, acc, sums, SCALE)
        total = tl.max(sums, axis=1)
        mixed = (acc * (1.0 / total)[:, None]).to(out_ptr.dtype.element_ty)
        # half the columns at a time, [QUERY_BLOCK, HEAD_DIM / 2]: what lines them up as rows takes half the shared
        # memory, and at 197 tokens a multiprocessor has room for a third program
        left, right = tl.split(tl.permute(tl.reshape(mixed, (QUERY_BLOCK, 2, HEAD_DIM // 2)), (0, 2, 1)))
        store_rows(out_ptr, row, WIDTH, left, TOKENS, HEAD_DIM // 2, MASKED)
        store_rows(out_ptr + HEAD_DIM // 2, row, WIDTH, right, TOKENS, HEAD_DIM // 2, MASKED)
        if STORE_LSE:
            tl.store(lse_ptr + row, peak + tl.log2(total), mask=row < TOKENS)
