"""Attention of a frame's tokens over themselves and the frame's message: forward pass, and what both passes share.

Queries, keys and values are read where the projections wrote them. Rows are cut into a body of whole blocks, which
needs no mask, and one small masked tail; the message is one more key of the tail, behind a pointer of its own.
"""

from __future__ import annotations

from functools import cache
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from xclip_fast.devices import compute_capability, multiprocessors
from xclip_fast.kernels._frame_rows import LOG2_E, load_rows, place, store_rows, tail_rows
from xclip_fast.kernels._launch import cdiv, kernel, next_power_of_2, on_device_of
from xclip_fast.kernels._tensors import unit_stride
from xclip_fast.kernels.frame_attention_head import _frame_attention_head_kernel
from xclip_fast.tuning import Tile, listed, tunable

# the smallest side of a tl.dot
SMALLEST_TILE = 16
# bodies of kept keys are cut into two powers of two, of this or more
KEPT_STEP = 64
# fewer tokens have no body, of more not all scores of a query fit the registers
KEPT_TOKENS = range(64, 321)


class Side(NamedTuple):
    """How rows are cut: ``body`` rows in blocks of ``block``, a rest in one masked block of ``tail`` rows."""

    block: int
    body: int
    tail: int

    @property
    def count(self) -> int:
        """Blocks in all."""
        return self.body // self.block + (self.tail > 0)


class Cut(NamedTuple):
    """A frame's queries and keys in blocks; a key block of 0 means that a program keeps all keys of a head."""

    queries: Side
    keys: Side

    @property
    def keeps_keys(self) -> bool:
        """Whether a program has all queries of a head."""
        return self.keys.block == 0

    @property
    def programs(self) -> int:
        """Of a head."""
        return 1 if self.keeps_keys else self.queries.count


@cache
def options(cut: Cut, tile: Tile) -> dict[str, int]:
    """The keyword arguments of a launch."""
    launch = {"num_warps": tile.num_warps, "num_stages": tile.num_stages}
    if cut.keeps_keys:
        first = next_power_of_2(cut.keys.body) // 2
        keys = {"KEY_FIRST": first, "KEY_SECOND": cut.keys.body - first, "KEY_TAIL": cut.keys.tail}
        return {"QUERY_BLOCK": cut.queries.block, **keys, **launch}
    blocks = {
        f"{name}_{part.upper()}": rows
        for name, side in (("QUERY", cut.queries), ("KEY", cut.keys))
        for part, rows in side._asdict().items()
    }
    return blocks | launch


def query_side(tokens: int, block: int) -> Side:
    """Cut the queries; where the rest needs as many rows as a block, one more block, and all are masked."""
    block = min(block, _padded(tokens))
    body = tokens // block * block
    tail = _padded(tokens - body) if tokens > body else 0
    return Side(block, body, tail) if tail < block else Side(block, body + block, 0)


def key_side(tokens: int, block: int) -> Side:
    """Cut the keys; the tail always exists, since the message is in it."""
    body = tokens // block * block
    return Side(block, body, _padded(tokens - body + 1))


def cut(tile: Tile, tokens: int, head_dim: int = 0, element_size: int = 0) -> Cut:
    """A frame's queries and keys in the rows and columns of a tile; 0 columns keep all keys, see ``keeps_keys``.

    Raises:
        ValueError: all keys cannot be kept of so many tokens.
    """
    if tile.columns == 0:
        if tokens not in KEPT_TOKENS:
            raise ValueError(f"keys of {tokens} tokens are not kept, those of {KEPT_TOKENS} are")
        body = tokens // KEPT_STEP * KEPT_STEP
        whole = Side(tile.rows, cdiv(tokens, tile.rows) * tile.rows, 0)
        return Cut(whole, Side(0, body, _padded(tokens - body + 1)))
    return Cut(query_side(tokens, tile.rows), key_side(tokens, tile.columns))


def keeps_keys(tokens: int, head_dim: int, element_size: int) -> bool:
    """Whether there is a kernel that keeps all keys of a head, on Hopper; see ``forward_tile``."""
    return tokens in KEPT_TOKENS and head_dim == 64 and element_size == 2


