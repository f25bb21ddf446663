"""Layer norm with an optional residual or constant added first: one pass forward, one backward."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from xclip_fast.ops._backends import choose, explains
from xclip_fast.ops._dtypes import cast_for_sum, exact_dtype
from xclip_fast.ops._register import fused_op

MAX_WIDTH = 8192  # a row is held in registers


def layer_norm(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    *,
    residual: Tensor | None = None,
    constant: Tensor | None = None,
    eps: float = 1e-5,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """``layer_norm(x + residual + constant)`` and the residual stream ``x + residual``.

    Args:
        x: (..., D), any strides.
        weight, bias: (D,) in the dtype of ``x``, or in float32.
        residual: (..., D) like ``x``; the sum is rounded to the dtype of ``x`` once, after the norm has used it.
            Under autocast both may have a dtype of their own: the wider one counts.
        constant: (D,), like ``weight``, added to each row before normalising, not written to the stream; the engine
            passes the biases its stream leaves out.
        eps: added to the variance.
        backend: "reference", "torch", "triton", or the automatic choice.

    Returns:
        The normalised rows and the stream, both (..., D) in the dtype of ``x``. Without a residual the stream is ``x``.
        Statistics are computed and kept in float32 by the kernels.

    Raises:
        ValueError: shapes or dtypes do not fit, or the backend asked for cannot serve the call.

    Source: the norms of the pre-norm blocks, paper, equations 4 to 6.

    Example:
        >>> import torch
        >>> from xclip_fast.ops import layer_norm
        >>> x, branch, weight, bias = torch.randn(4, 64), torch.randn(4, 64), torch.ones(64), torch.zeros(64)
        >>> normed, stream = layer_norm(x, weight, bias, residual=branch)
        >>> torch.equal(stream, x + branch)
        True
        >>> torch.allclose(normed, torch.nn.functional.layer_norm(stream, (64,)), atol=1e-5)
        True
    """
    x, residual = cast_for_sum(x, residual)
    _check(x, weight, bias, residual, constant)
    refusal = size_refusal(x)
    chosen = choose("layer_norm", backend, x, weight, bias, residual, constant, refusal=refusal)
    if chosen == "reference":
        return layer_norm_ref(x, weight, bias, residual, constant, eps)
    if chosen == "torch":
        return _layer_norm_torch(x, weight, bias, residual, constant, eps)
    normed, stream, _, _ = layer_norm_op(x, weight, bias, residual, constant, eps)
    return normed, x if residual is None else stream


def layer_norm_ref(
    x: Tensor, weight: Tensor, bias: Tensor, residual: Tensor | None, constant: Tensor | None, eps: float
) -> tuple[Tensor, Tensor]:
    """The definition."""
    stream = x if residual is None else x + residual
    shifted = stream if constant is None else stream + constant
    centred = shifted - shifted.mean(-1, keepdim=True)
    deviation = (centred.square().mean(-1, keepdim=True) + eps).sqrt()
    return (centred / deviation * weight + bias).to(x.dtype), stream


def _layer_norm_torch(
    x: Tensor, weight: Tensor, bias: Tensor, residual: Tensor | None, constant: Tensor | None, eps: float
) -> tuple[Tensor, Tensor]:
    stream = x if residual is None else x + residual
    shifted = stream if constant is None else stream + constant.to(x.dtype)
    normed = torch.nn.functional.layer_norm(shifted, x.shape[-1:], weight.to(x.dtype), bias.to(x.dtype), eps)
    return normed, stream


def _fake(
    x: Tensor, weight: Tensor, bias: Tensor, residual: Tensor | None, constant: Tensor | None, eps: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    rows = x.numel() // x.shape[-1]
    statistics = x.new_empty(rows, dtype=exact_dtype(x.dtype))
    stream = x.new_empty(x.shape) if residual is not None else x.new_empty(0)
    return x.new_empty(x.shape), stream, statistics, torch.empty_like(statistics)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    x, weight, bias, residual, constant, _ = inputs
    _, stream, mean, rstd = output
    ctx.save_for_backward(x if residual is None else stream, weight, constant, mean, rstd)
    ctx.bias_dtype = bias.dtype
    ctx.has_residual = residual is not None
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(mean, rstd)


def _backward(ctx: Any, grad_normed: Tensor | None, grad_stream: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
    stream, weight, constant, mean, rstd = ctx.saved_tensors
    if not ctx.has_residual:
        grad_stream = None
    if grad_normed is None:
        return grad_stream, None, None, grad_stream, None, None
    grad_x, vectors = layer_norm_backward_op(grad_normed, grad_stream, stream, weight, constant, mean, rstd)
    # one cast where all have the dtype of the weight
    grad_weight, grad_bias, grad_constant = vectors.to(weight.dtype).unbind(0)
    if ctx.bias_dtype != weight.dtype:
        grad_bias = vectors[1].to(ctx.bias_dtype)
    if constant is not None and constant.dtype != weight.dtype:
        grad_constant = vectors[2].to(constant.dtype)
    grad_residual = grad_x if ctx.has_residual else None
    return grad_x, grad_weight, grad_bias, grad_residual, None if constant is None else grad_constant, None


def size_refusal(x: Tensor) -> str | None:
    """The reason why the rows of ``x`` are too wide for a kernel that holds a row in registers, or None."""
    return f"its rows hold up to {MAX_WIDTH} numbers, found {x.shape[-1]}" if x.shape[-1] > MAX_WIDTH else None


@fused_op(
    "layer_norm", launcher="xclip_fast.kernels.layer_norm.layer_norm_fwd", fake=_fake, save=_save, backward=_backward
)
def layer_norm_op(
    x: Tensor, weight: Tensor, bias: Tensor, residual: Tensor | None, constant: Tensor | None, eps: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Normed rows, the stream (empty without a residual), mean and 1 / deviation of each row."""
    normed, stream = _layer_norm_torch(x, weight, bias, residual, constant, eps)
    shifted = (stream if constant is None else stream + constant).to(exact_dtype(x.dtype))
    variance, mean = torch.var_mean(shifted, dim=-1, correction=0)
    stream = stream if residual is not None else x.new_empty(0)
    return normed, stream, mean.flatten(), (variance + eps).rsqrt().flatten()


