"""Logits of videos against adapted class texts in one pass."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import normalize

from xclip_fast.ops._backends import choose, explains
from xclip_fast.ops._dtypes import cast_for_gemm, exact_dtype
from xclip_fast.ops._register import fused_op
from xclip_fast.ops.layer_norm import size_refusal


def clip_logits(
    video: Tensor,
    text: Tensor,
    prompts: Tensor,
    alpha: Tensor,
    logit_scale: Tensor,
    *,
    residual: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """``exp(logit_scale) * cos(video, text + alpha * (prompts + residual))``, without the adapted texts in memory.

    Args:
        video: (B, E), not normalised, in the dtype of ``text``, or in half precision beside texts in float32.
        text: (K, E), the class texts, not normalised.
        prompts: (B, K, E), what the prompt layers made of the texts for each video, in a dtype as for ``video``.
        alpha: (E,), scale of the prompts, in the dtype of ``text``, or in float32.
        logit_scale: a scalar tensor, likewise.
        residual: like ``prompts``, added to them, any strides; the sum is not rounded.
        backend: "reference", "torch", "triton", or the automatic choice.

    Returns:
        (B, K) in the dtype of ``text``, or of autocast; norms and sums are in float32.

    Raises:
        ValueError: shapes or dtypes do not fit, or the backend asked for cannot serve the call.

    Source: paper, equations 7 and 1, and the end of the official ``forward``.

    Example:
        >>> import torch
        >>> from xclip_fast.ops import clip_logits
        >>> video, text, prompts = torch.randn(2, 64), torch.randn(3, 64), torch.randn(2, 3, 64)
        >>> alpha, logit_scale = torch.zeros(64), torch.tensor(100.0).log()  # without prompts CLIP's logits
        >>> cosines = torch.nn.functional.cosine_similarity(video[:, None], text, dim=-1)
        >>> torch.allclose(clip_logits(video, text, prompts, alpha, logit_scale), 100 * cosines, atol=1e-3)
        True
    """
    video, text, prompts, residual = cast_for_gemm(video, text, prompts, residual)
    _check(video, text, prompts, alpha, logit_scale, residual)
    tensors = (video, text, prompts, alpha, logit_scale, residual)
    chosen = choose("clip_logits", backend, *tensors, refusal=size_refusal(video))
    if chosen == "reference":
        return clip_logits_ref(*tensors)
    if chosen == "torch":
        return _clip_logits_torch(*tensors)
    return clip_logits_op(*tensors)


def clip_logits_ref(
    video: Tensor, text: Tensor, prompts: Tensor, alpha: Tensor, logit_scale: Tensor, residual: Tensor | None
) -> Tensor:
    """The definition."""
    prompts = prompts if residual is None else prompts.to(text.dtype) + residual
    adapted = text + alpha * prompts
    unit = normalize(video.to(text.dtype), dim=-1).to(adapted.dtype)
    cosine = torch.einsum("be,bke->bk", unit, normalize(adapted, dim=-1))
    return (logit_scale.exp() * cosine).to(text.dtype)


def _clip_logits_torch(
    video: Tensor, text: Tensor, prompts: Tensor, alpha: Tensor, logit_scale: Tensor, residual: Tensor | None
) -> Tensor:
    # float32 inside, as the kernels: cosines are differences of large sums
    exact = exact_dtype(video.dtype)
    prompts = prompts.to(exact) if residual is None else prompts.to(exact) + residual
    adapted = torch.addcmul(text.to(exact), alpha.to(exact), prompts)
    dots = (adapted * normalize(video.to(exact), dim=-1).unsqueeze(1)).sum(-1)
    lengths = torch.linalg.vector_norm(adapted, dim=-1).clamp_min(1e-12)
    return (logit_scale.to(exact).exp() * dots / lengths).to(text.dtype)


def _fake(
    video: Tensor, text: Tensor, prompts: Tensor, alpha: Tensor, logit_scale: Tensor, residual: Tensor | None
) -> Tensor:
    return text.new_empty(prompts.shape[:2])


def _save(ctx: Any, inputs: Any, output: Any) -> None:
    ctx.save_for_backward(*inputs)


def _backward(ctx: Any, grad: Tensor) -> Any:
    saved = ctx.saved_tensors
    video, _, _, alpha, logit_scale, residual = saved
    grad_unit, grad_text, grad_prompts, grad_alpha, grad_scale = clip_logits_backward_op(grad, *saved)
    # through the normalisation of the videos: B rows, left to torch
    exact = video.to(grad_unit.dtype)
    length = torch.linalg.vector_norm(exact, dim=-1, keepdim=True).clamp_min(1e-12)
    unit = exact / length
    grad_video = (grad_unit - (grad_unit * unit).sum(-1, keepdim=True) * unit) / length
    return (
        grad_video.to(video.dtype),
        grad_text,
        grad_prompts,
        grad_alpha.to(alpha.dtype),
        grad_scale.to(logit_scale.dtype),
        None if residual is None else grad_prompts,
    )


def _flops(video_shape: Any, text_shape: Any, prompts_shape: Any, *args: object, **kwargs: object) -> int:
    """One dot product a video and class."""
    return 2 * torch.Size(prompts_shape).numel()


@fused_op(
    "clip_logits",
    launcher="xclip_fast.kernels.clip_logits.clip_logits_fwd",
    fake=_fake,
    save=_save,
    backward=_backward,
    flops=_flops,
)
def clip_logits_op(
    video: Tensor, text: Tensor, prompts: Tensor, alpha: Tensor, logit_scale: Tensor, residual: Tensor | None
) -> Tensor:
    return clip_logits_ref(video, text, prompts, alpha, logit_scale, residual)


def _backward_fake(
    grad: Tensor,
    video: Tensor,
    text: Tensor,
    prompts: Tensor,
    alpha: Tensor,
    logit_scale: Tensor,
    residual: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    exact = exact_dtype(video.dtype)
    return (
        video.new_empty(video.shape, dtype=exact),
        text.new_empty(text.shape),
        prompts.new_empty(prompts.shape),
        alpha.new_empty(alpha.shape, dtype=exact),
        logit_scale.new_empty((), dtype=exact),
    )


def _backward_flops(
    grad_shape: Any, video_shape: Any, text_shape: Any, prompts_shape: Any, *args: object, **kwargs: object
) -> int:
    """Two, one for each factor."""
    return 4 * torch.Size(prompts_shape).numel()


@fused_op(
    "clip_logits_backward",
    launcher="xclip_fast.kernels.clip_logits.clip_logits_bwd",
    fake=_backward_fake,
    flops=_backward_flops,
)
def clip_logits_backward_op(
    grad: Tensor,
    video: Tensor,
    text: Tensor,
    prompts: Tensor,
    alpha: Tensor,
    logit_scale: Tensor,
    residual: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of the normalised videos, text, prompts, alpha and logit_scale; all but the texts' not rounded."""
    exact = exact_dtype(video.dtype)
    prompted = prompts.to(exact) if residual is None else prompts.to(exact) + residual
    adapted = text.to(exact) + alpha * prompted
    length = torch.linalg.vector_norm(adapted, dim=-1, keepdim=True).clamp_min(1e-12)
    direction = adapted / length
    unit = normalize(video.to(exact), dim=-1).unsqueeze(1)
    cosine = (direction * unit).sum(-1, keepdim=True)
    scaled = grad.to(exact).unsqueeze(-1) * logit_scale.to(exact).exp()
    grad_adapted = scaled / length * (unit - cosine * direction)
    return (
        (scaled * direction).sum(1),
        grad_adapted.sum(0).to(text.dtype),
        (grad_adapted * alpha).to(prompts.dtype),
        (grad_adapted * prompted).sum((0, 1)),
        (scaled * cosine).sum(),
    )


