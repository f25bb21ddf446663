"""Rows in float8 e4m3 with a scale each, behind a layer norm or an activation. The engine's own: inference only."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.library import custom_op, register_fake
from torch.nn import functional
from torch.utils.flop_counter import register_flop_formula

from xclip_fast.ops._backends import choose, explains, interpreting, kernel_refusal, runs_kernels
from xclip_fast.ops._dtypes import exact_dtype
from xclip_fast.ops.layer_norm import layer_norm_ref, size_refusal
from xclip_fast.ops.linear_quick_gelu import SLOPE

E4M3_MAX = 448.0
SMALLEST = 1e-30  # below it a row counts as zeros: the reciprocal of its scale would be infinite
ACTIVATIONS = ("silu", "quick_gelu", "gelu")


def quantize_rows(
    x: Tensor,
    *,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    constant: Tensor | None = None,
    eps: float = 1e-5,
    activation: str | None = None,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """``x``, ``layer_norm(x + constant)`` or ``activation(x)`` as ``quantized * scale``, a scale for each row.

    Args:
        x: (..., K), any strides.
        weight, bias: (K,) of the layer norm, in the dtype of ``x`` or in float32; both or neither.
        constant: (K,), added to each row for the norm: the biases a bias-free stream lags by.
        eps: added to the variance.
        activation: "silu", "quick_gelu" or "gelu", where there is no norm.
        backend: "reference", "torch", "triton", or the automatic choice.

    Returns:
        float8_e4m3fn (..., K) and float32 (..., 1). The scale is the row's largest magnitude / 448, and 1 where that is
        below 1e-30. Norm and activation are computed in float32 and go to e4m3 without a rounding to the dtype of ``x``
        between: more exact than quantising a norm or a hidden row that was stored. Backends may differ by one step of
        e4m3 where their float32 numbers lie on two sides of a tie. What is not finite spoils its own row alone.

    Raises:
        ValueError: shapes or dtypes do not fit, or the backend asked for cannot serve the call.
    """
    _check(x, weight, bias, constant, activation)
    tensors = x, weight, bias, constant
    chosen = choose("quantize_rows", backend, *tensors, refusal=size_refusal(x) or _float8_refusal(x))
    if chosen == "reference":
        return quantize_rows_ref(*tensors, eps, activation)
    if chosen == "torch":
        return _quantize_rows_torch(*tensors, eps, activation)
    return torch.ops.xclip_fast.quantize_rows(*tensors, eps, activation)


def quantize_rows_ref(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, constant: Tensor | None, eps: float, activation: str | None
) -> tuple[Tensor, Tensor]:
    """The definition."""
    x = x.to(exact_dtype(x.dtype))
    if weight is not None and bias is not None:
        x, _ = layer_norm_ref(x, weight, bias, None, constant, eps)
    if activation is not None:
        x = activate(x.clone(), activation)
    largest = x.abs().amax(-1, keepdim=True).float()
    scale = torch.where(largest > SMALLEST, largest / E4M3_MAX, 1.0)
    return (x / scale).to(torch.float8_e4m3fn), scale


def activate(x: Tensor, activation: str) -> Tensor:
    """The activation of a product's result, which may be overwritten."""
    if activation == "silu":
        return functional.silu(x, inplace=True)
    return functional.gelu(x) if activation == "gelu" else x * torch.sigmoid(SLOPE * x)


def _quantize_rows_torch(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, constant: Tensor | None, eps: float, activation: str | None
) -> tuple[Tensor, Tensor]:
    wide = x.to(exact_dtype(x.dtype), copy=True, memory_format=torch.contiguous_format)
    if weight is not None and bias is not None:
        wide = wide if constant is None else wide.add_(constant)
        wide = functional.layer_norm(wide, x.shape[-1:], weight.to(wide.dtype), bias.to(wide.dtype), eps)
    if activation is not None:
        wide = activate(wide, activation)
    largest = wide.abs().amax(-1, keepdim=True).float()
    scale = torch.where(largest > SMALLEST, largest / E4M3_MAX, 1.0)
    return (wide * scale.reciprocal()).to(torch.float8_e4m3fn), scale


@custom_op("xclip_fast::quantize_rows", mutates_args=())
def _quantize_rows(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, constant: Tensor | None, eps: float, activation: str | None
) -> tuple[Tensor, Tensor]:
    if runs_kernels(x) and _float8_refusal(x) is None:
        from xclip_fast.kernels.quantize_rows import quantize_rows_fwd

        return quantize_rows_fwd(x, weight, bias, constant, eps, activation)
    return _quantize_rows_torch(x, weight, bias, constant, eps, activation)


@register_fake("xclip_fast::quantize_rows")
def _quantize_rows_fake(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, constant: Tensor | None, eps: float, activation: str | None
) -> tuple[Tensor, Tensor]:
    quantized = x.new_empty(x.shape, dtype=torch.float8_e4m3fn)
    return quantized, x.new_empty((*x.shape[:-1], 1), dtype=torch.float32)


@register_flop_formula(torch.ops.xclip_fast.quantize_rows)
def _flops(*args: object, **kwargs: object) -> int:
    """No product."""
    return 0


@explains("quantize_rows")
def _refusal(
    x: Tensor,
    *,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    constant: Tensor | None = None,
    eps: float = 1e-5,
    activation: str | None = None,
) -> str | None:
    return size_refusal(x) or kernel_refusal(x, weight, bias, constant) or _float8_refusal(x)


def _float8_refusal(x: Tensor) -> str | None:
    """Why the kernel cannot write float8 on the device of ``x``, or nothing."""
    if x.device.type == "cuda" and torch.cuda.get_device_capability(x.device) < (8, 9):
        return "float8 needs compute capability 8.9 or newer"
    if x.device.type == "cpu" and interpreting():
        return "Triton's interpreter rounds float8 wrongly"
    return None


def _check(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, constant: Tensor | None, activation: str | None
) -> None:
    if x.ndim < 1 or not x.is_floating_point() or x.shape[-1] == 0:
        raise ValueError(f"x must be a floating point (..., K) tensor with K >= 1, found {x.dtype} {tuple(x.shape)}")
    if (weight is None) != (bias is None):
        raise ValueError("weight and bias of the norm must be given together")
    if weight is None and constant is not None:
        raise ValueError("constant is added in front of a norm: it needs weight and bias")
    if weight is not None and activation is not None:
        raise ValueError("a norm or an activation can be asked for, not both")
    for name, vector in (("weight", weight), ("bias", bias), ("constant", constant)):
        if vector is not None and vector.shape != x.shape[-1:]:
            raise ValueError(f"{name} must have shape ({x.shape[-1]},) to fit x, found {tuple(vector.shape)}")
    if activation is not None and activation not in ACTIVATIONS:
        raise ValueError(f"unknown activation {activation!r}: choose one of {', '.join(ACTIVATIONS)}")
