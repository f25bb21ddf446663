"""Mean over the frames of the layer norm of the patches: what the prompts need, before the projection."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from xclip_fast.ops._backends import choose, explains
from xclip_fast.ops._dtypes import cast_for_sum, exact_dtype
from xclip_fast.ops._register import fused_op
from xclip_fast.ops.layer_norm import size_refusal


def mean_norm_over_frames(
    tokens: Tensor,
    weight: Tensor,
    bias: Tensor,
    *,
    residual: Tensor | None = None,
    constant: Tensor | None = None,
    eps: float = 1e-5,
    backend: str | None = None,
) -> Tensor:
    """``layer_norm(tokens + residual + constant).mean(frames)`` in one pass over the tokens.

    The projection that follows is linear, so taking the mean first is exact and costs T times less.

    Args:
        tokens: (B, T, N, D) with T >= 1, usually the view without the class token; any strides.
        weight, bias: (D,) in the dtype of ``tokens``, or in float32.
        residual: like ``tokens``, added first; the sum is not rounded. Under autocast both may have a dtype of
            their own: the wider one counts.
        constant: (D,), like ``weight``, added to each row before normalising; the engine passes the biases its residual
            stream leaves out. Its gradient is the sum of that of the tokens as it is rounded.
        eps: added to the variance.
        backend: "reference", "torch", "triton", or the automatic choice.

    Returns:
        (B, N, D) in the dtype of ``tokens``; statistics and sums are in float32.

    Raises:
        ValueError: shapes or dtypes do not fit, or the backend asked for cannot serve the call.

    Source: ``prompts_visual_ln`` and the mean over frames of the official ``encode_video`` and ``forward``.

    Example:
        >>> import torch
        >>> from xclip_fast.ops import mean_norm_over_frames
        >>> tokens = torch.randn(2, 8, 5, 64)  # 2 clips of 8 frames, each a class token and 4 patches
        >>> mean = mean_norm_over_frames(tokens[:, :, 1:], torch.ones(64), torch.zeros(64))
        >>> torch.allclose(mean, torch.nn.functional.layer_norm(tokens[:, :, 1:], (64,)).mean(1), atol=1e-5)
        True
    """
    tokens, residual = cast_for_sum(tokens, residual)
    _check(tokens, weight, bias, residual, constant)
    refusal = size_refusal(tokens)
    chosen = choose("mean_norm_over_frames", backend, tokens, weight, bias, residual, constant, refusal=refusal)
    if chosen == "reference":
        return mean_norm_over_frames_ref(tokens, weight, bias, residual, constant, eps)
    if chosen == "torch":
        return _mean_norm_over_frames_torch(tokens, weight, bias, residual, constant, eps)
    return mean_norm_over_frames_op(tokens, weight, bias, residual, constant, eps)


def mean_norm_over_frames_ref(
    tokens: Tensor, weight: Tensor, bias: Tensor, residual: Tensor | None, constant: Tensor | None, eps: float
) -> Tensor:
    """The definition."""
    tokens = tokens if residual is None else tokens + residual
    shifted = tokens if constant is None else tokens + constant
    centred = shifted - shifted.mean(-1, keepdim=True)
    deviation = (centred.square().mean(-1, keepdim=True) + eps).sqrt()
    return (centred / deviation * weight + bias).mean(1).to(tokens.dtype)


def _mean_norm_over_frames_torch(
    tokens: Tensor, weight: Tensor, bias: Tensor, residual: Tensor | None, constant: Tensor | None, eps: float
) -> Tensor:
    tokens = tokens if residual is None else tokens + residual
    tokens = tokens if constant is None else tokens + constant.to(tokens.dtype)
    weight, bias = weight.to(tokens.dtype), bias.to(tokens.dtype)
    return torch.nn.functional.layer_norm(tokens, tokens.shape[-1:], weight, bias, eps).mean(1)


def _fake(
    tokens: Tensor, weight: Tensor, bias: Tensor, residual: Tensor | None, constant: Tensor | None, eps: float
) -> Tensor:
    return tokens.new_empty(tokens.shape[0], tokens.shape[2], tokens.shape[3])


def _save(ctx: Any, inputs: Any, output: Any) -> None:
    tokens, weight, bias, residual, constant, ctx.eps = inputs
    ctx.save_for_backward(tokens, weight, residual, constant)
    ctx.bias_dtype = bias.dtype


def _backward(ctx: Any, grad: Tensor) -> Any:
    tokens, weight, residual, constant = ctx.saved_tensors
    grad_tokens, vectors = mean_norm_over_frames_backward_op(grad, tokens, weight, residual, constant, ctx.eps)
    grad_residual = None if residual is None else grad_tokens
    grad_constant = grad_tokens.sum((0, 1, 2)).to(constant.dtype) if ctx.needs_input_grad[4] else None
    return grad_tokens, vectors[0].to(weight.dtype), vectors[1].to(ctx.bias_dtype), grad_residual, grad_constant, None


@fused_op(
    "mean_norm_over_frames",
    launcher="xclip_fast.kernels.mean_norm_over_frames.mean_norm_over_frames_fwd",
    fake=_fake,
    save=_save,
    backward=_backward,
)
def mean_norm_over_frames_op(
    tokens: Tensor, weight: Tensor, bias: Tensor, residual: Tensor | None, constant: Tensor | None, eps: float
) -> Tensor:
    return _mean_norm_over_frames_torch(tokens, weight, bias, residual, constant, eps)


def _backward_fake(
    grad: Tensor, tokens: Tensor, weight: Tensor, residual: Tensor | None, constant: Tensor | None, eps: float
) -> tuple[Tensor, Tensor]:
    exact = exact_dtype(tokens.dtype)
    return tokens.new_empty(tokens.shape), tokens.new_empty(2, tokens.shape[-1], dtype=exact)


@fused_op(
    "mean_norm_over_frames_backward",
    launcher="xclip_fast.kernels.mean_norm_over_frames.mean_norm_over_frames_bwd",
    fake=_backward_fake,
)
def mean_norm_over_frames_backward_op(
    grad: Tensor, tokens: Tensor, weight: Tensor, residual: Tensor | None, constant: Tensor | None, eps: float
) -> tuple[Tensor, Tensor]:
    """Gradient of the tokens and the residual, and of weight and bias as (2, D) not rounded; statistics anew."""
    exact = exact_dtype(tokens.dtype)
    x = tokens.to(exact) if residual is None else tokens.to(exact) + residual
    x = x if constant is None else x + constant
    centred = x - x.mean(-1, keepdim=True)
    rstd = (centred.square().mean(-1, keepdim=True) + eps).rsqrt()
    normalised = centred * rstd
    spread = grad.to(exact).unsqueeze(1) / tokens.shape[1]
    weighted = spread * weight
    grad_x = weighted - weighted.mean(-1, keepdim=True) - normalised * (weighted * normalised).mean(-1, keepdim=True)
    grad_weight = (spread * normalised).sum((0, 1, 2))
    grad_tokens = (grad_x * rstd).to(tokens.dtype).contiguous()
    return grad_tokens, torch.stack([grad_weight, grad.to(exact).sum((0, 1))])


def _check(tokens: Tensor, weight: Tensor, bias: Tensor, residual: Tensor | None, constant: Tensor | None) -> None:
    if tokens.ndim != 4 or not tokens.is_floating_point() or tokens.shape[1] == 0 or tokens.shape[3] == 0:
        raise ValueError(
            "tokens must be a floating point (B, T, N, D) tensor with T >= 1 and D >= 1, "
            f"found {tokens.dtype} {tuple(tokens.shape)}"
        )
    for name, vector in (("weight", weight), ("bias", bias), ("constant", constant)):
        if vector is not None and vector.shape != tokens.shape[-1:]:
            raise ValueError(f"{name} must have shape ({tokens.shape[-1]},) to fit tokens, found {tuple(vector.shape)}")
    if residual is not None and (residual.shape != tokens.shape or residual.dtype != tokens.dtype):
        raise ValueError(
            f"residual must be {tokens.dtype} {tuple(tokens.shape)} like tokens, "
            f"found {residual.dtype} {tuple(residual.shape)}"
        )


explains(mean_norm_over_frames, lambda tokens: size_refusal(tokens))
