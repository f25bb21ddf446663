"""The MLP of a block: linear and QuickGELU in one GEMM, and the whole of it with half the saved memory."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import linear, silu

from xclip_fast.ops._backends import choose, explains
from xclip_fast.ops._dtypes import cast_for_gemm
from xclip_fast.ops._linear import column_sums_op, linear_gradients, sums_of_rows
from xclip_fast.ops._recompute import differentiable_gradients, keeps_less
from xclip_fast.ops._register import fused_op

SLOPE = 1.702  # QuickGELU is x * sigmoid(SLOPE * x)


def linear_quick_gelu(x: Tensor, weight: Tensor, bias: Tensor, *, backend: str | None = None) -> Tensor:
    """``quick_gelu(x @ weight.T + bias)``, the pre-activation never leaving the chip unless a gradient needs it.

    Args:
        x: (..., K), any strides.
        weight: (N, K) in the dtype of ``x``.
        bias: (N,) in the dtype of ``x``, or in float32.
        backend: "reference", "torch", "triton", or the automatic choice.

    Returns:
        (..., N) in the dtype of ``x``, or of autocast. Accumulation and activation are in float32.

    Raises:
        ValueError: shapes or dtypes do not fit, or the backend asked for cannot serve the call.

    Source: ``mlp.c_fc`` and ``mlp.gelu`` of a block.

    Example:
        >>> import torch
        >>> from xclip_fast.ops import linear_quick_gelu
        >>> x, weight, bias = torch.randn(3, 64), torch.randn(256, 64) / 8, torch.zeros(256)
        >>> pre = x @ weight.T + bias
        >>> torch.allclose(linear_quick_gelu(x, weight, bias), pre * torch.sigmoid(1.702 * pre), atol=1e-5)
        True
    """
    x, weight, bias = cast_for_gemm(x, weight, bias)
    _check(x, weight, bias)
    chosen = choose("linear_quick_gelu", backend, x, weight, bias)
    if chosen == "reference":
        return linear_quick_gelu_ref(x, weight, bias)
    if chosen == "torch":
        return _linear_quick_gelu_torch(x, weight, bias)
    return linear_quick_gelu_op(x, weight, bias, _needs_gradient(x, weight, bias))[0]


def feed_forward(
    x: Tensor,
    fc_weight: Tensor,
    fc_bias: Tensor,
    proj_weight: Tensor,
    proj_bias: Tensor,
    *,
    backend: str | None = None,
) -> Tensor:
    """``linear(linear_quick_gelu(x))``; for the backward pass it keeps ``x`` and one hidden tensor, not three.

    Args:
        x: (..., K), any strides.
        fc_weight, fc_bias: (N, K) and (N,).
        proj_weight, proj_bias: (K', N) and (K',). Biases are in the dtype of ``x``, or in float32.
        backend: "reference", "torch", "triton", or the automatic choice.

    Returns:
        (..., K') in the dtype of ``x``, or of autocast.

    Raises:
        ValueError: shapes or dtypes do not fit, or the backend asked for cannot serve the call.

    Source: ``mlp`` of a block.

    Example:
        >>> import torch
        >>> from xclip_fast.ops import feed_forward, linear_quick_gelu
        >>> x, fc, proj = torch.randn(3, 64), torch.randn(256, 64) / 8, torch.randn(64, 256) / 16
        >>> fc_bias, proj_bias = torch.zeros(256), torch.zeros(64)
        >>> hidden = linear_quick_gelu(x, fc, fc_bias)
        >>> torch.allclose(feed_forward(x, fc, fc_bias, proj, proj_bias), hidden @ proj.T + proj_bias, atol=1e-5)
        True
    """
    x, fc_weight, fc_bias, proj_weight, proj_bias = cast_for_gemm(x, fc_weight, fc_bias, proj_weight, proj_bias)
    _check(x, fc_weight, fc_bias)
    _check(x.new_empty(0, fc_weight.shape[0]), proj_weight, proj_bias)
    fc_bias, proj_bias = fc_bias.to(x.dtype), proj_bias.to(x.dtype)
    tensors = (x, fc_weight, fc_bias, proj_weight, proj_bias)
    chosen = choose("feed_forward", backend, *tensors)
    if chosen == "reference":
        return linear(linear_quick_gelu_ref(x, fc_weight, fc_bias), proj_weight, proj_bias)
    if chosen == "torch":
        if not _needs_gradient(*tensors):
            return _feed_forward_torch(*tensors)
        run = _FeedForward.apply if keeps_less(*tensors) else _feed_forward_with_gradient
        out: Tensor = run(*tensors)
        return out
    return feed_forward_op(*tensors, _needs_gradient(*tensors))[0]


def linear_quick_gelu_ref(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """The definition."""
    pre = x @ weight.T + bias
    return (pre * torch.sigmoid(SLOPE * pre)).to(x.dtype)


def _linear_quick_gelu_torch(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    pre = linear(x, weight, bias.to(x.dtype))
    return pre * torch.sigmoid(SLOPE * pre)


def _feed_forward_torch(
    x: Tensor, fc_weight: Tensor, fc_bias: Tensor, proj_weight: Tensor, proj_bias: Tensor
) -> Tensor:
    # the slope is in alpha and beta of the GEMMs, which leaves one pass over the hidden rows instead of three
    rows = x.reshape(-1, x.shape[-1])
    hidden = torch.addmm(fc_bias, rows, fc_weight.T, beta=SLOPE, alpha=SLOPE)
    hidden = silu(hidden, inplace=True)
    out = torch.addmm(proj_bias, hidden, proj_weight.T, alpha=1 / SLOPE)
    return out.view(*x.shape[:-1], out.shape[-1])


def _feed_forward_with_gradient(
    x: Tensor, fc_weight: Tensor, fc_bias: Tensor, proj_weight: Tensor, proj_bias: Tensor
) -> Tensor:
    if x.dtype not in (torch.float32, torch.float64):
        # the slope would cost a rounding more
        return linear(_linear_quick_gelu_torch(x, fc_weight, fc_bias), proj_weight, proj_bias)
    # QuickGELU is silu(SLOPE * x) / SLOPE: with the slope on the narrow rows one pass over the hidden ones is left, and
    # one back
    hidden = silu(linear(x * SLOPE, fc_weight, fc_bias * SLOPE))
    return linear(hidden, proj_weight, proj_bias * SLOPE) / SLOPE


def scaled_feed_forward(x: Tensor, weights: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """The MLP's rows, and SLOPE times its pre-activation, which ``scaled_gradients`` takes; both (M, ...)."""
    fc_weight, fc_bias, proj_weight, proj_bias = weights
    pre = torch.addmm(fc_bias, x.reshape(-1, x.shape[-1]), fc_weight.T, beta=SLOPE, alpha=SLOPE)
    return torch.addmm(proj_bias, silu(pre), proj_weight.T, alpha=1 / SLOPE), pre


def scaled_gradients(
    grad: Tensor, pre: Tensor, x: Callable[[], Tensor], weights: Sequence[Tensor], needed: Sequence[bool]
) -> tuple[Tensor | None, ...]:
    """Gradients of the rows and of the two weights and biases of an MLP, those that are needed.

    Args:
        grad: (M, K').
        pre: what ``scaled_feed_forward`` returned.
        x: makes the rows (M, K), where the first weight's gradient wants them.
        weights, needed: in the order of the MLP; ``needed`` begins with the rows.
    """
    fc_weight, _, proj_weight, _ = weights
    grad_proj_weight = None
    if needed[3]:
        # alone the product counts: beta is 0
        grad_proj_weight = torch.addmm(proj_weight, grad.T, silu(pre), beta=0, alpha=1 / SLOPE)
    grad_proj_bias = grad.sum(0) if needed[4] else None
    grad_x = grad_fc_weight = grad_fc_bias = None
    if any(needed[:3]):
        grad_pre = grad @ proj_weight
        # the slope before the activation and the one behind it cancel
        torch.ops.aten.silu_backward.grad_input(grad_pre, pre, grad_input=grad_pre)
        grad_x = grad_pre @ fc_weight if needed[0] else None
        grad_fc_weight = grad_pre.T @ x() if needed[1] else None
        grad_fc_bias = grad_pre.sum(0) if needed[2] else None
    return grad_x, grad_fc_weight, grad_fc_bias, grad_proj_weight, grad_proj_bias


def unfolded(rows: Tensor, x: Tensor) -> Tensor:
    """Rows (M, N) as (..., N) like ``x``, and no view: nobody may write into a view that a function returns."""
    found: Tensor = torch.ops.aten._unsafe_view(rows, (*x.shape[:-1], rows.shape[-1]))
    return found


class _FeedForward(torch.autograd.Function):
    """The MLP, which keeps its rows and one hidden tensor: the activation is made again in the backward pass."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, *weights: Tensor) -> Tensor:
        out, pre = scaled_feed_forward(x, weights)
        ctx.save_for_backward(x, *weights, pre)
        return unfolded(out, x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, *weights, pre = ctx.saved_tensors
        if torch.is_grad_enabled():
            return differentiable_gradients(_feed_forward_with_gradient, (x, *weights), grad)
        rows = x.reshape(-1, x.shape[-1])
        grads = scaled_gradients(grad.reshape(-1, grad.shape[-1]), pre, lambda: rows, weights, ctx.needs_input_grad)
        return None if grads[0] is None else grads[0].view(x.shape), *grads[1:]


def _linear_fake(x: Tensor, weight: Tensor, bias: Tensor, save_pre: bool) -> tuple[Tensor, Tensor]:
    shape = (*x.shape[:-1], weight.shape[0])
    return x.new_empty(shape), x.new_empty(shape if save_pre else 0)


def _save_linear(ctx: Any, inputs: Any, output: Any) -> None:
    x, weight, bias, save_pre = inputs
    ctx.save_for_backward(x, weight, bias, output[1] if save_pre else None)
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(output[1])


def _backward_linear(ctx: Any, grad: Tensor | None, _: None) -> Any:
    x, weight, bias, pre = ctx.saved_tensors
    if grad is None:
        return None, None, None, None
    pre = linear(x, weight, bias.to(x.dtype)) if pre is None else pre
    grad_pre, _, grad_bias = quick_gelu_backward_op(grad, pre, False)
    return *linear_gradients(grad_pre, x, weight, ctx.needs_input_grad), grad_bias.to(bias.dtype), None


def _linear_flops(x_shape: Any, weight_shape: Any, *args: object, **kwargs: object) -> int:
    """One GEMM; the activation is not counted, like PyTorch's own."""
    return 2 * torch.Size(x_shape).numel() * weight_shape[0]


@fused_op(
    "linear_quick_gelu",
    launcher="xclip_fast.kernels.linear_quick_gelu.linear_quick_gelu_fwd",
    fake=_linear_fake,
    save=_save_linear,
    backward=_backward_linear,
    flops=_linear_flops,
)
def linear_quick_gelu_op(x: Tensor, weight: Tensor, bias: Tensor, save_pre: bool) -> tuple[Tensor, Tensor]:
    """The activated rows, and the pre-activation if it is to be saved."""
    pre = linear(x, weight, bias.to(x.dtype)).contiguous()
    return pre * torch.sigmoid(SLOPE * pre), pre if save_pre else x.new_empty(0)


def _activation_fake(grad: Tensor, pre: Tensor, write_hidden: bool) -> tuple[Tensor, Tensor, Tensor]:
    return torch.empty_like(pre), pre.new_empty(pre.shape if write_hidden else 0), pre.new_empty(pre.shape[-1])


@fused_op("quick_gelu_backward", launcher="xclip_fast.kernels.linear_quick_gelu.quick_gelu_bwd", fake=_activation_fake)
def quick_gelu_backward_op(grad: Tensor, pre: Tensor, write_hidden: bool) -> tuple[Tensor, Tensor, Tensor]:
    """The gradient of the pre-activation, the activation again if it is wanted, and the gradient of the bias."""
    sigmoid = torch.sigmoid(SLOPE * pre)
    grad_pre = grad.contiguous() * (sigmoid + SLOPE * pre * sigmoid * (1 - sigmoid))
    hidden = pre * sigmoid if write_hidden else pre.new_empty(0)
    return grad_pre, hidden, sums_of_rows(grad_pre.reshape(-1, grad_pre.shape[-1]))


def _launch_feed_forward(
    x: Tensor, fc_weight: Tensor, fc_bias: Tensor, proj_weight: Tensor, proj_bias: Tensor, save_pre: bool
) -> tuple[Tensor, Tensor]:
    from xclip_fast.kernels.linear_quick_gelu import linear_quick_gelu_fwd

    hidden, pre = linear_quick_gelu_fwd(x, fc_weight, fc_bias, save_pre)
    return linear(hidden, proj_weight, proj_bias), pre


def _feed_forward_fake(
    x: Tensor, fc_weight: Tensor, fc_bias: Tensor, proj_weight: Tensor, proj_bias: Tensor, save_pre: bool
) -> tuple[Tensor, Tensor]:
    pre_shape = (*x.shape[:-1], fc_weight.shape[0]) if save_pre else (0,)
    return x.new_empty(*x.shape[:-1], proj_weight.shape[0]), x.new_empty(pre_shape)


def _save_feed_forward(ctx: Any, inputs: Any, output: Any) -> None:
    *tensors, save_pre = inputs
    ctx.save_for_backward(*tensors, output[1] if save_pre else None)
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(output[1])


def _backward_feed_forward(ctx: Any, grad: Tensor | None, _: None) -> Any:
    x, fc_weight, fc_bias, proj_weight, proj_bias, pre = ctx.saved_tensors
    if grad is None:
        return None, None, None, None, None, None
    pre = linear(x, fc_weight, fc_bias) if pre is None else pre
    needed = ctx.needs_input_grad
    grad_pre, hidden, grad_bias = quick_gelu_backward_op(grad @ proj_weight, pre, needed[3])
    rows = grad.reshape(-1, grad.shape[-1])
    grad_proj_weight = rows.T @ hidden.reshape(-1, hidden.shape[-1]) if needed[3] else None
    grad_proj_bias = column_sums_op(rows).to(proj_bias.dtype) if needed[4] else None
    fc_grads = *linear_gradients(grad_pre, x, fc_weight, needed), grad_bias.to(fc_bias.dtype)
    return *fc_grads, grad_proj_weight, grad_proj_bias, None


def _feed_forward_flops(
    x_shape: Any, fc_shape: Any, fc_bias: Any, proj_shape: Any, *args: object, **kwargs: object
) -> int:
    """Two GEMMs."""
    rows = torch.Size(x_shape[:-1]).numel()
    return 2 * rows * (fc_shape[0] * fc_shape[1] + proj_shape[0] * proj_shape[1])


@fused_op(
    "feed_forward",
    launcher=_launch_feed_forward,
    fake=_feed_forward_fake,
    save=_save_feed_forward,
    backward=_backward_feed_forward,
    flops=_feed_forward_flops,
)
def feed_forward_op(
    x: Tensor, fc_weight: Tensor, fc_bias: Tensor, proj_weight: Tensor, proj_bias: Tensor, save_pre: bool
) -> tuple[Tensor, Tensor]:
    """The result, and the pre-activation if it is to be saved."""
    hidden, pre = linear_quick_gelu_op(x, fc_weight, fc_bias, save_pre)
    return linear(hidden, proj_weight, proj_bias).contiguous(), pre


def _needs_gradient(*tensors: Tensor) -> bool:
    return torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors)


def _check(x: Tensor, weight: Tensor, bias: Tensor) -> None:
    if x.ndim < 1 or not x.is_floating_point() or x.shape[-1] == 0:
        raise ValueError(f"x must be a floating point (..., K) tensor with K >= 1, found {x.dtype} {tuple(x.shape)}")
    if weight.ndim != 2 or weight.shape[1] != x.shape[-1] or weight.dtype != x.dtype:
        raise ValueError(
            f"weight must be {x.dtype} (N, {x.shape[-1]}) to fit x, found {weight.dtype} {tuple(weight.shape)}"
        )
    if bias.shape != weight.shape[:1]:
        raise ValueError(f"bias must have shape ({weight.shape[0]},) to fit weight, found {tuple(bias.shape)}")
    if bias.dtype not in (x.dtype, torch.float32):
        raise ValueError(f"bias must be {x.dtype} like x, or torch.float32, found {bias.dtype}")


explains(linear_quick_gelu)
explains(feed_forward)
