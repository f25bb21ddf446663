"""Rows in float8 e4m3 with a scale each, after a layer norm or an activation. The engine's own: inference only."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from xclip_fast.devices import compute_capability
from xclip_fast.ops._backends import choose, explains, interpreting
from xclip_fast.ops._dtypes import exact_dtype
from xclip_fast.ops._register import fused_op
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
    residual: Tensor | None = None,
    constant: Tensor | None = None,
    eps: float = 1e-5,
    activation: str | None = None,
    backend: str | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """``x``, ``layer_norm(x + residual + constant)`` or ``activation(x)`` as ``quantized * scale``, a scale a row.

    Args:
        x: (..., K), any strides.
        weight, bias: (K,) of the layer norm, in the dtype of ``x`` or in float32; both or neither.
        residual: (..., K) like ``x``, before a norm; the sum is rounded to the dtype of ``x`` once, after the norm has
            used it.
        constant: (K,), added to each row before normalising, not written to the stream; the engine passes the biases
            its stream leaves out.
        eps: added to the variance.
        activation: "silu", "quick_gelu" or "gelu", where there is no norm.
        backend: "reference", "torch", "triton", or the automatic choice.

    Returns:
        float8_e4m3fn (..., K), float32 (..., 1), and the stream ``x + residual`` (..., K) in the dtype of ``x``, which
        is ``x`` where there is no residual. The scale is the row's largest magnitude / 448, and 1 where that is below
        1e-30. Sum, norm and activation are computed in float32 and go to e4m3 without a rounding to the dtype of ``x``
        between: more exact than quantising a norm or a hidden row that was stored. Backends may differ by one step of
        e4m3 where their float32 numbers lie on two sides of a tie. What is not finite spoils its own row alone.

    Raises:
        ValueError: shapes or dtypes do not fit, or the backend asked for cannot serve the call.
    """
    _check(x, weight, bias, residual, constant, activation)
    tensors = x, weight, bias, residual, constant
    chosen = choose("quantize_rows", backend, *tensors, refusal=size_refusal(x) or _float8_refusal(x))
    if chosen == "reference":
        return quantize_rows_ref(*tensors, eps, activation)
    if chosen == "torch":
        return _quantize_rows_torch(*tensors, eps, activation)
    quantized, scale, stream = quantize_rows_op(*tensors, eps, activation)
    return quantized, scale, x if residual is None else stream


def quantize_rows_ref(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    constant: Tensor | None,
    eps: float,
    activation: str | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """The definition."""
    wide = x.to(exact_dtype(x.dtype))
    wide = wide if residual is None else wide + residual
    stream = x if residual is None else wide.to(x.dtype)
    if weight is not None and bias is not None:
        wide, _ = layer_norm_ref(wide, weight, bias, None, constant, eps)
    if activation is not None:
        wide = activate(wide.clone(), activation)
    largest = wide.abs().amax(-1, keepdim=True).float()
    scale = torch.where(largest > SMALLEST, largest / E4M3_MAX, 1.0)
    return (wide / scale).to(torch.float8_e4m3fn), scale, stream


def activate(x: Tensor, activation: str) -> Tensor:
    """The activation of a GEMM's result, which may be overwritten."""
    if activation == "silu":
        return functional.silu(x, inplace=True)
    return functional.gelu(x) if activation == "gelu" else x * torch.sigmoid(SLOPE * x)


def _quantize_rows_torch(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    constant: Tensor | None,
    eps: float,
    activation: str | None,
) -> tuple[Tensor, Tensor, Tensor]:
    wide = x.to(exact_dtype(x.dtype), copy=True, memory_format=torch.contiguous_format)
    stream = x
    if residual is not None:
        # what follows writes over the wide rows
        stream = wide.add_(residual).to(x.dtype, copy=True)
    if weight is not None and bias is not None:
        wide = wide if constant is None else wide.add_(constant)
        wide = functional.layer_norm(wide, x.shape[-1:], weight.to(wide.dtype), bias.to(wide.dtype), eps)
    if activation is not None:
        wide = activate(wide, activation)
    largest = wide.abs().amax(-1, keepdim=True).float()
    scale = torch.where(largest > SMALLEST, largest / E4M3_MAX, 1.0)
    return (wide * scale.reciprocal()).to(torch.float8_e4m3fn), scale, stream


def _float8_refusal(x: Tensor) -> str | None:
    """The reason why the kernel cannot write float8 on the device of ``x``, or None."""
    if x.device.type == "cuda" and compute_capability(x.get_device()) < (8, 9):
        return "float8 needs compute capability 8.9 or newer"
    if x.device.type == "cpu" and interpreting():
        return "Triton's interpreter rounds float8 wrongly"
    return None


def _fake(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    constant: Tensor | None,
    eps: float,
    activation: str | None,
) -> tuple[Tensor, Tensor, Tensor]:
    quantized = x.new_empty(x.shape, dtype=torch.float8_e4m3fn)
    scale = x.new_empty((*x.shape[:-1], 1), dtype=torch.float32)
    return quantized, scale, x.new_empty(0 if residual is None else x.shape)


@fused_op(
    "quantize_rows", launcher="xclip_fast.kernels.quantize_rows.quantize_rows_fwd", fake=_fake, refusal=_float8_refusal
)
def quantize_rows_op(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    constant: Tensor | None,
    eps: float,
    activation: str | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Quantized, scale and stream, which is empty without a residual."""
    quantized, scale, stream = _quantize_rows_torch(x, weight, bias, residual, constant, eps, activation)
    return quantized, scale, x.new_empty(0) if residual is None else stream


def _check(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    constant: Tensor | None,
    activation: str | None,
) -> None:
    if x.ndim < 1 or not x.is_floating_point() or x.shape[-1] == 0:
        raise ValueError(f"x must be a floating point (..., K) tensor with K >= 1, found {x.dtype} {tuple(x.shape)}")
    if (weight is None) != (bias is None):
        raise ValueError("weight and bias of the norm must be given together")
    for name, added in (("residual", residual), ("constant", constant)):
        if weight is None and added is not None:
            raise ValueError(f"{name} is added in front of a norm: it needs weight and bias")
    if weight is not None and activation is not None:
        raise ValueError("a norm or an activation can be asked for, not both")
    for name, vector in (("weight", weight), ("bias", bias), ("constant", constant)):
        if vector is not None and vector.shape != x.shape[-1:]:
            raise ValueError(f"{name} must have shape ({x.shape[-1]},) to fit x, found {tuple(vector.shape)}")
    if residual is not None and (residual.shape != x.shape or residual.dtype != x.dtype):
        raise ValueError(
            f"residual must be {x.dtype} {tuple(x.shape)} like x, found {residual.dtype} {tuple(residual.shape)}"
        )
    if activation is not None and activation not in ACTIVATIONS:
        raise ValueError(f"unknown activation {activation!r}: choose one of {', '.join(ACTIVATIONS)}")


explains(quantize_rows, lambda x: size_refusal(x) or _float8_refusal(x))