def _check(
    video: Tensor, text: Tensor, prompts: Tensor, alpha: Tensor, logit_scale: Tensor, residual: Tensor | None
) -> None:
    if video.ndim != 2 or not video.is_floating_point() or video.shape[1] == 0:
        raise ValueError(
            f"video must be a floating point (B, E) tensor with E >= 1, found {video.dtype} {tuple(video.shape)}"
        )
    batch, width = video.shape
    if text.ndim != 2 or text.shape[1] != width or text.dtype not in (video.dtype, exact_dtype(video.dtype)):
        raise ValueError(
            f"text must be {video.dtype} (K, {width}) to fit video, or {exact_dtype(video.dtype)}, "
            f"found {text.dtype} {tuple(text.shape)}"
        )
    expected = (batch, text.shape[0], width)
    if prompts.shape != expected or text.dtype not in (prompts.dtype, exact_dtype(prompts.dtype)):
        raise ValueError(
            f"prompts must be {text.dtype} {expected} to fit video and text, or less precise, "
            f"found {prompts.dtype} {tuple(prompts.shape)}"
        )
    if residual is not None and (residual.shape != expected or residual.dtype != prompts.dtype):
        raise ValueError(
            f"residual must be {prompts.dtype} {expected} like prompts, found {residual.dtype} {tuple(residual.shape)}"
        )
    if alpha.shape != (width,):
        raise ValueError(f"alpha must have shape ({width},) to fit video, found {tuple(alpha.shape)}")
    if logit_scale.numel() != 1 or logit_scale.ndim != 0:
        raise ValueError(f"logit_scale must be a scalar tensor, found shape {tuple(logit_scale.shape)}")


explains(clip_logits, lambda video: size_refusal(video))
