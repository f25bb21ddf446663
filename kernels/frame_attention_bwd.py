"""Attention of a frame's tokens over themselves and the frame's message: backward pass, two launches, no atomics.

The first gives the queries' gradient and ``delta``, the dot product of each output row with its gradient; the second
needs it, and gives the gradients of keys and values, the message's among them. Scores are computed anew in both, which
makes seven GEMMs where five would do, and saves storing S x (S + 1) weights or adding them up across programs.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from xclip_fast.kernels._frame_rows import LOG2_E, load_rows, place, store_rows, tail_rows
from xclip_fast.kernels._launch import contiguous_like, kernel, on_device_of
from xclip_fast.kernels._tensors import unit_stride
from xclip_fast.kernels.frame_attention import cut, options
from xclip_fast.tuning import Tile, listed, tunable

FIELDS = "rows columns num_warps num_stages"
QUERIES = listed(FIELDS, (64, 64, 4, 2), (64, 64, 8, 2), (64, 64, 4, 3), (64, 32, 4, 2))
QUERIES += listed(FIELDS, (128, 64, 8, 2), (128, 32, 8, 2), (32, 64, 4, 2), (128, 64, 8, 3))
KEYS = listed(FIELDS, (32, 64, 4, 2), (32, 64, 4, 3), (32, 64, 8, 2), (64, 64, 8, 2))
KEYS += listed(FIELDS, (64, 64, 4, 2), (32, 128, 8, 2), (64, 32, 4, 2), (32, 32, 4, 3))


@tunable("frame_attention_bwd_query", op="frame_attention", backward=True, cut=cut, candidates=QUERIES)
def query_gradient_tile(tokens: int, head_dim: int, element_size: int) -> Tile:
    """Queries and keys of a program of the queries' gradient; arguments as for ``forward_tile``."""
    if element_size == 4:
        return Tile(32, 16, num_warps=8, num_stages=2)
    block = 32 if head_dim == 128 else 64
    return Tile(block, block, num_warps=4, num_stages=2)


@tunable("frame_attention_bwd_key", op="frame_attention", backward=True, cut=cut, candidates=KEYS)
def key_gradient_tile(tokens: int, head_dim: int, element_size: int) -> Tile:
    """Queries and keys of a program of the keys' and values' gradient; arguments as for ``forward_tile``."""
    if element_size == 4:
        return Tile(32, 16, num_warps=8, num_stages=2)
    if head_dim == 128:
        return Tile(16, 64, num_warps=8, num_stages=2)
    return Tile(64 if tokens <= 64 else 32, 64, num_warps=4, num_stages=2)


@triton.jit
def _add_to_queries(query, grad, lse, delta, key, value, valid, acc, SCALE: tl.constexpr, MASKED: tl.constexpr):
    # [QUERIES, KEYS]
    scores = tl.dot(query, tl.trans(key), input_precision="ieee")
    weights = tl.exp2(scores * SCALE - lse[:, None])
    grad_weights = tl.dot(grad, tl.trans(value), input_precision="ieee")
    grad_scores = weights * (grad_weights - delta[:, None])
    if MASKED:
        grad_scores = tl.where(valid[None, :], grad_scores, 0.0)
    return tl.dot(grad_scores.to(key.dtype), key, acc, input_precision="ieee")


