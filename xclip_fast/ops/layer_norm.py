"""Layer norm with an optional residual or constant added first: one pass forward, one backward."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.library import custom_op, register_autograd
from torch.utils.flop_counter import register_flop_formula

from xclip_fast.ops._backends import choose, explains, kernel_refusal, runs_kernels
from xclip_fast.ops._dtypes import cast_for_sum, exact_dtype
from xclip_fast.ops._fake import register_fake

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
    """``layer_norm(x + residual + constant)`` and the stream ``x + residual`` it was computed from.

    Args:
        x: (..., D), any strides.
        weight, bias: (D,) in the dtype of ``x``, or in float32.
        residual: (..., D) like ``x``; the sum is rounded to the dtype of ``x`` once, after the norm has used it.
            Under autocast both may have a dtype of their own: the wider one counts.
        constant: (D,), like ``weight``, added to each row for the norm but not to the stream: the biases a bias-free
            stream lags by.
        eps: added to the variance.
        backend: "reference", "torch", "triton", or the automatic choice.

    Returns:
        The normalised rows and the stream, both (..., D) in the dtype of ``x``. Without a residual the stream is ``x``.
        Statistics are computed and kept in float32 by the kernels.

    Raises:
        ValueError: shapes or dtypes do not fit, or the backend asked for cannot serve the call.

    Source: the norms of the pre-norm blocks, paper, equations 4 to 6.
    """
    x, residual = cast_for_sum(x, residual)
    _check(x, weight, bias, residual, constant)
    refusal = size_refusal(x)
    chosen = choose("layer_norm", backend, x, weight, bias, residual, constant, refusal=refusal)
    if chosen == "reference":
        return layer_norm_ref(x, weight, bias, residual, constant, eps)
    if chosen == "torch":
        return _layer_norm_torch(x, weight, bias, residual, constant, eps)
    normed, stream, _, _ = torch.ops.xclip_fast.layer_norm(x, weight, bias, residual, constant, eps)
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


@custom_op("xclip_fast::layer_norm", mutates_args=())
def _layer_norm(
    x: Tensor, weight: Tensor, bias: Tensor, residual: Tensor | None, constant: Tensor | None, eps: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    if runs_kernels(x):
        from xclip_fast.kernels.layer_norm import layer_norm_fwd

        return layer_norm_fwd(x, weight, bias, residual, constant, eps)
    normed, stream = _layer_norm_torch(x, weight, bias, residual, constant, eps)
    shifted = (stream if constant is None else stream + constant).to(exact_dtype(x.dtype))
    variance, mean = torch.var_mean(shifted, dim=-1, correction=0)
    stream = stream if residual is not None else x.new_empty(0)
    return normed, stream, mean.flatten(), (variance + eps).rsqrt().flatten()


@register_fake("xclip_fast::layer_norm")
def _layer_norm_fake(
    x: Tensor, weight: Tensor, bias: Tensor, residual: Tensor | None, constant: Tensor | None, eps: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    rows = x.numel() // x.shape[-1]
    statistics = x.new_empty(rows, dtype=exact_dtype(x.dtype))
    stream = x.new_empty(x.shape) if residual is not None else x.new_empty(0)
    return x.new_empty(x.shape), stream, statistics, torch.empty_like(statistics)


@custom_op("xclip_fast::layer_norm_backward", mutates_args=())
def _layer_norm_backward(
    grad_normed: Tensor,
    grad_stream: Tensor | None,
    stream: Tensor,
    weight: Tensor,
    constant: Tensor | None,
    mean: Tensor,
    rstd: Tensor,
) -> tuple[Tensor, Tensor]:
    """Gradient of the stream, with ``grad_stream`` added, and of weight, bias and constant, as (3, D) not rounded."""
    if runs_kernels(stream):
        from xclip_fast.kernels.layer_norm import layer_norm_bwd

        return layer_norm_bwd(grad_normed, grad_stream, stream, weight, constant, mean, rstd)
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


@register_fake("xclip_fast::layer_norm_backward")
def _layer_norm_backward_fake(
    grad_normed: Tensor,
    grad_stream: Tensor | None,
    stream: Tensor,
    weight: Tensor,
    constant: Tensor | None,
    mean: Tensor,
    rstd: Tensor,
) -> tuple[Tensor, Tensor]:
    return stream.new_empty(stream.shape), mean.new_empty(3, weight.shape[0])


def _setup_context(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    x, weight, bias, residual, constant, _ = inputs
    _, stream, mean, rstd = output
    ctx.save_for_backward(x if residual is None else stream, weight, constant, mean, rstd)
    ctx.bias_dtype = bias.dtype
    ctx.has_residual = residual is not None
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(mean, rstd)


def _backward(ctx, grad_normed, grad_stream, *_):  # type: ignore[no-untyped-def]
    stream, weight, constant, mean, rstd = ctx.saved_tensors
    if not ctx.has_residual:
        grad_stream = None
    if grad_normed is None:
        return grad_stream, None, None, grad_stream, None, None
    grad_x, vectors = torch.ops.xclip_fast.layer_norm_backward(
        grad_normed, grad_stream, stream, weight, constant, mean, rstd
    )
    grad_weight, grad_bias, grad_constant = vectors.unbind(0)
    grad_residual = grad_x if ctx.has_residual else None
    grad_constant = None if constant is None else grad_constant.to(constant.dtype)
    return grad_x, grad_weight.to(weight.dtype), grad_bias.to(ctx.bias_dtype), grad_residual, grad_constant, None


register_autograd("xclip_fast::layer_norm", _backward, setup_context=_setup_context)


@register_flop_formula([torch.ops.xclip_fast.layer_norm, torch.ops.xclip_fast.layer_norm_backward])
def _flops(*args: object, **kwargs: object) -> int:
    """No multiply-accumulates of a product: counted as zero, like PyTorch's own layer norm."""
    return 0


@explains("layer_norm")
def _refusal(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    *,
    residual: Tensor | None = None,
    constant: Tensor | None = None,
    eps: float = 1e-5,
) -> str | None:
    return size_refusal(x) or kernel_refusal(x, weight, bias, residual, constant)


def size_refusal(x: Tensor) -> str | None:
    """Why the rows of ``x`` are too wide for a kernel that holds a row in registers, or nothing."""
    return f"its rows hold up to {MAX_WIDTH} numbers, found {x.shape[-1]}" if x.shape[-1] > MAX_WIDTH else None


def _check(x: Tensor, weight: Tensor, bias: Tensor, residual: Tensor | None, constant: Tensor | None) -> None:
    if x.ndim < 1 or not x.is_floating_point() or x.shape[-1] == 0:
        raise ValueError(f"x must be a floating point (..., D) tensor with D >= 1, found {x.dtype} {tuple(x.shape)}")
    for name, vector in (("weight", weight), ("bias", bias), ("constant", constant)):
        if vector is not None and vector.shape != x.shape[-1:]:
            raise ValueError(f"{name} must have shape ({x.shape[-1]},) to fit x, found {tuple(vector.shape)}")
    if residual is not None and (residual.shape != x.shape or residual.dtype != x.dtype):
        raise ValueError(
            f"residual must be {x.dtype} {tuple(x.shape)} like x, found {residual.dtype} {tuple(residual.shape)}"
        )
