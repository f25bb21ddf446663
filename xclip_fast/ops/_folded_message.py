"""Class tokens to the key and value of their messages, from folded weights. The engine's own: inference only.

What is computed from a message is a GEMM of its layer norm, and but for the norm's division that is linear in what the
message was computed from. So one GEMM of the class tokens gives the message, its share of its key and value in the
frame, and its query, key and value among the frames, each to be divided by the message's deviation; a second GEMM, of
the attention's result, is added to message, key and value.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from xclip_fast.ops._backends import choose, explains
from xclip_fast.ops._dtypes import exact_dtype
from xclip_fast.ops._frames import Clips, attention_refusal, check_heads
from xclip_fast.ops._register import fused_op


class Folded(NamedTuple):
    """The weights of ``folded_message``; vectors but ``bias`` in the dtype of the class tokens, or a wider one.

    Attributes:
        weight, bias: (6D, D) and (6D,): rows of the message, of its key and value in its frame, and of its query, key
            and value among the frames.
        shift: (3D,), added to query, key and value after the division.
        out_weight, out_bias: (3D, D) and (3D,), of the message and its key and value in its frame, from what was
            attended to.
        pair_shift: (2D,), added to key and value after the division.
    """

    weight: Tensor
    bias: Tensor
    shift: Tensor
    out_weight: Tensor
    out_bias: Tensor
    pair_shift: Tensor


def fold(
    fc: tuple[Tensor, Tensor],
    norm: tuple[Tensor, Tensor],
    in_proj: tuple[Tensor, Tensor],
    out: tuple[Tensor, Tensor],
    pair_norm: tuple[Tensor, Tensor],
    pair: tuple[Tensor, Tensor],
) -> Folded:
    """Fold float64 weights and biases, as ``message_attention`` and ``message_key_value`` take them."""
    inner, shift = fold_norm(*norm, *in_proj)
    outer, pair_shift = fold_norm(*pair_norm, *pair)
    (weight, bias), (out_weight, out_bias) = fc, out
    return Folded(
        weight=torch.cat([weight, outer @ weight, inner @ weight]),
        bias=torch.cat([bias, outer @ bias, inner @ bias]),
        shift=shift,
        out_weight=torch.cat([out_weight, outer @ out_weight]),
        out_bias=torch.cat([out_bias, outer @ out_bias]),
        pair_shift=pair_shift,
    )


def fold_norm(norm_weight: Tensor, norm_bias: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    """``linear(layer_norm(x))`` as ``x @ weight.t() / deviation(x) + shift``: this weight and shift."""
    scaled = weight * norm_weight
    return scaled - scaled.mean(dim=1, keepdim=True), weight @ norm_bias + bias


def folded_message(
    class_tokens: Tensor,
    weights: Folded,
    heads: int,
    *,
    eps: float = 1e-5,
    pair_eps: float = 1e-5,
    backend: str | None = None,
) -> Tensor:
    """``message_key_value(message_attention(class_tokens))``, four launches of which two are GEMMs.

    Args:
        class_tokens: (B, T, D), any strides; the view ``tokens[:, :, 0]`` is read in place.
        weights: from ``fold``, in the dtype of ``class_tokens`` on its device.
        heads: attention heads; the kernels take D / heads of 32, 64 and 128.
        eps, pair_eps: added to the variance of the message before its attention, and after it.
        backend: "reference", "torch", "triton", or the automatic choice.

    Returns:
        (B, T, 2D) in the dtype of ``class_tokens``, key then value, as ``frame_attention`` reads them. In half
        precision it is nearer to the truth than with weights that are not folded: no normed row is rounded, and what
        all numbers of a message have in common never enters the GEMMs.

    Raises:
        ValueError: shapes or dtypes do not fit, or the backend asked for cannot serve the call.
    """
    _check(class_tokens, weights, heads)
    refusal = attention_refusal(class_tokens.shape[-1], heads)
    if choose("folded_message", backend, class_tokens, *weights, refusal=refusal) != "triton":
        return folded_message_ref(class_tokens, *weights, heads, eps, pair_eps)
    return folded_message_op(class_tokens, *weights, heads, eps, pair_eps)


def folded_message_ref(
    class_tokens: Tensor,
    weight: Tensor,
    bias: Tensor,
    shift: Tensor,
    out_weight: Tensor,
    out_bias: Tensor,
    pair_shift: Tensor,
    heads: int,
    eps: float,
    pair_eps: float,
) -> Tensor:
    """The definition."""
    dtype, (batch, frames, width) = class_tokens.dtype, class_tokens.shape
    first = functional.linear(class_tokens.reshape(-1, width), weight, bias)
    stream, packed = first[:, : 3 * width], first[:, 3 * width :]
    packed = (packed * _inverse_deviation(stream[:, :width], eps) + shift).to(dtype)
    clips = Clips(frames)
    query, key, value = clips.split(packed, heads, 3)
    attended = clips.merge(functional.scaled_dot_product_attention(query, key, value))
    stream = torch.addmm(stream, attended, out_weight.t()) + out_bias
    pair = stream[:, width:] * _inverse_deviation(stream[:, :width], pair_eps) + pair_shift
    return pair.to(dtype).view(batch, frames, 2 * width)


def _inverse_deviation(x: Tensor, eps: float) -> Tensor:
    wide = x.to(exact_dtype(x.dtype))
    return ((wide - wide.mean(-1, keepdim=True)).square().mean(-1, keepdim=True) + eps).rsqrt()


def _fake(class_tokens: Tensor, *_: object) -> Tensor:
    return class_tokens.new_empty(*class_tokens.shape[:-1], 2 * class_tokens.shape[-1])


def _flops(class_shape: Any, *_: object, **kwargs: object) -> int:
    """Nine GEMMs of D by D a frame, and its attention to the frames of its clip."""
    frames, width = class_shape[-2:]
    return math.prod(class_shape[:-1]) * (18 * width**2 + 4 * frames * width)


@fused_op("folded_message", launcher="xclip_fast.kernels.folded_message.folded_message_fwd", fake=_fake, flops=_flops)
def folded_message_op(
    class_tokens: Tensor,
    weight: Tensor,
    bias: Tensor,
    shift: Tensor,
    out_weight: Tensor,
    out_bias: Tensor,
    pair_shift: Tensor,
    heads: int,
    eps: float,
    pair_eps: float,
) -> Tensor:
    arguments = class_tokens, weight, bias, shift, out_weight, out_bias, pair_shift, heads, eps, pair_eps
    return folded_message_ref(*arguments)


def launches(*arguments: Any) -> int:
    """Kernels that the registered op ``folded_message`` launches for its arguments; meta tensors will do."""
    from xclip_fast.kernels.folded_message import launches

    return launches(*arguments)


def _check(class_tokens: Tensor, weights: Folded, heads: int) -> None:
    if class_tokens.ndim != 3:
        raise ValueError(f"class_tokens must be (B, T, D), found {tuple(class_tokens.shape)}")
    width, dtype = class_tokens.shape[-1], class_tokens.dtype
    check_heads(width, heads)
    shapes = (6 * width, width), (6 * width,), (3 * width,), (3 * width, width), (3 * width,), (2 * width,)
    for name, tensor, shape in zip(Folded._fields, weights, shapes, strict=True):
        wide = name in ("shift", "out_bias", "pair_shift") and tensor.dtype == exact_dtype(dtype)
        if tensor.shape != shape or (tensor.dtype != dtype and not wide):
            raise ValueError(
                f"{name} must be {dtype} {shape} to fit class_tokens, found {tensor.dtype} {tuple(tensor.shape)}"
            )


explains(folded_message, lambda class_tokens, heads: attention_refusal(class_tokens.shape[-1], heads))