@triton.jit
def _query_gradient(
    query_ptr,
    message_ptr,
    grad_ptr,
    out_ptr,
    lse_ptr,
    delta_ptr,
    grad_query_ptr,
    row_stride,
    grad_row_stride,
    first_row,
    ROWS: tl.constexpr,
    MASKED: tl.constexpr,
    TOKENS: tl.constexpr,
    WIDTH: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    KEY_BLOCK: tl.constexpr,
    KEY_BODY: tl.constexpr,
    KEY_TAIL: tl.constexpr,
):
    SCALE: tl.constexpr = LOG2_E / HEAD_DIM**0.5
    row = first_row + tl.arange(0, ROWS)
    inside = row < TOKENS
    query = load_rows(query_ptr, row, row_stride, TOKENS, HEAD_DIM, MASKED)
    grad = load_rows(grad_ptr, row, grad_row_stride, TOKENS, HEAD_DIM, MASKED)
    out = load_rows(out_ptr, row, WIDTH, TOKENS, HEAD_DIM, MASKED)
    delta = tl.sum(grad.to(tl.float32) * out.to(tl.float32), axis=1)
    tl.store(delta_ptr + row, delta, mask=inside)
    lse = tl.load(lse_ptr + row, mask=inside, other=0.0)
    acc = tl.zeros((ROWS, HEAD_DIM), tl.float32)
    key_ptr = query_ptr + WIDTH
    tail, valid = tail_rows(key_ptr, message_ptr, row_stride, TOKENS, KEY_BODY, KEY_TAIL, HEAD_DIM)
    tail_key = tl.load(tail, mask=valid[:, None], other=0.0)
    tail_value = tl.load(tail + WIDTH, mask=valid[:, None], other=0.0)
    acc = _add_to_queries(query, grad, lse, delta, tail_key, tail_value, valid, acc, SCALE, True)
    for start in tl.range(0, KEY_BODY, KEY_BLOCK):
        key_row = start + tl.arange(0, KEY_BLOCK)
        key = load_rows(key_ptr, key_row, row_stride, TOKENS, HEAD_DIM, False)
        value = load_rows(key_ptr + WIDTH, key_row, row_stride, TOKENS, HEAD_DIM, False)
        acc = _add_to_queries(query, grad, lse, delta, key, value, valid, acc, SCALE, False)
    store_rows(grad_query_ptr, row, 3 * WIDTH, acc * HEAD_DIM**-0.5, TOKENS, HEAD_DIM, MASKED)


@kernel
def _frame_attention_bwd_query_kernel(
    qkv_ptr,
    message_ptr,
    grad_ptr,
    out_ptr,
    lse_ptr,
    delta_ptr,
    grad_qkv_ptr,
    frame_stride,
    row_stride,
    message_stride,
    grad_frame_stride,
    grad_row_stride,
    TOKENS: tl.constexpr,
    HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    QUERY_BLOCK: tl.constexpr,
    QUERY_BODY: tl.constexpr,
    QUERY_TAIL: tl.constexpr,
    KEY_BLOCK: tl.constexpr,
    KEY_BODY: tl.constexpr,
    KEY_TAIL: tl.constexpr,
):
    WIDTH: tl.constexpr = HEADS * HEAD_DIM
    BLOCKS: tl.constexpr = QUERY_BODY // QUERY_BLOCK
    MASKED: tl.constexpr = QUERY_BODY > TOKENS
    frame, head, tile = place(BLOCKS + (QUERY_TAIL > 0), HEADS)
    query_ptr = qkv_ptr + frame * frame_stride + head * HEAD_DIM
    message_ptr += frame * message_stride + head * HEAD_DIM
    grad_ptr += frame * grad_frame_stride + head * HEAD_DIM
    out_ptr += frame * (TOKENS * WIDTH) + head * HEAD_DIM
    lse_ptr += (frame * HEADS + head) * TOKENS
    delta_ptr += (frame * HEADS + head) * TOKENS
    grad_qkv_ptr += frame * (TOKENS * 3 * WIDTH) + head * HEAD_DIM
    if tile < BLOCKS:
        _query_gradient(
            query_ptr,
            message_ptr,
            grad_ptr,
            out_ptr,
            lse_ptr,
            delta_ptr,
            grad_qkv_ptr,
            row_stride,
            grad_row_stride,
            tile * QUERY_BLOCK,
            QUERY_BLOCK,
            MASKED,
            TOKENS,
            WIDTH,
            HEAD_DIM,
            KEY_BLOCK,
            KEY_BODY,
            KEY_TAIL,
        )
    elif QUERY_TAIL > 0:
        _query_gradient(
            query_ptr,
            message_ptr,
            grad_ptr,
            out_ptr,
            lse_ptr,
            delta_ptr,
            grad_qkv_ptr,
            row_stride,
            grad_row_stride,
            QUERY_BODY,
            QUERY_TAIL,
            True,
            TOKENS,
            WIDTH,
            HEAD_DIM,
            KEY_BLOCK,
            KEY_BODY,
            KEY_TAIL,
        )


