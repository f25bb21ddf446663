"""Attention of class texts over the patches of each video: forward, and backward without atomics."""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from xclip_fast.kernels._frame_rows import LOG2_E
from xclip_fast.kernels._launch import cdiv, contiguous_like, kernel, next_power_of_2, on_device_of
from xclip_fast.kernels._tensors import unit_stride
from xclip_fast.kernels.frame_attention import _accumulate as accumulate
from xclip_fast.tuning import Tile, listed, tunable


@tunable(
    "prompt_attention",
    candidates=listed(
        "rows columns num_warps num_stages",
        (64, 64, 4, 3),
        (64, 64, 4, 2),
        (64, 32, 4, 2),
        (32, 64, 4, 2),
        (128, 64, 8, 2),
        (16, 64, 2, 2),
    ),
)
def forward_tile(classes: int, patches: int, dtype: torch.dtype) -> Tile:
    """No larger than what it cuts, halved in float32, which takes twice the shared memory."""
    largest = 32 if dtype == torch.float32 else 64
    queries, keys = (min(largest, max(16, next_power_of_2(size))) for size in (classes, patches))
    # with two stages ptxas aims at one more program on sm_80, and spills
    return Tile(queries, keys, num_warps=4, num_stages=3)


@tunable(
    "prompt_attention_bwd",
    op="prompt_attention",
    backward=True,
    candidates=listed(
        "rows columns num_warps num_stages",
        (64, 32, 4, 2),
        (64, 32, 4, 3),
        (64, 64, 8, 2),
        (32, 32, 4, 2),
        (32, 64, 4, 2),
        (64, 32, 8, 2),
    ),
)
def backward_tile(classes: int, patches: int, dtype: torch.dtype) -> Tile:
    """Half the keys: the backward pass holds twice the sums and scores of the forward pass, and would spill."""
    tile = forward_tile.default(classes, patches, dtype)
    return tile._replace(columns=max(16, tile.columns // 2), num_stages=2)


@triton.jit
def _place(program, tiles, HEADS: tl.constexpr):
    """Video, head and tile of a program; the tiles of a head are neighbours."""
    head = program // tiles
    return head // HEADS, head % HEADS, program % tiles


@triton.jit
def _load_tile(start_ptr, row, rows, row_stride, HEAD_DIM: tl.constexpr):
    """Rows of one head, zero past the end: [len(row), HEAD_DIM]."""
    column = tl.arange(0, HEAD_DIM)
    return tl.load(start_ptr + row[:, None] * row_stride + column[None, :], mask=(row < rows)[:, None], other=0.0)


@kernel
def _prompt_attention_fwd_kernel(
    query_ptr,
    key_ptr,
    value_ptr,
    out_ptr,
    lse_ptr,
    classes,
    query_batch_stride,
    query_stride,
    key_batch_stride,
    key_stride,
    value_batch_stride,
    value_stride,
    PATCHES: tl.constexpr,
    HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    SCALE: tl.constexpr,
    BLOCK_QUERIES: tl.constexpr,
    BLOCK_KEYS: tl.constexpr,
):
    video, head, tile = _place(tl.program_id(0).to(tl.int64), tl.cdiv(classes, BLOCK_QUERIES), HEADS)
    row = tile * BLOCK_QUERIES + tl.arange(0, BLOCK_QUERIES)
    # [BLOCK_QUERIES, HEAD_DIM]
    query = _load_tile(query_ptr + video * query_batch_stride + head * HEAD_DIM, row, classes, query_stride, HEAD_DIM)
    acc = tl.zeros((BLOCK_QUERIES, HEAD_DIM), tl.float32)
    total = tl.zeros((BLOCK_QUERIES,), tl.float32)
    highest = tl.full((BLOCK_QUERIES,), -float("inf"), tl.float32)
    key_ptr += video * key_batch_stride + head * HEAD_DIM
    value_ptr += video * value_batch_stride + head * HEAD_DIM
    for start in range(0, PATCHES, BLOCK_KEYS):
        patch = (start + tl.arange(0, BLOCK_KEYS)).to(tl.int64)
        # [BLOCK_KEYS, HEAD_DIM]
        key = _load_tile(key_ptr, patch, PATCHES, key_stride, HEAD_DIM)
        value = _load_tile(value_ptr, patch, PATCHES, value_stride, HEAD_DIM)
        acc, total, highest = accumulate(query, key, value, patch < PATCHES, acc, total, highest, SCALE, True)
    column = tl.arange(0, HEAD_DIM)
    out = (video * classes + row)[:, None] * (HEADS * HEAD_DIM) + head * HEAD_DIM + column[None, :]
    tl.store(out_ptr + out, (acc / total[:, None]).to(out_ptr.dtype.element_ty), mask=(row < classes)[:, None])
    tl.store(lse_ptr + (video * HEADS + head) * classes + row, highest + tl.log2(total), mask=row < classes)


@kernel
def _prompt_attention_bwd_query_kernel(
    grad_ptr,
    query_ptr,
    key_ptr,
    value_ptr,
    out_ptr,
    lse_ptr,
    delta_ptr,
    grad_query_ptr,
    classes,
    query_batch_stride,
    query_stride,
    key_batch_stride,
    key_stride,
    value_batch_stride,
    value_stride,
    PATCHES: tl.constexpr,
    HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    SCALE: tl.constexpr,
    BLOCK_QUERIES: tl.constexpr,
    BLOCK_KEYS: tl.constexpr,
):
    video, head, tile = _place(tl.program_id(0).to(tl.int64), tl.cdiv(classes, BLOCK_QUERIES), HEADS)
    row = tile * BLOCK_QUERIES + tl.arange(0, BLOCK_QUERIES)
    dense = video * classes * (HEADS * HEAD_DIM) + head * HEAD_DIM
    # [BLOCK_QUERIES, HEAD_DIM]
    query = _load_tile(query_ptr + video * query_batch_stride + head * HEAD_DIM, row, classes, query_stride, HEAD_DIM)
    grad = _load_tile(grad_ptr + dense, row, classes, HEADS * HEAD_DIM, HEAD_DIM)
    out = _load_tile(out_ptr + dense, row, classes, HEADS * HEAD_DIM, HEAD_DIM)
    statistics = (video * HEADS + head) * classes + row
    delta = tl.sum(grad.to(tl.float32) * out.to(tl.float32), axis=1)
    tl.store(delta_ptr + statistics, delta, mask=row < classes)
    lse = tl.load(lse_ptr + statistics, mask=row < classes, other=0.0)
    grad_query = tl.zeros((BLOCK_QUERIES, HEAD_DIM), tl.float32)
    key_ptr += video * key_batch_stride + head * HEAD_DIM
    value_ptr += video * value_batch_stride + head * HEAD_DIM
    for start in range(0, PATCHES, BLOCK_KEYS):
        patch = (start + tl.arange(0, BLOCK_KEYS)).to(tl.int64)
        # [BLOCK_KEYS, HEAD_DIM]
        key = _load_tile(key_ptr, patch, PATCHES, key_stride, HEAD_DIM)
        value = _load_tile(value_ptr, patch, PATCHES, value_stride, HEAD_DIM)
        scores = tl.dot(query, tl.trans(key), input_precision="ieee")
        weights = tl.exp2(scores * SCALE - lse[:, None])
        weights = tl.where((patch < PATCHES)[None, :], weights, 0.0)
        grad_weights = tl.dot(grad, tl.trans(value), input_precision="ieee")
        grad_scores = weights * (grad_weights - delta[:, None])
        grad_query = tl.dot(grad_scores.to(key.dtype), key, grad_query, input_precision="ieee")
    column = tl.arange(0, HEAD_DIM)
    grad_query = grad_query * (SCALE / LOG2_E)
    place = grad_query_ptr + dense + row[:, None] * (HEADS * HEAD_DIM) + column[None, :]
    tl.store(place, grad_query.to(grad_query_ptr.dtype.element_ty), mask=(row < classes)[:, None])


@kernel
def _prompt_attention_bwd_key_kernel(
    grad_ptr,
    query_ptr,
    key_ptr,
    value_ptr,
    lse_ptr,
    delta_ptr,
    grad_key_ptr,
    grad_value_ptr,
    classes,
    query_batch_stride,
    query_stride,
    key_batch_stride,
    key_stride,
    value_batch_stride,
    value_stride,
    PATCHES: tl.constexpr,
    HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    SCALE: tl.constexpr,
    BLOCK_QUERIES: tl.constexpr,
    BLOCK_KEYS: tl.constexpr,
):
    video, head, tile = _place(tl.program_id(0).to(tl.int64), tl.cdiv(PATCHES, BLOCK_KEYS), HEADS)
    patch = tile * BLOCK_KEYS + tl.arange(0, BLOCK_KEYS)
    # [BLOCK_KEYS, HEAD_DIM]
    key = _load_tile(key_ptr + video * key_batch_stride + head * HEAD_DIM, patch, PATCHES, key_stride, HEAD_DIM)
    value = _load_tile(value_ptr + video * value_batch_stride + head * HEAD_DIM, patch, PATCHES, value_stride, HEAD_DIM)
    grad_key = tl.zeros((BLOCK_KEYS, HEAD_DIM), tl.float32)
    grad_value = tl.zeros((BLOCK_KEYS, HEAD_DIM), tl.float32)
    query_ptr += video * query_batch_stride + head * HEAD_DIM
    grad_ptr += video * classes * (HEADS * HEAD_DIM) + head * HEAD_DIM
    statistics = (video * HEADS + head) * classes
    for start in range(0, classes, BLOCK_QUERIES):
        row = tl.cast(start, tl.int64) + tl.arange(0, BLOCK_QUERIES)
        # [BLOCK_QUERIES, HEAD_DIM]
        query = _load_tile(query_ptr, row, classes, query_stride, HEAD_DIM)
        grad = _load_tile(grad_ptr, row, classes, HEADS * HEAD_DIM, HEAD_DIM)
        # classes past the end weigh nothing
        lse = tl.load(lse_ptr + statistics + row, mask=row < classes, other=float("inf"))
        delta = tl.load(delta_ptr + statistics + row, mask=row < classes, other=0.0)
        scores = tl.dot(key, tl.trans(query), input_precision="ieee")
        weights = tl.exp2(scores * SCALE - lse[None, :])
        grad_value = tl.dot(weights.to(grad.dtype), grad, grad_value, input_precision="ieee")
        grad_weights = tl.dot(value, tl.trans(grad), input_precision="ieee")
        grad_scores = weights * (grad_weights - delta[None, :])
        grad_key = tl.dot(grad_scores.to(query.dtype), query, grad_key, input_precision="ieee")
    column = tl.arange(0, HEAD_DIM)
    out = (video * PATCHES + patch)[:, None] * (HEADS * HEAD_DIM) + head * HEAD_DIM + column[None, :]
    inside = (patch < PATCHES)[:, None]
    tl.store(grad_key_ptr + out, (grad_key * (SCALE / LOG2_E)).to(grad_key_ptr.dtype.element_ty), mask=inside)
    tl.store(grad_value_ptr + out, grad_value.to(grad_value_ptr.dtype.element_ty), mask=inside)


def _shared_arguments(query: Tensor, key: Tensor, value: Tensor, heads: int, tile: Tile) -> dict[str, object]:
    """What all three kernels take alike: inputs, strides (none along a batch of one shared query) and tiles."""
    batch, patches, width = key.shape
    return {
        "query_ptr": query,
        "key_ptr": key,
        "value_ptr": value,
        "classes": query.shape[1],
        "query_batch_stride": query.stride(0) if query.shape[0] == batch else 0,
        "query_stride": query.stride(1),
        "key_batch_stride": key.stride(0),
        "key_stride": key.stride(1),
        "value_batch_stride": value.stride(0),
        "value_stride": value.stride(1),
        "PATCHES": patches,
        "HEADS": heads,
        "HEAD_DIM": width // heads,
        "SCALE": (width // heads) ** -0.5 * math.log2(math.e),
        "BLOCK_QUERIES": tile.rows,
        "BLOCK_KEYS": tile.columns,
        "num_warps": tile.num_warps,
        "num_stages": tile.num_stages,
    }


def prompt_attention_fwd(query: Tensor, key: Tensor, value: Tensor, heads: int) -> tuple[Tensor, Tensor]:
    """Launch the forward pass: (B, K, E), and the base-2 log of the softmax's denominators (B, heads, K)."""
    query, key, value = map(unit_stride, (query, key, value))
    batch, classes, width = key.shape[0], query.shape[1], query.shape[2]
    out = query.new_empty(batch, classes, width)
    lse = query.new_empty(batch, heads, classes, dtype=torch.float32)
    tile = forward_tile(classes, key.shape[1], query.dtype)
    arguments = _shared_arguments(query, key, value, heads, tile)
    if out.numel():
        with on_device_of(query):
            _prompt_attention_fwd_kernel[(batch * heads * cdiv(classes, tile.rows),)](
                out_ptr=out, lse_ptr=lse, **arguments
            )
    return out, lse


def prompt_attention_bwd(
    grad: Tensor, query: Tensor, key: Tensor, value: Tensor, out: Tensor, lse: Tensor, heads: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Launch the backward pass: gradients of query, per video (B, K, E), key and value."""
    grad, out, lse = grad.contiguous(), out.contiguous(), lse.contiguous()
    query, key, value = map(unit_stride, (query, key, value))
    batch, patches, _ = key.shape
    grad_query, delta = torch.empty_like(out), torch.empty_like(lse)
    grad_key, grad_value = (contiguous_like(x) for x in (key, value))
    tile = backward_tile(query.shape[1], patches, query.dtype)
    arguments = _shared_arguments(query, key, value, heads, tile)
    if not out.numel():
        return grad_query, grad_key.zero_(), grad_value.zero_()
    with on_device_of(query):
        _prompt_attention_bwd_query_kernel[(batch * heads * cdiv(out.shape[1], tile.rows),)](
            grad_ptr=grad, out_ptr=out, lse_ptr=lse, delta_ptr=delta, grad_query_ptr=grad_query, **arguments
        )
        _prompt_attention_bwd_key_kernel[(batch * heads * cdiv(patches, tile.columns),)](
            grad_ptr=grad, lse_ptr=lse, delta_ptr=delta, grad_key_ptr=grad_key, grad_value_ptr=grad_value, **arguments
        )
    return grad_query, grad_key, grad_value
