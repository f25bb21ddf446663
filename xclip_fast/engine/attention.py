"""Attention of the engine's blocks on the CPU: the tokens of a frame over themselves and the frame's message."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention, softmax

from xclip_fast.ops import _attention_extension

_SCORES = 120_000  # at once: their float32 softmax stays in the second cache
_SHORT = 320  # keys up to which two batched products beat the fused attention of PyTorch, in bfloat16


def frame_attention(packed: Tensor, frames: int, heads: int, queries: int, scale: float | None) -> Tensor:
    """Mix the values of each frame's tokens and its message.

    Args:
        packed: (frames * S + frames, 3 * D), contiguous: query, key and value of all tokens, then of the messages,
            whose queries are not used.
        frames: how many.
        heads: how many; D is ``heads * head_dim``.
        queries: of each frame the first 1 or S tokens attend.
        scale: of the scores; without one ``head_dim ** -0.5``.

    Returns:
        (frames * queries, D) in the dtype of ``packed``.
    """
    width = packed.shape[1] // 3
    head_dim = width // heads
    scale = head_dim**-0.5 if scale is None else scale
    tokens, messages = packed[:-frames].view(frames, -1, 3 * width), packed[-frames:, width:]
    if _attention_extension.refusal(tokens, messages, heads) is None:
        mixed, _ = _attention_extension.frame_attention_fwd(tokens, messages, heads, queries, scale, False)
        return mixed.view(frames * queries, width)
    own = tokens.view(frames, -1, 3, heads, head_dim)
    pair = packed.new_empty(2, frames, heads, own.shape[1] + 1, head_dim)
    pair[:, :, :, :-1] = own[:, :, 1:].permute(2, 0, 3, 1, 4)
    pair[:, :, :, -1] = messages.unflatten(1, (2, heads, head_dim)).transpose(0, 1)
    mixed = _attend(own[:, :queries, 0].transpose(1, 2), pair[0], pair[1], scale)
    return mixed.transpose(1, 2).reshape(frames * queries, width)


def _attend(query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
    """(F, heads, L, head_dim) queries, contiguous keys and values."""
    if query.dtype is not torch.bfloat16 or key.shape[2] > _SHORT or scale != 1.0:
        return scaled_dot_product_attention(query, key, value, scale=scale)
    shape = query.shape
    query, key, value = query.flatten(0, 1), key.flatten(0, 1).transpose(1, 2), value.flatten(0, 1)
    mixed = torch.empty_like(query)
    heads = max(1, _SCORES // (query.shape[1] * key.shape[2]))
    for first in range(0, len(query), heads):
        some = slice(first, first + heads)
        # PyTorch's softmax is twice as fast into float32 as into bfloat16
        weights = softmax(torch.bmm(query[some], key[some]), dim=-1, dtype=torch.float32).to(value.dtype)
        torch.bmm(weights, value[some], out=mixed[some])
    return mixed.view(shape)
