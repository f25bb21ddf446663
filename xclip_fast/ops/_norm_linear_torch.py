"""A norm and what multiplies the normed rows, in training on PyTorch's operators: the rows are made again, not kept.

Names and arguments are those of the ops in ``_norm_linear``; so are the first results, up to the stream or first token.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import linear

from xclip_fast.ops._recompute import differentiable_gradients
from xclip_fast.ops.linear_quick_gelu import feed_forward, scaled_feed_forward, scaled_gradients, unfolded

Grads = tuple[Tensor | None, ...]


class NormLinear(torch.autograd.Function):
    """The linear layer's rows, the stream where a residual is added, and the first token (..., D) of each S."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, residual: Tensor | None, *rest: Any) -> tuple[Tensor, Tensor | None, Tensor]:
        *parameters, ctx.eps = rest
        stream = x if residual is None else x + residual
        normed, mean, rstd = _norm(ctx, stream, parameters)
        ctx.save_for_backward(stream, *parameters, mean, rstd)
        ctx.set_materialize_grads(False)
        # a view would have a gradient of all tokens, zeros but for these
        first = stream.select(-2, 0).clone(memory_format=torch.contiguous_format)
        return linear(normed, *parameters[2:]), None if residual is None else stream, first

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None, grad_stream: Tensor | None, grad_first: Tensor | None) -> Grads:
        stream, *parameters, mean, rstd = ctx.saved_tensors
        needed = ctx.needs_input_grad
        grads: Grads = (None,) * 5
        if grad is not None and torch.is_grad_enabled():
            grads = differentiable_gradients(partial(_linear, ctx.eps), (stream, *parameters), grad)
        elif grad is not None:
            rows = grad.reshape(-1, grad.shape[-1])
            grad_weight = rows.T @ _rows(_norm(ctx, stream, parameters)[0]) if needed[4] else None
            grad_bias = rows.sum(0) if needed[5] else None
            grad_normed = rows @ parameters[2] if any(needed[:4]) else None
            grads = *_through_norm(ctx, grad_normed, stream, parameters, mean, rstd), grad_weight, grad_bias
        grad_x, *others = grads
        if grad_first is not None:
            if torch.is_grad_enabled() or grad_x is None:
                grad_first = torch.zeros_like(stream).select_scatter(grad_first, -2, 0)
                grad_x = grad_first if grad_x is None else grad_x + grad_first
            else:
                # its memory is this pass's own
                grad_x.select(-2, 0).add_(grad_first)
        return *_of_summands(ctx, grad_x, grad_stream), *others, None


class NormFeedForward(torch.autograd.Function):
    """The MLP's rows, nothing, where the op has its pre-activation, and the stream where a residual is added."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, residual: Tensor | None, *rest: Any) -> tuple[Tensor, None, Tensor | None]:
        *parameters, ctx.eps = rest
        stream = x if residual is None else x + residual
        normed, mean, rstd = _norm(ctx, stream, parameters)
        out, pre = scaled_feed_forward(normed, parameters[2:])
        ctx.save_for_backward(stream, *parameters, mean, rstd, pre)
        ctx.set_materialize_grads(False)
        return unfolded(out, x), None, None if residual is None else stream

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None, _: None, grad_stream: Tensor | None) -> Grads:
        stream, *parameters, mean, rstd, pre = ctx.saved_tensors
        needed = ctx.needs_input_grad
        grads: Grads = (None,) * 7
        if grad is not None and torch.is_grad_enabled():
            grads = differentiable_gradients(partial(_feed_forward, ctx.eps), (stream, *parameters), grad)
        elif grad is not None:
            grad_normed, *layers = scaled_gradients(
                grad.reshape(-1, grad.shape[-1]),
                pre,
                lambda: _rows(_norm(ctx, stream, parameters)[0]),
                parameters[2:],
                (any(needed[:4]), *needed[4:]),
            )
            grads = *_through_norm(ctx, grad_normed, stream, parameters, mean, rstd), *layers
        grad_x, *others = grads
        return *_of_summands(ctx, grad_x, grad_stream), *others, None


def _norm(ctx: Any, stream: Tensor, parameters: Sequence[Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    weight, bias, *_ = parameters
    normed, mean, rstd = torch.native_layer_norm(stream, weight.shape, weight, bias, ctx.eps)
    return normed, mean, rstd


def _rows(x: Tensor) -> Tensor:
    return x.reshape(-1, x.shape[-1])


def _linear(eps: float, stream: Tensor, norm_weight: Tensor, norm_bias: Tensor, *layer: Tensor) -> Tensor:
    return linear(torch.layer_norm(stream, norm_weight.shape, norm_weight, norm_bias, eps), *layer)


def _feed_forward(eps: float, stream: Tensor, norm_weight: Tensor, norm_bias: Tensor, *mlp: Any) -> Tensor:
    return feed_forward(torch.layer_norm(stream, norm_weight.shape, norm_weight, norm_bias, eps), *mlp, backend="torch")


def _through_norm(
    ctx: Any, grad: Tensor | None, stream: Tensor, parameters: Sequence[Tensor], mean: Tensor, rstd: Tensor
) -> Grads:
    """Gradients of the stream, and of the weight and bias of the norm, of those of the normed rows."""
    if grad is None:
        return None, None, None
    weight, bias, *_ = parameters
    needed = ctx.needs_input_grad
    wanted = [any(needed[:2]), *needed[2:4]]
    found: Grads = torch.ops.aten.native_layer_norm_backward(
        grad.view(stream.shape), stream, weight.shape, mean, rstd, weight, bias, wanted
    )
    return found


def _of_summands(ctx: Any, grad_x: Tensor | None, grad_stream: Tensor | None) -> Grads:
    """Gradients of x and the residual: that of their sum by the normed rows, and by the stream."""
    if grad_x is None or grad_stream is None:
        total = grad_stream if grad_x is None else grad_x
    elif torch.is_grad_enabled():
        total = grad_x + grad_stream
    else:
        total = grad_x.add_(grad_stream)
    return tuple(total if needed else None for needed in ctx.needs_input_grad[:2])