def streamed_tile(tokens: int, head_dim: int, element_size: int) -> Tile:
    """The tile that streams the keys, for every GPU: the largest that leaves every number in a register."""
    if element_size == 4:
        return Tile(32, 16, num_warps=8, num_stages=2)
    if head_dim == 128:
        return Tile(64, 32, num_warps=8, num_stages=2)
    if head_dim == 64 and tokens >= 512:
        # each block of queries reads all keys again, so frames of many tokens take wide ones; at 257 tokens those
        # lose to small ones, of which more fit a multiprocessor: 107 us against 85 on an H200 (64 frames, 16 heads)
        return Tile(128, 64, num_warps=8, num_stages=3)
    return Tile(64, 64, num_warps=4, num_stages=2)


@tunable(
    "frame_attention",
    optional=("columns",),
    cut=cut,
    candidates=listed(
        "rows columns num_warps num_stages",
        (64, 64, 4, 2),
        (64, 0, 4, 2),
        (64, 0, 4, 1),
        (128, 64, 8, 3),
        (128, 64, 8, 2),
        (64, 64, 4, 3),
        (128, 64, 4, 2),
        (64, 32, 4, 3),
        (128, 128, 8, 2),
        (64, 128, 4, 2),
    ),
)
def forward_tile(tokens: int, head_dim: int, element_size: int) -> Tile:
    """Queries and keys of a program of the forward pass.

    Args:
        tokens: rows of a frame, S.
        head_dim: 32, 64 or 128.
        element_size: bytes of an element; exact float32 has no tensor cores and needs small tiles.
    """
    return streamed_tile(tokens, head_dim, element_size)


def padded_work(tokens: int, cut: Cut) -> float:
    """Multiply-accumulates of whole blocks over those of S queries on S + 1 keys."""
    queries, keys = cut
    return (queries.body + queries.tail) * (keys.body + keys.tail) / (tokens * (tokens + 1))


def _padded(rows: int) -> int:
    return max(SMALLEST_TILE, next_power_of_2(rows))


@triton.jit
def _accumulate(query, key, value, valid, acc, total, highest, SCALE: tl.constexpr, MASKED: tl.constexpr):
    # [QUERIES, KEYS]
    scores = tl.dot(query, tl.trans(key), input_precision="ieee")
    if MASKED:
        scores = tl.where(valid[None, :], scores, -float("inf"))
    before = highest
    highest = tl.maximum(before, tl.max(scores, axis=1) * SCALE)
    # a row that has met only scores of minus infinity must not turn to NaN yet
    shift = tl.where(highest == -float("inf"), 0.0, highest)
    weights = tl.exp2(scores * SCALE - shift[:, None])
    decay = tl.exp2(before - shift)
    total = total * decay + tl.sum(weights, axis=1)
    acc = tl.dot(weights.to(value.dtype), value, acc * decay[:, None], input_precision="ieee")
    return acc, total, highest


@triton.jit
def _attend(
    query_ptr,
    message_ptr,
    out_ptr,
    lse_ptr,
    row_stride,
    first_row,
    ROWS: tl.constexpr,
    MASKED: tl.constexpr,
    TOKENS: tl.constexpr,
    WIDTH: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    KEY_BLOCK: tl.constexpr,
    KEY_BODY: tl.constexpr,
    KEY_TAIL: tl.constexpr,
    STORE_LSE: tl.constexpr,
):
    SCALE: tl.constexpr = LOG2_E / HEAD_DIM**0.5
    row = first_row + tl.arange(0, ROWS)
    query = load_rows(query_ptr, row, row_stride, TOKENS, HEAD_DIM, MASKED)
    acc = tl.zeros((ROWS, HEAD_DIM), tl.float32)
    total = tl.zeros((ROWS,), tl.float32)
    highest = tl.full((ROWS,), -float("inf"), tl.float32)
    key_ptr = query_ptr + WIDTH
    tail, valid = tail_rows(key_ptr, message_ptr, row_stride, TOKENS, KEY_BODY, KEY_TAIL, HEAD_DIM)
    tail_key = tl.load(tail, mask=valid[:, None], other=0.0)
    tail_value = tl.load(tail + WIDTH, mask=valid[:, None], other=0.0)
    acc, total, highest = _accumulate(query, tail_key, tail_value, valid, acc, total, highest, SCALE, True)
    for start in tl.range(0, KEY_BODY, KEY_BLOCK):
        key_row = start + tl.arange(0, KEY_BLOCK)
        key = load_rows(key_ptr, key_row, row_stride, TOKENS, HEAD_DIM, False)
        value = load_rows(key_ptr + WIDTH, key_row, row_stride, TOKENS, HEAD_DIM, False)
        acc, total, highest = _accumulate(query, key, value, valid, acc, total, highest, SCALE, False)
    # one division a row instead of one an element, a tenth of all instructions
    store_rows(out_ptr, row, WIDTH, acc * (1.0 / total)[:, None], TOKENS, HEAD_DIM, MASKED)
    if STORE_LSE:
        tl.store(lse_ptr + row, highest + tl.log2(total), mask=row < TOKENS)