@triton.jit
def _add_to_keys(
    key,
    value,
    grad_key,
    grad_value,
    query_ptr,
    grad_ptr,
    lse_ptr,
    delta_ptr,
    row,
    row_stride,
    grad_row_stride,
    TOKENS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    MASKED: tl.constexpr,
):
    SCALE: tl.constexpr = LOG2_E / HEAD_DIM**0.5
    inside = row < TOKENS
    query = load_rows(query_ptr, row, row_stride, TOKENS, HEAD_DIM, MASKED)
    grad = load_rows(grad_ptr, row, grad_row_stride, TOKENS, HEAD_DIM, MASKED)
    lse = tl.load(lse_ptr + row, mask=inside, other=0.0)
    delta = tl.load(delta_ptr + row, mask=inside, other=0.0)
    # [KEYS, QUERIES]
    scores = tl.dot(key, tl.trans(query), input_precision="ieee")
    weights = tl.exp2(scores * SCALE - lse[None, :])
    grad_weights = tl.dot(value, tl.trans(grad), input_precision="ieee")
    grad_scores = weights * (grad_weights - delta[None, :])
    if MASKED:
        weights = tl.where(inside[None, :], weights, 0.0)
        grad_scores = tl.where(inside[None, :], grad_scores, 0.0)
    grad_value = tl.dot(weights.to(grad.dtype), grad, grad_value, input_precision="ieee")
    grad_key = tl.dot(grad_scores.to(query.dtype), query, grad_key, input_precision="ieee")
    return grad_key, grad_value


@triton.jit
def _key_gradient(
    key,
    value,
    query_ptr,
    grad_ptr,
    lse_ptr,
    delta_ptr,
    row_stride,
    grad_row_stride,
    ROWS: tl.constexpr,
    TOKENS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    QUERY_BLOCK: tl.constexpr,
    QUERY_BODY: tl.constexpr,
    QUERY_TAIL: tl.constexpr,
):
    MASKED: tl.constexpr = QUERY_BODY > TOKENS
    grad_key = tl.zeros((ROWS, HEAD_DIM), tl.float32)
    grad_value = tl.zeros((ROWS, HEAD_DIM), tl.float32)
    for start in tl.range(0, QUERY_BODY, QUERY_BLOCK):
        row = start + tl.arange(0, QUERY_BLOCK)
        grad_key, grad_value = _add_to_keys(
            key,
            value,
            grad_key,
            grad_value,
            query_ptr,
            grad_ptr,
            lse_ptr,
            delta_ptr,
            row,
            row_stride,
            grad_row_stride,
            TOKENS,
            HEAD_DIM,
            MASKED,
        )
    if QUERY_TAIL > 0:
        tail = QUERY_BODY + tl.arange(0, QUERY_TAIL)
        grad_key, grad_value = _add_to_keys(
            key,
            value,
            grad_key,
            grad_value,
            query_ptr,
            grad_ptr,
            lse_ptr,
            delta_ptr,
            tail,
            row_stride,
            grad_row_stride,
            TOKENS,
            HEAD_DIM,
            True,
        )
    return grad_key * HEAD_DIM**-0.5, grad_value


