"""A norm and what multiplies the normed rows, in training: the rows are made again in the backward pass, not kept."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from xclip_fast.ops._backends import choose
from xclip_fast.ops._dtypes import autocast_dtype, exact_dtype
from xclip_fast.ops._frames import split_norm_grads
from xclip_fast.ops._linear import column_sums_op, linear, linear_gradients
from xclip_fast.ops._norm_linear_torch import NormFeedForward, NormLinear
from xclip_fast.ops._recompute import keeps_less
from xclip_fast.ops._register import fused_op
from xclip_fast.ops.layer_norm import layer_norm, layer_norm_backward_op, layer_norm_op, size_refusal
from xclip_fast.ops.linear_quick_gelu import feed_forward, feed_forward_op, quick_gelu_backward_op


def norm_linear(
    x: Tensor, residual: Tensor | None, norm: tuple[Tensor, Tensor], weight: Tensor, bias: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """``linear`` of ``layer_norm`` of tokens (..., S, D), the residual stream, and the first token (..., D) of each S.

    ``norm`` is the weight and bias of the norm.
    """
    way = _keeps_no_rows(x, residual, norm, weight, bias)
    if way is not None:
        run = norm_linear_op if way == "triton" else NormLinear.apply
        out, stream, first, *_ = run(x, residual, *norm, weight, bias, eps)
        return out, x if residual is None else stream, first
    normed, stream = layer_norm(x, *norm, residual=residual, eps=eps)
    return linear(normed, weight, bias), stream, stream.select(-2, 0)


def norm_feed_forward(
    x: Tensor, residual: Tensor | None, norm: tuple[Tensor, Tensor], mlp: tuple[Tensor, ...], eps: float
) -> tuple[Tensor, Tensor]:
    """``feed_forward`` of ``layer_norm``, and the residual stream; ``mlp`` is its two weights, each before its bias."""
    way = _keeps_no_rows(x, residual, norm, *mlp)
    if way is not None:
        run = norm_feed_forward_op if way == "triton" else NormFeedForward.apply
        out, _, stream, *_ = run(x, residual, *norm, *mlp, eps)
        return out, x if residual is None else stream
    normed, stream = layer_norm(x, *norm, residual=residual, eps=eps)
    return feed_forward(normed, *mlp), stream


def _keeps_no_rows(x: Tensor, residual: Tensor | None, norm: tuple[Tensor, Tensor], *layers: Tensor) -> str | None:
    """The backend, "triton" or "torch", by which gradients are recorded of tensors in one dtype without normed rows.

    None where it is not: compilers choose by themselves, and what does not fit is left to the ops apart, which say so.
    """
    present = [x, *norm, *layers, *([] if residual is None else [residual])]
    if not torch.is_grad_enabled() or torch.compiler.is_compiling() or autocast_dtype(x.device.type) is not None:
        return None
    if not all(tensor.dtype == x.dtype for tensor in present) or not any(tensor.requires_grad for tensor in present):
        return None
    width = x.shape[-1:]
    fits = norm[0].shape == norm[1].shape == width and (residual is None or residual.shape == x.shape)
    for weight, bias in zip(layers[::2], layers[1::2], strict=True):
        fits = fits and weight.ndim == 2 and weight.shape[1:] == width and bias.shape == weight.shape[:1]
        width = bias.shape
    if not fits or size_refusal(x) is not None:
        return None
    chosen = choose("norm_linear", None, *present)
    return chosen if chosen == "triton" or (chosen == "torch" and keeps_less(*present)) else None


def _save_norm(ctx: Any, inputs: tuple[Any, ...], normed: tuple[Tensor, ...], *rest: Tensor) -> None:
    x, residual, norm_weight, norm_bias, *_, eps = inputs
    stream, mean, rstd = normed
    ctx.save_for_backward(x if residual is None else stream, norm_weight, norm_bias, mean, rstd, *rest)
    ctx.eps, ctx.has_residual = eps, residual is not None
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(mean, rstd)


def _normed_again(ctx: Any, stream: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    normed: Tensor = layer_norm_op(stream, weight, bias, None, None, ctx.eps)[0]
    return normed


def _through_norm(
    ctx: Any, grad_normed: Tensor | None, grad_stream: Tensor | None, norm: Sequence[Tensor]
) -> tuple[Tensor | None, ...]:
    """Gradients of x, the residual, and the weight and bias of the norm; ``norm`` is what ``_save_norm`` saved."""
    stream, weight, _, mean, rstd = norm
    if not ctx.has_residual:
        grad_stream = None
    if grad_normed is None:
        return grad_stream, grad_stream, None, None
    grad_x, vectors = layer_norm_backward_op(grad_normed, grad_stream, stream, weight, None, mean, rstd)
    grads = split_norm_grads(vectors, weight, weight)
    return grad_x, grad_x if ctx.has_residual else None, *grads


def _first_gradients(
    ctx: Any, grad: Tensor, weight: Tensor, norm: Sequence[Tensor]
) -> tuple[Tensor | None, Tensor | None]:
    """Gradients of the normed rows, and of the weight of the layer behind the norm: frozen ones cost nothing."""
    needed = ctx.needs_input_grad
    through, trained = any(needed[:4]), needed[4]
    # the weight's gradient alone reads the normed rows
    normed = _normed_again(ctx, *norm[:3]) if trained else grad
    return linear_gradients(grad, normed, weight, (through, trained))


def _norm_fakes(x: Tensor, residual: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    statistics = x.new_empty(x.numel() // x.shape[-1], dtype=exact_dtype(x.dtype))
    return x.new_empty(0 if residual is None else x.shape), statistics, torch.empty_like(statistics)


def _launch_linear(x: Tensor, residual: Tensor | None, *rest: Any) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    from xclip_fast.kernels.layer_norm import layer_norm_fwd

    norm_weight, norm_bias, weight, bias, eps = rest
    normed, stream, mean, rstd = layer_norm_fwd(x, norm_weight, norm_bias, residual, None, eps)
    return functional.linear(normed, weight, bias), stream, _first(x if residual is None else stream), mean, rstd


def _first(tokens: Tensor) -> Tensor:
    # a view would have a gradient of all tokens, zeros but for these
    return tokens.select(-2, 0).clone(memory_format=torch.contiguous_format)


def _linear_fake(
    x: Tensor, residual: Tensor | None, norm_weight: Tensor, norm_bias: Tensor, weight: Tensor, *rest: object
) -> tuple[Tensor, ...]:
    stream, mean, rstd = _norm_fakes(x, residual)
    return x.new_empty(*x.shape[:-1], weight.shape[0]), stream, x.new_empty(*x.shape[:-2], x.shape[-1]), mean, rstd


def _save_linear(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    *_, weight, _, _ = inputs
    _, stream, _, mean, rstd = output
    _save_norm(ctx, inputs, (stream, mean, rstd), weight)


def _backward_linear(
    ctx: Any, grad: Tensor | None, grad_stream: Tensor | None, grad_first: Tensor | None, *_: None
) -> tuple[Tensor | None, ...]:
    # read once: whoever computes them again, or brings them back, does so at each reading
    *norm, weight = ctx.saved_tensors
    if grad is None:
        if grad_first is not None:
            grad_stream = torch.zeros_like(norm[0]) if grad_stream is None else grad_stream.clone()
            grad_stream.select(-2, 0).add_(grad_first)
        return grad_stream, grad_stream if ctx.has_residual else None, None, None, None, None, None
    grad_normed, grad_weight = _first_gradients(ctx, grad, weight, norm)
    grad_bias = column_sums_op(grad.reshape(-1, grad.shape[-1])) if ctx.needs_input_grad[5] else None
    grad_x, *grads = _through_norm(ctx, grad_normed, grad_stream, norm)
    if grad_x is not None and grad_first is not None:
        # its memory is this pass's own
        grad_x.select(-2, 0).add_(grad_first)
    return grad_x, *grads, grad_weight, grad_bias, None


def _linear_flops(x_shape: Any, residual: Any, norm: Any, norm_bias: Any, weight: Any, *a: object, **k: object) -> int:
    """One GEMM."""
    return 2 * torch.Size(x_shape).numel() * weight[0]


@fused_op(
    "norm_linear",
    launcher=_launch_linear,
    fake=_linear_fake,
    save=_save_linear,
    backward=_backward_linear,
    flops=_linear_flops,
)
def norm_linear_op(
    x: Tensor,
    residual: Tensor | None,
    norm_weight: Tensor,
    norm_bias: Tensor,
    weight: Tensor,
    bias: Tensor,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The linear layer's rows, stream (empty without a residual), first tokens, mean and 1 / deviation of each row."""
    normed, stream, mean, rstd = layer_norm_op(x, norm_weight, norm_bias, residual, None, eps)
    return functional.linear(normed, weight, bias), stream, _first(x if residual is None else stream), mean, rstd


