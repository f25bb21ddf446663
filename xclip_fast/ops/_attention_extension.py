"""Intra-frame attention by the compiled extension: which calls it serves."""

from __future__ import annotations

import torch
from torch import Tensor

from xclip_fast import _extension

HEAD_DIM = 64  # of every published model, and as in csrc/frame_attention_cpu.h


def refusal(qkv: Tensor, message_kv: Tensor, heads: int) -> str | None:
    """The reason why the extension cannot serve a call with these tensors, or None."""
    places = sorted({qkv.device.type, message_kv.device.type})
    if places != ["cpu"]:
        return f"the tensors are on {' and '.join(places)}, and its attention runs on the CPU"
    if qkv.dtype != torch.bfloat16:
        return f"its attention takes bfloat16, found {qkv.dtype}"
    head_dim = qkv.shape[-1] // 3 // heads
    if head_dim != HEAD_DIM:
        return f"its attention takes heads of {HEAD_DIM} numbers, found {head_dim}"
    return _extension.attention_refusal()


def frame_attention_fwd(
    qkv: Tensor, message_kv: Tensor, heads: int, queries: int, scale: float, with_lse: bool
) -> tuple[Tensor, Tensor]:
    """The first ``queries`` rows of each frame (F, queries, D), and the base 2 log-sum-exp of their scores.

    Args:
        qkv, message_kv, heads: as for ``ops.frame_attention``.
        queries: 1 to S.
        scale: of the scores, above 0.
        with_lse: give (F, heads, queries) float32 as the second, else it is empty.
    """
    tokens, messages = (rows if rows.stride(-1) == 1 else rows.contiguous() for rows in (qkv, message_kv))
    return torch.ops.xclip_fast_native.frame_attention(tokens, messages, heads, queries, scale, with_lse)