@kernel
def _frame_attention_bwd_key_kernel(
    qkv_ptr,
    message_ptr,
    grad_ptr,
    lse_ptr,
    delta_ptr,
    grad_qkv_ptr,
    grad_message_ptr,
    frame_stride,
    row_stride,
    message_stride,
    grad_frame_stride,
    grad_row_stride,
    TOKENS: tl.constexpr,
    HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    QUERY_BLOCK: tl.constexpr,
    QUERY_BODY: tl.constexpr,
    QUERY_TAIL: tl.constexpr,
    KEY_BLOCK: tl.constexpr,
    KEY_BODY: tl.constexpr,
    KEY_TAIL: tl.constexpr,
):
    WIDTH: tl.constexpr = HEADS * HEAD_DIM
    BLOCKS: tl.constexpr = KEY_BODY // KEY_BLOCK
    frame, head, tile = place(BLOCKS + 1, HEADS)
    query_ptr = qkv_ptr + frame * frame_stride + head * HEAD_DIM
    key_ptr = query_ptr + WIDTH
    grad_ptr += frame * grad_frame_stride + head * HEAD_DIM
    lse_ptr += (frame * HEADS + head) * TOKENS
    delta_ptr += (frame * HEADS + head) * TOKENS
    grad_key_ptr = grad_qkv_ptr + frame * (TOKENS * 3 * WIDTH) + WIDTH + head * HEAD_DIM
    if tile < BLOCKS:
        row = tile * KEY_BLOCK + tl.arange(0, KEY_BLOCK)
        key = load_rows(key_ptr, row, row_stride, TOKENS, HEAD_DIM, False)
        value = load_rows(key_ptr + WIDTH, row, row_stride, TOKENS, HEAD_DIM, False)
        grad_key, grad_value = _key_gradient(
            key,
            value,
            query_ptr,
            grad_ptr,
            lse_ptr,
            delta_ptr,
            row_stride,
            grad_row_stride,
            KEY_BLOCK,
            TOKENS,
            HEAD_DIM,
            QUERY_BLOCK,
            QUERY_BODY,
            QUERY_TAIL,
        )
        store_rows(grad_key_ptr, row, 3 * WIDTH, grad_key, TOKENS, HEAD_DIM, False)
        store_rows(grad_key_ptr + WIDTH, row, 3 * WIDTH, grad_value, TOKENS, HEAD_DIM, False)
    else:
        message_ptr += frame * message_stride + head * HEAD_DIM
        grad_message_ptr += frame * (2 * WIDTH) + head * HEAD_DIM
        tail, valid = tail_rows(key_ptr, message_ptr, row_stride, TOKENS, KEY_BODY, KEY_TAIL, HEAD_DIM)
        tail_key = tl.load(tail, mask=valid[:, None], other=0.0)
        tail_value = tl.load(tail + WIDTH, mask=valid[:, None], other=0.0)
        grad_tail_key, grad_tail_value = _key_gradient(
            tail_key,
            tail_value,
            query_ptr,
            grad_ptr,
            lse_ptr,
            delta_ptr,
            row_stride,
            grad_row_stride,
            KEY_TAIL,
            TOKENS,
            HEAD_DIM,
            QUERY_BLOCK,
            QUERY_BODY,
            QUERY_TAIL,
        )
        grad_tail, _ = tail_rows(grad_key_ptr, grad_message_ptr, 3 * WIDTH, TOKENS, KEY_BODY, KEY_TAIL, HEAD_DIM)
        tl.store(grad_tail, grad_tail_key.to(grad_qkv_ptr.dtype.element_ty), mask=valid[:, None])
        tl.store(grad_tail + WIDTH, grad_tail_value.to(grad_qkv_ptr.dtype.element_ty), mask=valid[:, None])


def frame_attention_bwd(
    grad: Tensor, qkv: Tensor, message_kv: Tensor, out: Tensor, lse: Tensor, heads: int
) -> tuple[Tensor, Tensor]:
    """Launch the backward pass: gradients of the packed rows and of the message's packed key and value."""
    grad, qkv, message_kv = map(unit_stride, (grad, qkv, message_kv))
    out, lse = out.contiguous(), lse.contiguous()
    frames, tokens, packed = qkv.shape
    head_dim = packed // 3 // heads
    grad_qkv = contiguous_like(qkv)
    grad_message = qkv.new_empty(message_kv.shape)
    delta = torch.empty_like(lse)
    if not frames:
        return grad_qkv, grad_message
    shared = {
        "qkv_ptr": qkv,
        "message_ptr": message_kv,
        "grad_ptr": grad,
        "lse_ptr": lse,
        "delta_ptr": delta,
        "grad_qkv_ptr": grad_qkv,
        "frame_stride": qkv.stride(0),
        "row_stride": qkv.stride(1),
        "message_stride": message_kv.stride(0),
        "grad_frame_stride": grad.stride(0),
        "grad_row_stride": grad.stride(1),
        "TOKENS": tokens,
        "HEADS": heads,
        "HEAD_DIM": head_dim,
    }
    with on_device_of(qkv):
        tile = query_gradient_tile(tokens, head_dim, qkv.element_size())
        blocks = cut(tile, tokens)
        grid = (frames * heads * blocks.queries.count,)
        _frame_attention_bwd_query_kernel[grid](**shared, out_ptr=out, **options(blocks, tile))
        tile = key_gradient_tile(tokens, head_dim, qkv.element_size())
        blocks = cut(tile, tokens)
        grid = (frames * heads * blocks.keys.count,)
        _frame_attention_bwd_key_kernel[grid](**shared, grad_message_ptr=grad_message, **options(blocks, tile))
    return grad_qkv, grad_message