def _launch_feed_forward(
    x: Tensor, residual: Tensor | None, *rest: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    from xclip_fast.kernels.layer_norm import layer_norm_fwd
    from xclip_fast.kernels.linear_quick_gelu import linear_quick_gelu_fwd

    norm_weight, norm_bias, fc_weight, fc_bias, proj_weight, proj_bias, eps = rest
    normed, stream, mean, rstd = layer_norm_fwd(x, norm_weight, norm_bias, residual, None, eps)
    hidden, pre = linear_quick_gelu_fwd(normed, fc_weight, fc_bias, True)
    return functional.linear(hidden, proj_weight, proj_bias), pre, stream, mean, rstd


def _feed_forward_fake(
    x: Tensor,
    residual: Tensor | None,
    norm_weight: Tensor,
    norm_bias: Tensor,
    fc_weight: Tensor,
    fc_bias: Tensor,
    proj_weight: Tensor,
    *rest: object,
) -> tuple[Tensor, ...]:
    out, pre = (x.new_empty(*x.shape[:-1], weight.shape[0]) for weight in (proj_weight, fc_weight))
    return out, pre, *_norm_fakes(x, residual)


def _save_feed_forward(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    fc_weight, _, proj_weight, *_ = inputs[4:]
    _, pre, *normed = output
    _save_norm(ctx, inputs, tuple(normed), fc_weight, proj_weight, pre)
    ctx.mark_non_differentiable(pre, *normed[1:])


def _backward_feed_forward(
    ctx: Any, grad: Tensor | None, grad_pre: None, grad_stream: Tensor | None, *_: None
) -> tuple[Tensor | None, ...]:
    *norm, fc_weight, proj_weight, pre = ctx.saved_tensors
    if grad is None:
        return *_through_norm(ctx, None, grad_stream, norm), None, None, None, None, None
    needed = ctx.needs_input_grad
    grad_hidden, hidden, grad_fc_bias = quick_gelu_backward_op(grad @ proj_weight, pre, needed[6])
    rows = grad.reshape(-1, grad.shape[-1])
    grad_proj_weight = rows.T @ hidden.reshape(-1, hidden.shape[-1]) if needed[6] else None
    proj_grads = grad_proj_weight, column_sums_op(rows) if needed[7] else None
    del hidden
    grad_normed, grad_fc_weight = _first_gradients(ctx, grad_hidden, fc_weight, norm)
    return *_through_norm(ctx, grad_normed, grad_stream, norm), grad_fc_weight, grad_fc_bias, *proj_grads, None


def _feed_forward_flops(
    x_shape: Any, residual: Any, norm: Any, norm_bias: Any, fc: Any, fc_bias: Any, proj: Any, *a: object, **k: object
) -> int:
    """Two GEMMs."""
    return 2 * torch.Size(x_shape[:-1]).numel() * (fc[0] * fc[1] + proj[0] * proj[1])


@fused_op(
    "norm_feed_forward",
    launcher=_launch_feed_forward,
    fake=_feed_forward_fake,
    save=_save_feed_forward,
    backward=_backward_feed_forward,
    flops=_feed_forward_flops,
)
def norm_feed_forward_op(
    x: Tensor,
    residual: Tensor | None,
    norm_weight: Tensor,
    norm_bias: Tensor,
    fc_weight: Tensor,
    fc_bias: Tensor,
    proj_weight: Tensor,
    proj_bias: Tensor,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The MLP's rows, its pre-activation, the stream (empty without a residual), mean and 1 / deviation of each row."""
    normed, stream, mean, rstd = layer_norm_op(x, norm_weight, norm_bias, residual, None, eps)
    out, pre = feed_forward_op(normed, fc_weight, fc_bias, proj_weight, proj_bias, True)
    return out, pre, stream, mean, rstd