def _backward_fake(
    grad_normed: Tensor,
    grad_stream: Tensor | None,
    stream: Tensor,
    weight: Tensor,
    constant: Tensor | None,
    mean: Tensor,
    rstd: Tensor,
) -> tuple[Tensor, Tensor]:
    return stream.new_empty(stream.shape), mean.new_empty(3, weight.shape[0])


@fused_op("layer_norm_backward", launcher="xclip_fast.kernels.layer_norm.layer_norm_bwd", fake=_backward_fake)
def layer_norm_backward_op(
    grad_normed: Tensor,
    grad_stream: Tensor | None,
    stream: Tensor,
    weight: Tensor,
    constant: Tensor | None,
    mean: Tensor,
    rstd: Tensor,
) -> tuple[Tensor, Tensor]:
    """Gradient of the stream, with ``grad_stream`` added, and of weight, bias and constant, as (3, D) not rounded."""
    width = stream.shape[-1]
    exact = mean.dtype
    rows = stream.reshape(-1, width).to(exact)
    rows = rows if constant is None else rows + constant
    normalised = (rows - mean[:, None]) * rstd[:, None]
    grad = grad_normed.reshape(-1, width).to(exact)
    weighted = grad * weight
    centred = weighted - weighted.mean(-1, keepdim=True)
    grad_x = (centred - normalised * (weighted * normalised).mean(-1, keepdim=True)) * rstd[:, None]
    grad_constant = grad_x.sum(0)
    grad_x = grad_x.reshape(stream.shape)
    grad_x = grad_x if grad_stream is None else grad_x + grad_stream
    return grad_x.to(stream.dtype), torch.stack([(grad * normalised).sum(0), grad.sum(0), grad_constant])


def _check(x: Tensor, weight: Tensor, bias: Tensor, residual: Tensor | None, constant: Tensor | None) -> None:
    shape = x.shape
    if not shape or not shape[-1] or not x.is_floating_point():
        raise ValueError(f"x must be a floating point (..., D) tensor with D >= 1, found {x.dtype} {tuple(shape)}")
    width = shape[-1:]
    for name, vector in (("weight", weight), ("bias", bias), ("constant", constant)):
        if vector is not None and vector.shape != width:
            raise ValueError(f"{name} must have shape ({width[0]},) to fit x, found {tuple(vector.shape)}")
    if residual is not None and (residual.shape != shape or residual.dtype != x.dtype):
        raise ValueError(
            f"residual must be {x.dtype} {tuple(shape)} like x, found {residual.dtype} {tuple(residual.shape)}"
        )


explains(layer_norm, size_refusal)
