"""Intra-frame attention: a frame's tokens over themselves and the frame's message, from packed projections."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from xclip_fast.ops import _attention_extension
from xclip_fast.ops._backends import choose, explains
from xclip_fast.ops._dtypes import cast_for_gemm, exact_dtype
from xclip_fast.ops._frames import HEAD_DIMS
from xclip_fast.ops._register import fused_op


def frame_attention(qkv: Tensor, message_kv: Tensor, heads: int, *, backend: str | None = None) -> Tensor:
    """Attention of the S tokens of each frame over themselves and the frame's message, the key of row S + 1.

    The message has no query, and so no row of output. Scores are scaled by head_dim^-0.5; the kernels accumulate in
    float32.

    Args:
        qkv: (F, S, 3 D), query, key and value side by side in each row, each D = heads * head_dim, S >= 1. Rows may
            be any distance apart; without unit stride along a row it is copied.
        message_kv: (F, 2 D), key and value of each frame's message, side by side; dtype of ``qkv``.
        heads: number of heads; the kernels take a head_dim of 32, 64 or 128.
        backend: "reference", "torch", "triton", "extension" (bfloat16 and a head_dim of 64, on CPUs with AVX512-BF16),
            or the automatic choice.

    Returns:
        (F, S, D), contiguous, heads side by side in each row.

    Raises:
        ValueError: shapes or dtypes do not fit, or the backend asked for cannot serve the call.

    Source: intra-frame attention, paper, equation 5.

    Example:
        >>> import torch
        >>> from xclip_fast.ops import frame_attention
        >>> qkv, message_kv = torch.randn(2, 5, 3 * 64), torch.randn(2, 2 * 64)  # 2 frames of 5 tokens, a message each
        >>> frame_attention(qkv, message_kv, heads=2).shape
        torch.Size([2, 5, 64])
    """
    qkv, message_kv = cast_for_gemm(qkv, message_kv)
    _check(qkv, message_kv, heads)
    # only a backward pass needs the log-sum-exp
    with_lse = torch.is_grad_enabled() and (qkv.requires_grad or message_kv.requires_grad)
    chosen = choose(
        "frame_attention",
        backend,
        qkv,
        message_kv,
        refusal=size_refusal(qkv, heads),
        extension=_attention_extension.refusal(qkv, message_kv, heads),
        # its backward pass is the one below, in float32: for long frames slower than that of PyTorch's own attention
        extension_wins=not with_lse,
    )
    if chosen == "reference":
        return frame_attention_ref(qkv, message_kv, heads)
    if chosen == "torch":
        return _frame_attention_torch(qkv, message_kv, heads)
    return frame_attention_op(qkv, message_kv, heads, with_lse, chosen == "extension")[0]


def frame_attention_ref(qkv: Tensor, message_kv: Tensor, heads: int) -> Tensor:
    """The definition."""
    query, key, value = _query_key_value(qkv, message_kv, heads)
    scores = query @ key.transpose(-2, -1) * query.shape[-1] ** -0.5
    return (scores.softmax(dim=-1) @ value).transpose(1, 2).flatten(2)


def _frame_attention_torch(qkv: Tensor, message_kv: Tensor, heads: int) -> Tensor:
    query, key, value = _query_key_value(qkv, message_kv, heads)
    if torch.is_grad_enabled() and qkv.requires_grad:
        # a view would keep keys and values of the tokens, which have been copied, for the backward pass too
        query = query.contiguous()
    return torch.nn.functional.scaled_dot_product_attention(query, key, value).transpose(1, 2).flatten(2)


def _query_key_value(qkv: Tensor, message_kv: Tensor, heads: int) -> tuple[Tensor, Tensor, Tensor]:
    """Queries (F, heads, S, head_dim), a view; keys and values (F, heads, S + 1, head_dim), the message last."""
    query, key, value = qkv.chunk(3, dim=-1)
    message_key, message_value = message_kv.unsqueeze(1).chunk(2, dim=-1)
    rows = query, torch.cat([key, message_key], dim=1), torch.cat([value, message_value], dim=1)
    query, key, value = (part.unflatten(-1, (heads, -1)).transpose(1, 2) for part in rows)
    return query, key, value


def size_refusal(qkv: Tensor, heads: int) -> str | None:
    head_dim = qkv.shape[-1] // 3 // heads
    if head_dim in HEAD_DIMS:
        return None
    return f"it takes heads of {', '.join(map(str, HEAD_DIMS))} numbers, found {head_dim}"


def _launch(qkv: Tensor, message_kv: Tensor, heads: int, with_lse: bool, extension: bool) -> tuple[Tensor, Tensor]:
    from xclip_fast.kernels.frame_attention import frame_attention_fwd

    return frame_attention_fwd(qkv, message_kv, heads, with_lse)


def _kernel_refusal(qkv: Tensor, heads: int, extension: bool) -> str | None:
    return "the extension was asked for" if extension else size_refusal(qkv, heads)


def _fake(
    qkv: Tensor, message_kv: Tensor, heads: int, with_lse: bool = True, extension: bool = False
) -> tuple[Tensor, Tensor]:
    frames, tokens, packed = qkv.shape
    lse = qkv.new_empty(frames, heads, tokens, dtype=exact_dtype(qkv.dtype)) if with_lse else _no_lse(qkv)
    return qkv.new_empty(frames, tokens, packed // 3), lse


def _save(ctx: Any, inputs: Any, output: Any) -> None:
    qkv, message_kv, heads, with_lse, _ = inputs
    out, lse = output
    ctx.save_for_backward(qkv, message_kv, out, lse)
    ctx.heads, ctx.with_lse = heads, with_lse
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(lse)


def _backward(ctx: Any, grad: Tensor | None, _: None) -> Any:
    if grad is None:
        return (None,) * 5
    if not ctx.with_lse:
        raise ValueError("frame_attention was called with with_lse=False, which has no backward pass")
    grads = frame_attention_backward_op(grad, *ctx.saved_tensors, ctx.heads)
    return *grads, None, None, None


def _flops(qkv_shape: torch.Size, message_shape: torch.Size, heads: int, *args: object, **kwargs: object) -> int:
    """Two GEMMs of S queries with S + 1 keys."""
    frames, tokens, packed = qkv_shape
    return 4 * frames * tokens * (tokens + 1) * (packed // 3)


@fused_op(
    "frame_attention",
    launcher=_launch,
    fake=_fake,
    save=_save,
    backward=_backward,
    flops=_flops,
    refusal=_kernel_refusal,
)
def frame_attention_op(
    qkv: Tensor, message_kv: Tensor, heads: int, with_lse: bool = True, extension: bool = False
) -> tuple[Tensor, Tensor]:
    """The rows, and the base 2 log-sum-exp of the scores as (F, heads, S), not rounded; empty where not asked for."""
    if extension:
        scale = (qkv.shape[-1] // 3 // heads) ** -0.5
        return _attention_extension.frame_attention_fwd(qkv, message_kv, heads, qkv.shape[1], scale, with_lse)
    out = _frame_attention_torch(qkv, message_kv, heads).contiguous()
    if not with_lse:
        return out, _no_lse(qkv)
    return out, _scores(qkv, message_kv, heads).logsumexp(dim=-1) * math.log2(math.e)


def _backward_fake(
    grad: Tensor, qkv: Tensor, message_kv: Tensor, out: Tensor, lse: Tensor, heads: int
) -> tuple[Tensor, Tensor]:
    return qkv.new_empty(qkv.shape), qkv.new_empty(message_kv.shape)


def _backward_flops(grad_shape: torch.Size, qkv_shape: torch.Size, *args: object, **kwargs: object) -> int:
    """Five GEMMs, as PyTorch counts its own attention; the kernels recompute two of them and execute seven."""
    frames, tokens, packed = qkv_shape
    return 10 * frames * tokens * (tokens + 1) * (packed // 3)


@fused_op(
    "frame_attention_backward",
    launcher="xclip_fast.kernels.frame_attention_bwd.frame_attention_bwd",
    fake=_backward_fake,
    flops=_backward_flops,
    refusal=size_refusal,
)
def frame_attention_backward_op(
    grad: Tensor, qkv: Tensor, message_kv: Tensor, out: Tensor, lse: Tensor, heads: int
) -> tuple[Tensor, Tensor]:
    """Gradients of ``qkv`` and ``message_kv``."""
    exact = exact_dtype(qkv.dtype)
    query, key, value = (part.to(exact) for part in _query_key_value(qkv, message_kv, heads))
    grad_heads = grad.to(exact).unflatten(-1, (heads, -1)).transpose(1, 2)
    out_heads = out.to(exact).unflatten(-1, (heads, -1)).transpose(1, 2)
    weights = (_scores(qkv, message_kv, heads) * math.log2(math.e) - lse.unsqueeze(-1)).exp2()
    delta = (grad_heads * out_heads).sum(dim=-1, keepdim=True)
    grad_scores = weights * (grad_heads @ value.transpose(-2, -1) - delta) * query.shape[-1] ** -0.5
    grads = grad_scores @ key, grad_scores.transpose(-2, -1) @ query, weights.transpose(-2, -1) @ grad_heads
    grad_query, grad_key, grad_value = (part.transpose(1, 2).flatten(2).to(qkv.dtype) for part in grads)
    tokens = qkv.shape[1]
    grad_qkv = torch.cat([grad_query, grad_key[:, :tokens], grad_value[:, :tokens]], dim=-1)
    return grad_qkv, torch.cat([grad_key[:, tokens], grad_value[:, tokens]], dim=-1)


def _scores(qkv: Tensor, message_kv: Tensor, heads: int) -> Tensor:
    query, key, _ = (part.to(exact_dtype(qkv.dtype)) for part in _query_key_value(qkv, message_kv, heads))
    return query @ key.transpose(-2, -1) * query.shape[-1] ** -0.5


def _no_lse(qkv: Tensor) -> Tensor:
    return qkv.new_empty(0, dtype=exact_dtype(qkv.dtype))


def _check(qkv: Tensor, message_kv: Tensor, heads: int) -> None:
    if heads < 1:
        raise ValueError(f"heads must be positive, found {heads}")
    if qkv.ndim != 3 or not qkv.is_floating_point() or 0 in qkv.shape[1:] or qkv.shape[2] % (3 * heads):
        raise ValueError(
            f"qkv must be a floating point (F, S, 3 * D) tensor with S >= 1 and D a multiple of {heads} heads, "
            f"found {qkv.dtype} {tuple(qkv.shape)}"
        )
    expected = (qkv.shape[0], qkv.shape[2] // 3 * 2)
    if tuple(message_kv.shape) != expected or message_kv.dtype != qkv.dtype:
        raise ValueError(
            f"message_kv must be {qkv.dtype} {expected} to fit qkv, found {message_kv.dtype} {tuple(message_kv.shape)}"
        )


explains(frame_attention, size_refusal, extension=_attention_extension.refusal)
