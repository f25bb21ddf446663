"""Attention of class texts over the patches of each video, without a classes x patches buffer."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from xclip_fast.ops._backends import choose, explains
from xclip_fast.ops._dtypes import cast_for_gemm, exact_dtype
from xclip_fast.ops._frames import HEAD_DIMS
from xclip_fast.ops._register import fused_op


def prompt_attention(query: Tensor, key: Tensor, value: Tensor, heads: int, *, backend: str | None = None) -> Tensor:
    """Each of K class texts attends to the N patches of each of B videos.

    Args:
        query: (B, K, E), or (1, K, E) shared by all videos; any strides.
        key, value: (B, N, E) with N >= 1, in the dtype of ``query``; parts of a packed projection are read in place.
        heads: attention heads; E / heads is the head dimension.
        backend: "reference", "torch", "triton" (head dimensions 32, 64, 128), or the automatic choice.

    Returns:
        (B, K, E) in the dtype of ``query``, or of autocast, heads side by side. Scores and sums are in float32.

    Raises:
        ValueError: shapes or dtypes do not fit, or the backend asked for cannot serve the call.

    Source: the cross attention of the video-specific prompts, paper, equation 8.

    Example:
        >>> import torch
        >>> from xclip_fast.ops import prompt_attention
        >>> texts = torch.randn(1, 3, 64)  # 3 classes, shared by both videos
        >>> key, value = torch.randn(2, 4, 2 * 64).chunk(2, -1)  # 2 videos of 4 patches
        >>> prompt_attention(texts, key, value, heads=2).shape
        torch.Size([2, 3, 64])
    """
    query, key, value = cast_for_gemm(query, key, value)
    _check(query, key, value, heads)
    refusal = _size_refusal(query, heads)
    chosen = choose("prompt_attention", backend, query, key, value, refusal=refusal)
    if chosen == "reference":
        return prompt_attention_ref(query, key, value, heads)
    if chosen == "torch":
        return _prompt_attention_torch(query, key, value, heads)
    return prompt_attention_op(query, key, value, heads)[0]


def prompt_attention_ref(query: Tensor, key: Tensor, value: Tensor, heads: int) -> Tensor:
    """The definition."""
    query, key, value = (_split(x, heads) for x in (query, key, value))
    scores = query @ key.transpose(-2, -1) * query.shape[-1] ** -0.5
    return _join(scores.softmax(-1) @ value)


def _prompt_attention_torch(query: Tensor, key: Tensor, value: Tensor, heads: int) -> Tensor:
    query = query.expand(key.shape[0], -1, -1)
    query, key, value = (_split(x, heads) for x in (query, key, value))
    return _join(scaled_dot_product_attention(query, key, value))


def _size_refusal(query: Tensor, heads: int) -> str | None:
    head_dim = query.shape[-1] // heads
    return None if head_dim in HEAD_DIMS else f"its head dimension is 32, 64 or 128, found {head_dim}"


def _fake(query: Tensor, key: Tensor, value: Tensor, heads: int) -> tuple[Tensor, Tensor]:
    batch, classes = key.shape[0], query.shape[1]
    return query.new_empty(batch, classes, query.shape[2]), query.new_empty(
        batch, heads, classes, dtype=exact_dtype(query.dtype)
    )


def _save(ctx: Any, inputs: Any, output: Any) -> None:
    query, key, value, ctx.heads = inputs
    ctx.save_for_backward(query, key, value, *output)
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(output[1])


def _backward(ctx: Any, grad: Tensor | None, _: None) -> Any:
    if grad is None:
        return None, None, None, None
    saved = ctx.saved_tensors
    grad_query, grad_key, grad_value = prompt_attention_backward_op(grad, *saved, ctx.heads)
    if saved[0].shape[0] != grad_query.shape[0]:
        grad_query = grad_query.sum(0, keepdim=True)
    return grad_query, grad_key, grad_value, None


def _gemm(query_shape: Any, key_shape: Any) -> int:
    """Operations of one GEMM of all classes with all patches."""
    return 2 * key_shape[0] * query_shape[1] * key_shape[1] * query_shape[2]


def _flops(query_shape: Any, key_shape: Any, *args: object, **kwargs: object) -> int:
    """Two GEMMs."""
    return 2 * _gemm(query_shape, key_shape)


@fused_op(
    "prompt_attention",
    launcher="xclip_fast.kernels.prompt_attention.prompt_attention_fwd",
    fake=_fake,
    save=_save,
    backward=_backward,
    flops=_flops,
    refusal=_size_refusal,
)
def prompt_attention_op(query: Tensor, key: Tensor, value: Tensor, heads: int) -> tuple[Tensor, Tensor]:
    """The result, and the base-2 logarithm of each softmax's denominator (B, heads, K)."""
    q, k = (_split(x.to(exact_dtype(query.dtype)), heads) for x in (query, key))
    lse = torch.logsumexp(q @ k.transpose(-2, -1) * q.shape[-1] ** -0.5, dim=-1)
    out = _prompt_attention_torch(query, key, value, heads).contiguous()
    return out, lse.expand(key.shape[0], -1, -1) / torch.log(lse.new_full((), 2.0))


