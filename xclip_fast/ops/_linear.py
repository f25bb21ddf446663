"""Linear layers in training: PyTorch's GEMMs, and bias gradients that a kernel sums."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from xclip_fast.ops._backends import choose
from xclip_fast.ops._dtypes import cast_for_gemm, exact_dtype
from xclip_fast.ops._register import fused_op


def linear(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """``torch.nn.functional.linear``; where the kernels run, one of them sums the gradient of the bias.

    PyTorch's own sums were a twelfth of a training step on an H100.
    """
    trained = torch.is_grad_enabled() and bias.requires_grad and not torch.compiler.is_compiling()
    if not trained or choose("linear", None, x, weight, bias) != "triton":
        return functional.linear(x, weight, bias)
    x, weight, bias = cast_for_gemm(x, weight, bias)
    return linear_op(x, weight, bias)


def linear_gradients(
    grad: Tensor, x: Tensor, weight: Tensor, needed: tuple[bool, ...] = (True, True)
) -> tuple[Tensor | None, Tensor | None]:
    """Gradients of the input and the weight of a linear layer, those that are needed."""
    rows = grad.reshape(-1, grad.shape[-1])
    grad_weight = rows.T @ x.reshape(-1, x.shape[-1]) if needed[1] else None
    return grad @ weight if needed[0] else None, grad_weight


def sums_of_rows(x: Tensor) -> Tensor:
    """Sums (N,) over the rows of x (M, N) in its dtype, summed in float32."""
    return x.sum(0, dtype=exact_dtype(x.dtype)).to(x.dtype)


def _column_sums_fake(x: Tensor) -> Tensor:
    return x.new_empty(x.shape[1])


def _save_rows(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.rows = len(inputs[0])


def _backward_sums(ctx: Any, grad: Tensor) -> Tensor:
    return grad.expand(ctx.rows, -1)


@fused_op(
    "column_sums",
    launcher="xclip_fast.kernels.column_sums.column_sums",
    fake=_column_sums_fake,
    save=_save_rows,
    backward=_backward_sums,
)
def column_sums_op(x: Tensor) -> Tensor:
    """``sums_of_rows``."""
    return sums_of_rows(x)


def _fake(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return x.new_empty(*x.shape[:-1], weight.shape[0])


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, weight, bias = inputs
    ctx.save_for_backward(x, weight)
    ctx.bias_dtype = bias.dtype


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    x, weight = ctx.saved_tensors
    needed = ctx.needs_input_grad
    sums = column_sums_op(grad.reshape(-1, grad.shape[-1])).to(ctx.bias_dtype) if needed[2] else None
    return *linear_gradients(grad, x, weight, needed), sums


def _flops(x_shape: Any, weight_shape: Any, *args: object, **kwargs: object) -> int:
    """One GEMM."""
    return 2 * torch.Size(x_shape).numel() * weight_shape[0]


@fused_op("linear", launcher=functional.linear, fake=_fake, save=_save, backward=_backward, flops=_flops)
def linear_op(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """The linear layer."""
    return functional.linear(x, weight, bias)
