"""Cross-frame attention (CFA): class tokens to messages, and a message's key and value for its frame."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from xclip_fast.ops._backends import choose, explains
from xclip_fast.ops._dtypes import cast_for_gemm
from xclip_fast.ops._frames import (
    attention_refusal,
    check_heads,
    check_parameters,
    empty_norm_grads,
    frames_attention_backward,
    frames_attention_ref,
    frames_attention_torch,
    longest_clip,
    split_norm_grads,
    width_refusal,
)
from xclip_fast.ops._register import fused_op
from xclip_fast.ops.layer_norm import layer_norm_backward_op, layer_norm_op, layer_norm_ref


def message_attention(
    class_tokens: Tensor,
    fc_weight: Tensor,
    fc_bias: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    in_proj_weight: Tensor,
    in_proj_bias: Tensor,
    out_weight: Tensor,
    out_bias: Tensor,
    heads: int,
    *,
    cu_frames: Tensor | None = None,
    max_frames: int | None = None,
    eps: float = 1e-5,
    backend: str | None = None,
) -> Tensor:
    """Messages ``m + out(MHA(LN(m)))`` of ``m = fc(class_tokens)``, with attention among the frames of a clip.

    Args:
        class_tokens: (B, T, D), any strides; the view ``tokens[:, :, 0]`` is read in place. With ``cu_frames`` (F, D):
            ragged clips packed back to back.
        fc_weight, fc_bias: (D, D) and (D,), the message projection.
        norm_weight, norm_bias: (D,) in the dtype of ``class_tokens``, or in float32.
        in_proj_weight, in_proj_bias: (3D, D) and (3D,), packed query, key and value rows.
        out_weight, out_bias: (D, D) and (D,).
        heads: attention heads; the kernels take D / heads of 32, 64 and 128.
        cu_frames: (clips + 1,) int32 on the device of ``class_tokens``: the frames before each clip, from 0 up. Frames
            after the last boundary are padding: they attend to nothing. On a GPU the values are not checked; wrong
            ones give wrong messages, never an access outside of the tensors.
        max_frames: no ragged clip has more frames; of a longer one the kernels attend to the first ``max_frames``.
            Without it the bound is F. The kernels take one launch less when the bound is at most 64, and the gradient
            pads each clip to it.
        eps: added to the variance.
        backend: "reference", "torch", "triton", or the automatic choice.

    Returns:
        Messages in the shape and dtype of ``class_tokens``. The kernels sum and normalise in float32.

    Raises:
        ValueError: shapes, dtypes or boundaries do not fit, or the backend asked for cannot serve the call.

    Source: paper, equations 3 and 4; no norm before the projection, as in the official code.

    Example:
        >>> import torch
        >>> from xclip_fast.ops import message_attention
        >>> square, vector, one = torch.randn(64, 64) / 8, torch.zeros(64), torch.ones(64)
        >>> attention = torch.randn(192, 64) / 8, torch.zeros(192), square, vector
        >>> clips = torch.randn(2, 8, 64)  # the class tokens of 2 clips of 8 frames
        >>> messages = message_attention(clips, square, vector, one, vector, *attention, heads=2)
        >>> messages.shape
        torch.Size([2, 8, 64])
        >>> bounds = torch.tensor([0, 8, 16], dtype=torch.int32)  # the same clips, packed
        >>> packed = message_attention(
        ...     clips.flatten(0, 1), square, vector, one, vector, *attention, heads=2, cu_frames=bounds
        ... )
        >>> torch.allclose(packed, messages.flatten(0, 1), atol=1e-4)
        True
    """
    class_tokens, fc_weight, fc_bias, in_proj_weight, in_proj_bias, out_weight, out_bias = cast_for_gemm(
        class_tokens, fc_weight, fc_bias, in_proj_weight, in_proj_bias, out_weight, out_bias
    )
    longest = longest_clip("class_tokens", class_tokens, cu_frames, max_frames)
    width = class_tokens.shape[-1]
    check_heads(width, heads)
    parameters = {
        "fc_weight": (fc_weight, (width, width)),
        "fc_bias": (fc_bias, (width,)),
        "norm_weight": (norm_weight, (width,)),
        "norm_bias": (norm_bias, (width,)),
        "in_proj_weight": (in_proj_weight, (3 * width, width)),
        "in_proj_bias": (in_proj_bias, (3 * width,)),
        "out_weight": (out_weight, (width, width)),
        "out_bias": (out_bias, (width,)),
    }
    check_parameters(class_tokens, "class_tokens", parameters)
    tensors: Any = (class_tokens, *(tensor for tensor, _ in parameters.values()), cu_frames)
    chosen = choose("message_attention", backend, *tensors, refusal=attention_refusal(width, heads))
    if chosen == "reference":
        return message_attention_ref(*tensors, heads=heads, eps=eps)
    if chosen == "torch":
        return _message_attention_torch(*tensors, heads, longest, eps)
    return message_attention_op(*tensors, heads, longest, eps)


def message_attention_ref(
    class_tokens: Tensor,
    fc_weight: Tensor,
    fc_bias: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    in_proj_weight: Tensor,
    in_proj_bias: Tensor,
    out_weight: Tensor,
    out_bias: Tensor,
    cu_frames: Tensor | None,
    *,
    heads: int,
    eps: float,
) -> Tensor:
    """The definition."""
    message = functional.linear(class_tokens, fc_weight, fc_bias)
    attention = norm_weight, norm_bias, in_proj_weight, in_proj_bias, out_weight, out_bias
    return frames_attention_ref(message, *attention, cu_frames, heads, eps)


def _message_attention_torch(class_tokens: Tensor, fc_weight: Tensor, fc_bias: Tensor, *attention: Any) -> Tensor:
    message = functional.linear(class_tokens.reshape(-1, class_tokens.shape[-1]), fc_weight, fc_bias)
    return frames_attention_torch(message, *attention).view(class_tokens.shape)


def _fake(class_tokens: Tensor, *_: object) -> Tensor:
    return class_tokens.new_empty(class_tokens.shape)


def _save(ctx: Any, inputs: Any, output: Any) -> None:
    *tensors, ctx.heads, ctx.longest, ctx.eps = inputs
    ctx.save_for_backward(*tensors)


def _backward(ctx: Any, grad: Tensor) -> Any:
    *tensors, _, cu_frames = ctx.saved_tensors
    class_grad, fc_weight_grad, fc_bias_grad, vectors, *grads = message_attention_backward_op(
        grad, *tensors, cu_frames, ctx.heads, ctx.longest, ctx.eps
    )
    norm_grads = split_norm_grads(vectors, tensors[3], tensors[4])
    return class_grad, fc_weight_grad, fc_bias_grad, *norm_grads, *grads, None, None, None, None


def _flops(class_shape: Any, *arguments: Any, **kwargs: object) -> int:
    """Five GEMMs of D by D a frame, and its attention to ``longest`` frames: of ragged clips the bound."""
    *frames, width = class_shape
    longest = arguments[-2]
    return math.prod(frames) * (10 * width**2 + 4 * longest * width)


@fused_op(
    "message_attention",
    launcher="xclip_fast.kernels.message_attention.message_attention_fwd",
    fake=_fake,
    save=_save,
    backward=_backward,
    flops=_flops,
)
def message_attention_op(
    class_tokens: Tensor,
    fc_weight: Tensor,
    fc_bias: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    in_proj_weight: Tensor,
    in_proj_bias: Tensor,
    out_weight: Tensor,
    out_bias: Tensor,
    cu_frames: Tensor | None,
    heads: int,
    longest: int,
    eps: float,
) -> Tensor:
    attention = norm_weight, norm_bias, in_proj_weight, in_proj_bias, out_weight, out_bias
    arguments = (class_tokens, fc_weight, fc_bias, *attention, cu_frames, heads, longest, eps)
    return _message_attention_torch(*arguments)


def _backward_fake(grad: Tensor, *arguments: Any) -> list[Tensor]:
    class_tokens, fc_weight, fc_bias, _, _, in_proj_weight, in_proj_bias, out_weight = arguments[:8]
    before = [tensor.new_empty(tensor.shape) for tensor in (class_tokens, fc_weight, fc_bias)]
    after = [tensor.new_empty(tensor.shape) for tensor in (in_proj_weight, in_proj_bias, out_weight, fc_bias)]
    return [*before, empty_norm_grads(class_tokens), *after]


def _backward_flops(grad_shape: Any, *arguments: Any, **kwargs: object) -> int:
    """Two GEMMs for each of the five, and four of them again; of the attention four, and two again."""
    *frames, width = grad_shape
    longest = arguments[-2]
    return math.prod(frames) * (28 * width**2 + 12 * longest * width)


@fused_op("message_attention_backward", launcher=None, fake=_backward_fake, flops=_backward_flops)
def message_attention_backward_op(
    grad: Tensor,
    class_tokens: Tensor,
    fc_weight: Tensor,
    fc_bias: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    in_proj_weight: Tensor,
    in_proj_bias: Tensor,
    out_weight: Tensor,
    cu_frames: Tensor | None,
    heads: int,
    longest: int,
    eps: float,
) -> list[Tensor]:
    """Gradients in the order of the signature; those of the norm are the first two rows of (3, D), not rounded."""
    width = class_tokens.shape[-1]
    rows = class_tokens.reshape(-1, width)
    message = torch.addmm(fc_bias, rows, fc_weight.t())
    attention = norm_weight, norm_bias, in_proj_weight, in_proj_bias, out_weight
    grad_message, *grads = frames_attention_backward(
        grad.reshape(-1, width), message, *attention, cu_frames, heads, longest, eps
    )
    grad_rows = grad_message @ fc_weight
    return [grad_rows.view(class_tokens.shape), grad_message.t() @ rows, grad_message.sum(0), *grads]


def message_key_value(
    messages: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    weight: Tensor,
    bias: Tensor,
    *,
    eps: float = 1e-5,
    backend: str | None = None,
) -> Tensor:
    """Key and value of a message in its frame's attention: the block's norm and those rows of its input projection.

    Args:
        messages: (..., D), any strides.
        norm_weight, norm_bias: (D,) in the dtype of ``messages``, or in float32; ``ln_1`` of the block.
        weight, bias: (2D, D) and (2D,), the key and value rows of the packed projection: ``in_proj_weight[D:]``.
        eps: added to the variance.
        backend: "reference", "torch", "triton", or the automatic choice.

    Returns:
        (..., 2D) in the dtype of ``messages``, key then value, as ``frame_attention`` reads them.

    Raises:
        ValueError: shapes or dtypes do not fit, or the backend asked for cannot serve the call.

    Source: paper, equation 5; the message's own query is never used.

    Example:
        >>> import torch
        >>> from xclip_fast.ops import message_key_value
        >>> weight, bias = torch.randn(2 * 64, 64), torch.zeros(2 * 64)
        >>> message_key_value(torch.randn(2, 8, 64), torch.ones(64), torch.zeros(64), weight, bias).shape
        torch.Size([2, 8, 128])
    """
    messages, weight, bias = cast_for_gemm(messages, weight, bias)
    if messages.ndim < 1:
        raise ValueError("messages must be (..., D), found a single number")
    width = messages.shape[-1]
    parameters = {
        "norm_weight": (norm_weight, (width,)),
        "norm_bias": (norm_bias, (width,)),
        "weight": (weight, (2 * width, width)),
        "bias": (bias, (2 * width,)),
    }
    check_parameters(messages, "messages", parameters)
    tensors = messages, norm_weight, norm_bias, weight, bias
    chosen = choose("message_key_value", backend, *tensors, refusal=width_refusal(width))
    if chosen == "reference":
        return message_key_value_ref(*tensors, eps)
    if chosen == "torch":
        return _message_key_value_torch(*tensors, eps)
    return message_key_value_op(*tensors, eps)


def message_key_value_ref(
    messages: Tensor, norm_weight: Tensor, norm_bias: Tensor, weight: Tensor, bias: Tensor, eps: float
) -> Tensor:
    """The definition."""
    normed, _ = layer_norm_ref(messages, norm_weight, norm_bias, None, None, eps)
    return functional.linear(normed, weight, bias)


def _message_key_value_torch(
    messages: Tensor, norm_weight: Tensor, norm_bias: Tensor, weight: Tensor, bias: Tensor, eps: float
) -> Tensor:
    dtype = messages.dtype
    normed = functional.layer_norm(messages, messages.shape[-1:], norm_weight.to(dtype), norm_bias.to(dtype), eps)
    return functional.linear(normed, weight, bias)


def _key_value_fake(messages: Tensor, *parameters: Any) -> Tensor:
    return messages.new_empty(*messages.shape[:-1], 2 * messages.shape[-1])


def _save_key_value(ctx: Any, inputs: Any, output: Any) -> None:
    *tensors, _, ctx.eps = inputs
    ctx.save_for_backward(*tensors)


def _key_value_backward(ctx: Any, grad: Tensor) -> Any:
    saved = ctx.saved_tensors
    messages_grad, vectors, *grads = message_key_value_backward_op(grad, *saved, ctx.eps)
    return messages_grad, *split_norm_grads(vectors, saved[1], saved[2]), *grads, None


def _key_value_flops(message_shape: Any, *arguments: Any, **kwargs: object) -> int:
    """One GEMM of D by 2D a message."""
    *frames, width = message_shape
    return 4 * math.prod(frames) * width**2


@fused_op(
    "message_key_value",
    launcher="xclip_fast.kernels.message_attention.message_key_value_fwd",
    fake=_key_value_fake,
    save=_save_key_value,
    backward=_key_value_backward,
    flops=_key_value_flops,
)
def message_key_value_op(
    messages: Tensor, norm_weight: Tensor, norm_bias: Tensor, weight: Tensor, bias: Tensor, eps: float
) -> Tensor:
    rows = messages.reshape(-1, messages.shape[-1])
    packed = _message_key_value_torch(rows, norm_weight, norm_bias, weight, bias, eps)
    return packed.view(*messages.shape[:-1], bias.shape[0])


def _key_value_backward_fake(grad: Tensor, *arguments: Any) -> list[Tensor]:
    messages, _, _, weight = arguments[:4]
    grad_parameters = weight.new_empty(weight.shape), weight.new_empty(weight.shape[0])
    return [messages.new_empty(messages.shape), empty_norm_grads(messages), *grad_parameters]


def _key_value_backward_flops(grad_shape: Any, *arguments: Any, **kwargs: object) -> int:
    """Two GEMMs of D by 2D a message."""
    return 2 * _key_value_flops((*grad_shape[:-1], grad_shape[-1] // 2))


@fused_op("message_key_value_backward", launcher=None, fake=_key_value_backward_fake, flops=_key_value_backward_flops)
def message_key_value_backward_op(
    grad: Tensor, messages: Tensor, norm_weight: Tensor, norm_bias: Tensor, weight: Tensor, eps: float
) -> list[Tensor]:
    """Gradients of messages, norm (the first two rows of (3, D), not rounded), weight and bias."""
    width = messages.shape[-1]
    normed, _, mean, rstd = layer_norm_op(messages, norm_weight, norm_bias, None, None, eps)
    grad = grad.reshape(-1, 2 * width)
    grad_normed = (grad @ weight).view(messages.shape)
    grad_messages, vectors = layer_norm_backward_op(grad_normed, None, messages, norm_weight, None, mean, rstd)
    return [grad_messages, vectors, grad.t() @ normed.view(-1, width), grad.sum(0)]


def launches(*arguments: Any) -> int:
    """Kernels that the registered op ``message_attention`` launches for its arguments; meta tensors will do."""
    from xclip_fast.kernels.message_attention import launches

    return launches(*arguments)


def key_value_launches(*arguments: Any) -> int:
    """Kernels that the registered op ``message_key_value`` launches for its arguments; meta tensors will do."""
    from xclip_fast.kernels.message_attention import key_value_launches

    return key_value_launches(*arguments)


explains(message_attention, lambda class_tokens, heads: attention_refusal(class_tokens.shape[-1], heads))
explains(message_key_value, lambda messages: width_refusal(messages.shape[-1]))