def _backward_fake(
    grad: Tensor, query: Tensor, key: Tensor, value: Tensor, out: Tensor, lse: Tensor, heads: int
) -> tuple[Tensor, Tensor, Tensor]:
    return out.new_empty(out.shape), key.new_empty(key.shape), value.new_empty(value.shape)


def _backward_flops(grad_shape: Any, query_shape: Any, key_shape: Any, *args: object, **kwargs: object) -> int:
    """Five GEMMs by the usual count; the kernels compute the scores and the weights' gradient twice, so seven."""
    return 5 * _gemm(query_shape, key_shape)


@fused_op(
    "prompt_attention_backward",
    launcher="xclip_fast.kernels.prompt_attention.prompt_attention_bwd",
    fake=_backward_fake,
    flops=_backward_flops,
    refusal=_size_refusal,
)
def prompt_attention_backward_op(
    grad: Tensor, query: Tensor, key: Tensor, value: Tensor, out: Tensor, lse: Tensor, heads: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of query, per video (B, K, E), key and value; the weights are computed again."""
    exact = exact_dtype(query.dtype)
    q, k, v, g, o = (_split(x.to(exact), heads) for x in (query, key, value, grad, out))
    scale = q.shape[-1] ** -0.5
    weights = (q @ k.transpose(-2, -1) * scale).softmax(-1)
    grad_scores = weights * (g @ v.transpose(-2, -1) - (g * o).sum(-1, keepdim=True)) * scale
    grads = grad_scores @ k, grad_scores.transpose(-2, -1) @ q, weights.transpose(-2, -1) @ g
    grad_query, grad_key, grad_value = (_join(x).to(query.dtype).contiguous() for x in grads)
    return grad_query, grad_key, grad_value


def _split(x: Tensor, heads: int) -> Tensor:
    """(B, L, E) to (B, heads, L, E / heads)."""
    return x.unflatten(-1, (heads, -1)).transpose(1, 2)


def _join(x: Tensor) -> Tensor:
    """(B, heads, L, E / heads) to (B, L, E)."""
    return x.transpose(1, 2).flatten(2)


def _check(query: Tensor, key: Tensor, value: Tensor, heads: int) -> None:
    if query.ndim != 3 or not query.is_floating_point() or heads < 1 or query.shape[2] % heads or not query.shape[2]:
        raise ValueError(
            "query must be a floating point (B, K, E) tensor with E a multiple of heads, "
            f"found {query.dtype} {tuple(query.shape)} and {heads} heads"
        )
    fits = key.ndim == 3 and key.shape[1] > 0 and key.shape[2] == query.shape[2] and key.dtype == query.dtype
    if not fits or query.shape[0] not in (1, key.shape[0]):
        raise ValueError(
            f"key must be {query.dtype} (B, N, {query.shape[2]}) with N >= 1 and B fitting the query, "
            f"found {key.dtype} {tuple(key.shape)} for a query of {tuple(query.shape)}"
        )
    if value.shape != key.shape or value.dtype != key.dtype:
        raise ValueError(
            f"value must be {key.dtype} {tuple(key.shape)} like key, found {value.dtype} {tuple(value.shape)}"
        )


explains(prompt_attention, _size_refusal)