@kernel
def _frame_attention_fwd_kernel(
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
    QUERY_BODY: tl.constexpr,
    QUERY_TAIL: tl.constexpr,
    KEY_BLOCK: tl.constexpr,
    KEY_BODY: tl.constexpr,
    KEY_TAIL: tl.constexpr,
    STORE_LSE: tl.constexpr,
):
    WIDTH: tl.constexpr = HEADS * HEAD_DIM
    BLOCKS: tl.constexpr = QUERY_BODY // QUERY_BLOCK
    MASKED: tl.constexpr = QUERY_BODY > TOKENS
    frame, head, tile = place(BLOCKS + (QUERY_TAIL > 0), HEADS)
    query_ptr = qkv_ptr + frame * frame_stride + head * HEAD_DIM
    message_ptr += frame * message_stride + head * HEAD_DIM
    out_ptr += frame * (TOKENS * WIDTH) + head * HEAD_DIM
    lse_ptr += (frame * HEADS + head) * TOKENS
    if tile < BLOCKS:
        _attend(
            query_ptr,
            message_ptr,
            out_ptr,
            lse_ptr,
            row_stride,
            tile * QUERY_BLOCK,
            QUERY_BLOCK,
            MASKED,
            TOKENS,
            WIDTH,
            HEAD_DIM,
            KEY_BLOCK,
            KEY_BODY,
            KEY_TAIL,
            STORE_LSE,
        )
    elif QUERY_TAIL > 0:
        _attend(
            query_ptr,
            message_ptr,
            out_ptr,
            lse_ptr,
            row_stride,
            QUERY_BODY,
            QUERY_TAIL,
            True,
            TOKENS,
            WIDTH,
            HEAD_DIM,
            KEY_BLOCK,
            KEY_BODY,
            KEY_TAIL,
            STORE_LSE,
        )


def frame_attention_fwd(qkv: Tensor, message_kv: Tensor, heads: int, with_lse: bool) -> tuple[Tensor, Tensor]:
    """Launch the forward pass: the rows of all heads, and the base 2 log-sum-exp of the scores (empty unless asked)."""
    qkv, message_kv = unit_stride(qkv), unit_stride(message_kv)
    frames, tokens, packed = qkv.shape
    width = packed // 3
    out = qkv.new_empty(frames, tokens, width)
    lse = qkv.new_empty((frames, heads, tokens) if with_lse else 0, dtype=torch.float32)
    shape = tokens, width // heads, qkv.element_size()
    tile = forward_tile(*shape)
    if tile.columns == 0 and not (keeps_keys(*shape) and _can_keep(qkv.device, frames * heads)):
        tile = streamed_tile(*shape)
    blocks = cut(tile, tokens)
    attention_kernel = _frame_attention_head_kernel if blocks.keeps_keys else _frame_attention_fwd_kernel
    if frames:
        with on_device_of(qkv):
            attention_kernel[(frames * heads * blocks.programs,)](
                qkv_ptr=qkv,
                message_ptr=message_kv,
                out_ptr=out,
                lse_ptr=lse,
                frame_stride=qkv.stride(0),
                row_stride=qkv.stride(1),
                message_stride=message_kv.stride(0),
                TOKENS=tokens,
                HEADS=heads,
                HEAD_DIM=width // heads,
                STORE_LSE=with_lse,
                **options(blocks, tile),
            )
    return out, lse


def _can_keep(device: torch.device, programs: int) -> bool:
    # older GPUs cannot multiply keys from shared memory, and spill; on Blackwell the tensor memory of a multiprocessor
    # has room for one program; without a GPU are the interpreter and the compile gate
    if device.type != "cuda":
        return True
    # of few heads each is better cut up, lest most multiprocessors wait for the others
    return compute_capability(device.index)[0] == 9 and programs >= 2 * multiprocessors(device.index)
