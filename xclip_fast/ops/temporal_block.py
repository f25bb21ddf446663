"""The pre-norm block of the multiframe integration transformer (MIT): attention among a clip's frames, MLP."""

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
)
from xclip_fast.ops._register import fused_op
from xclip_fast.ops.layer_norm import layer_norm_backward_op, layer_norm_op, layer_norm_ref
from xclip_fast.ops.linear_quick_gelu import SLOPE, linear_quick_gelu_ref, quick_gelu_backward_op


def temporal_block(
    x: Tensor,
    norm1_weight: Tensor,
    norm1_bias: Tensor,
    in_proj_weight: Tensor,
    in_proj_bias: Tensor,
    out_weight: Tensor,
    out_bias: Tensor,
    norm2_weight: Tensor,
    norm2_bias: Tensor,
    fc_weight: Tensor,
    fc_bias: Tensor,
    proj_weight: Tensor,
    proj_bias: Tensor,
    heads: int,
    *,
    positions: Tensor | None = None,
    pooled_with: Tensor | None = None,
    cu_frames: Tensor | None = None,
    max_frames: int | None = None,
    eps: float = 1e-5,
    backend: str | None = None,
) -> Tensor:
    """``y + proj(quick_gelu(fc(LN2(y))))`` of ``y = x + out(MHA(LN1(x)))``, attention among the frames of a clip.

    With ``positions`` they are added to ``x`` first; with ``pooled_with`` the result is added to it and averaged over
    the frames. One block with both is the whole of MIT.

    Args:
        x: (B, T, E), any strides. With ``cu_frames`` (F, E): ragged clips packed back to back.
        norm1_weight, norm1_bias, norm2_weight, norm2_bias: (E,) in the dtype of ``x``, or in float32.
        in_proj_weight, in_proj_bias: (3E, E) and (3E,), packed query, key and value rows.
        out_weight, out_bias: (E, E) and (E,).
        fc_weight, fc_bias: (M, E) and (M,).
        proj_weight, proj_bias: (E, M) and (E,).
        heads: attention heads; the kernels take E / heads of 32, 64 and 128.
        positions: (T, E) in the dtype of ``x``; not with ``cu_frames``.
        pooled_with: (B, T, E) like ``x``, with T >= 1; not with ``cu_frames``.
        cu_frames, max_frames: ragged clips, as in ``message_attention``.
        eps: added to the variance.
        backend: "reference", "torch", "triton", or the automatic choice.

    Returns:
        The shape and dtype of ``x``; (B, E) with ``pooled_with``. The kernels sum, normalise and activate in float32;
        for the gradient only the inputs are kept.

    Raises:
        ValueError: shapes, dtypes or boundaries do not fit, or the backend asked for cannot serve the call.

    Source: paper, equation 6.

    Example:
        >>> import torch
        >>> from xclip_fast.ops import temporal_block
        >>> norm = torch.ones(64), torch.zeros(64)
        >>> attention = torch.randn(192, 64) / 8, torch.zeros(192), torch.randn(64, 64) / 8, torch.zeros(64)
        >>> mlp = torch.randn(256, 64) / 8, torch.zeros(256), torch.randn(64, 256) / 16, torch.zeros(64)
        >>> x, positions = torch.randn(2, 8, 64), torch.randn(8, 64)  # 2 clips of 8 frames
        >>> temporal_block(x, *norm, *attention, *norm, *mlp, heads=2).shape
        torch.Size([2, 8, 64])
        >>> temporal_block(x, *norm, *attention, *norm, *mlp, heads=2, positions=positions, pooled_with=x).shape
        torch.Size([2, 64])
    """
    x, in_proj_weight, in_proj_bias, out_weight, out_bias, fc_weight, fc_bias, proj_weight, proj_bias = cast_for_gemm(
        x, in_proj_weight, in_proj_bias, out_weight, out_bias, fc_weight, fc_bias, proj_weight, proj_bias
    )
    longest = longest_clip("x", x, cu_frames, max_frames)
    width = x.shape[-1]
    check_heads(width, heads)
    hidden = fc_weight.shape[0] if fc_weight.ndim else 0
    parameters = {
        "norm1_weight": (norm1_weight, (width,)),
        "norm1_bias": (norm1_bias, (width,)),
        "in_proj_weight": (in_proj_weight, (3 * width, width)),
        "in_proj_bias": (in_proj_bias, (3 * width,)),
        "out_weight": (out_weight, (width, width)),
        "out_bias": (out_bias, (width,)),
        "norm2_weight": (norm2_weight, (width,)),
        "norm2_bias": (norm2_bias, (width,)),
        "fc_weight": (fc_weight, (hidden, width)),
        "fc_bias": (fc_bias, (hidden,)),
        "proj_weight": (proj_weight, (width, hidden)),
        "proj_bias": (proj_bias, (width,)),
    }
    check_parameters(x, "x", parameters)
    x, positions, pooled_with = cast_for_gemm(x, positions, pooled_with)
    _check_clips(x, positions, pooled_with, cu_frames)
    tensors: Any = (x, *(tensor for tensor, _ in parameters.values()), positions, pooled_with, cu_frames)
    chosen = choose("temporal_block", backend, *tensors, refusal=attention_refusal(width, heads))
    if chosen == "reference":
        return temporal_block_ref(*tensors, heads=heads, eps=eps)
    if chosen == "torch":
        return _temporal_block_torch(*tensors, heads=heads, longest=longest, eps=eps)
    return temporal_block_op(*tensors, heads, longest, eps)


def temporal_block_ref(
    x: Tensor,
    norm1_weight: Tensor,
    norm1_bias: Tensor,
    in_proj_weight: Tensor,
    in_proj_bias: Tensor,
    out_weight: Tensor,
    out_bias: Tensor,
    norm2_weight: Tensor,
    norm2_bias: Tensor,
    fc_weight: Tensor,
    fc_bias: Tensor,
    proj_weight: Tensor,
    proj_bias: Tensor,
    positions: Tensor | None,
    pooled_with: Tensor | None,
    cu_frames: Tensor | None,
    *,
    heads: int,
    eps: float,
) -> Tensor:
    """The definition."""
    x = x if positions is None else x + positions
    attention = norm1_weight, norm1_bias, in_proj_weight, in_proj_bias, out_weight, out_bias
    x = frames_attention_ref(x, *attention, cu_frames, heads, eps)
    normed, _ = layer_norm_ref(x, norm2_weight, norm2_bias, None, None, eps)
    x = x + functional.linear(linear_quick_gelu_ref(normed, fc_weight, fc_bias), proj_weight, proj_bias)
    return x if pooled_with is None else (pooled_with + x).mean(1)


def _temporal_block_torch(
    x: Tensor,
    norm1_weight: Tensor,
    norm1_bias: Tensor,
    in_proj_weight: Tensor,
    in_proj_bias: Tensor,
    out_weight: Tensor,
    out_bias: Tensor,
    norm2_weight: Tensor,
    norm2_bias: Tensor,
    fc_weight: Tensor,
    fc_bias: Tensor,
    proj_weight: Tensor,
    proj_bias: Tensor,
    positions: Tensor | None,
    pooled_with: Tensor | None,
    cu_frames: Tensor | None,
    *,
    heads: int,
    longest: int,
    eps: float,
) -> Tensor:
    x = x if positions is None else x + positions
    attention = norm1_weight, norm1_bias, in_proj_weight, in_proj_bias, out_weight, out_bias
    width = x.shape[-1]
    rows = frames_attention_torch(x.reshape(-1, width), *attention, cu_frames, heads, longest, eps)
    normed = functional.layer_norm(rows, (width,), norm2_weight.to(x.dtype), norm2_bias.to(x.dtype), eps)
    pre = functional.linear(normed, fc_weight, fc_bias)
    x = (rows + functional.linear(pre * torch.sigmoid(SLOPE * pre), proj_weight, proj_bias)).view(x.shape)
    return x if pooled_with is None else (pooled_with + x).mean(1)


def _fake(x: Tensor, *arguments: Any) -> Tensor:
    pooled_with = arguments[-5]
    return x.new_empty(x.shape if pooled_with is None else (x.shape[0], x.shape[2]))


def _save(ctx: Any, inputs: Any, output: Any) -> None:
    *tensors, pooled_with, cu_frames, ctx.heads, ctx.longest, ctx.eps = inputs
    ctx.save_for_backward(*tensors, cu_frames)
    ctx.pooled = pooled_with is not None


def _backward(ctx: Any, grad: Tensor) -> Any:
    x, *tensors, _, positions, cu_frames = ctx.saved_tensors
    if ctx.pooled:
        grad = (grad / x.shape[1]).unsqueeze(1).expand(x.shape).contiguous()
    tensors = [x if positions is None else x + positions, *tensors]
    grads = temporal_block_backward_op(grad, *tensors, cu_frames, ctx.heads, ctx.longest, ctx.eps)
    grad_x, norm1_grads, *attention_grads, norm2_grads = grads[:7]
    norm1_grads = split_norm_grads(norm1_grads, *tensors[1:3])
    norm2_grads = split_norm_grads(norm2_grads, *tensors[7:9])
    grad_positions = None if positions is None else grad_x.sum(0)
    clips = grad_positions, grad if ctx.pooled else None, None
    return grad_x, *norm1_grads, *attention_grads, *norm2_grads, *grads[7:], *clips, None, None, None


def _flops(x_shape: Any, *arguments: Any, **kwargs: object) -> int:
    """Four GEMMs of E by E and two of E by M a frame, and its attention to ``longest`` frames."""
    *frames, width = x_shape
    hidden, longest = arguments[8][0], arguments[-2]
    return math.prod(frames) * (8 * width**2 + 4 * width * hidden + 4 * longest * width)


@fused_op(
    "temporal_block",
    launcher="xclip_fast.kernels.temporal_block.temporal_block_fwd",
    fake=_fake,
    save=_save,
    backward=_backward,
    flops=_flops,
)
def temporal_block_op(
    x: Tensor,
    norm1_weight: Tensor,
    norm1_bias: Tensor,
    in_proj_weight: Tensor,
    in_proj_bias: Tensor,
    out_weight: Tensor,
    out_bias: Tensor,
    norm2_weight: Tensor,
    norm2_bias: Tensor,
    fc_weight: Tensor,
    fc_bias: Tensor,
    proj_weight: Tensor,
    proj_bias: Tensor,
    positions: Tensor | None,
    pooled_with: Tensor | None,
    cu_frames: Tensor | None,
    heads: int,
    longest: int,
    eps: float,
) -> Tensor:
    attention = norm1_weight, norm1_bias, in_proj_weight, in_proj_bias, out_weight, out_bias
    mlp = norm2_weight, norm2_bias, fc_weight, fc_bias, proj_weight, proj_bias
    tensors = (x, *attention, *mlp, positions, pooled_with, cu_frames)
    return _temporal_block_torch(*tensors, heads=heads, longest=longest, eps=eps)


def _backward_fake(grad: Tensor, x: Tensor, *arguments: Any) -> list[Tensor]:
    attention, mlp = arguments[2:6], arguments[8:11]
    empty = [[tensor.new_empty(tensor.shape) for tensor in part] for part in (attention, mlp)]
    vectors = [empty_norm_grads(x), empty_norm_grads(x)]
    return [x.new_empty(x.shape), vectors[0], *empty[0], vectors[1], *empty[1], x.new_empty(x.shape[-1])]


def _backward_flops(grad_shape: Any, *arguments: Any, **kwargs: object) -> int:
    """Two GEMMs for each of the six; the first four again, QKV once more, fc again; the attention four times."""
    *frames, width = grad_shape
    hidden, longest = arguments[9][0], arguments[-2]
    return math.prod(frames) * (30 * width**2 + 10 * width * hidden + 16 * longest * width)


@fused_op("temporal_block_backward", launcher=None, fake=_backward_fake, flops=_backward_flops)
def temporal_block_backward_op(
    grad: Tensor,
    x: Tensor,
    norm1_weight: Tensor,
    norm1_bias: Tensor,
    in_proj_weight: Tensor,
    in_proj_bias: Tensor,
    out_weight: Tensor,
    out_bias: Tensor,
    norm2_weight: Tensor,
    norm2_bias: Tensor,
    fc_weight: Tensor,
    fc_bias: Tensor,
    proj_weight: Tensor,
    cu_frames: Tensor | None,
    heads: int,
    longest: int,
    eps: float,
) -> list[Tensor]:
    """Gradients in the order of the signature; those of a norm are the first two rows of (3, E), not rounded."""
    width = x.shape[-1]
    grad, rows = grad.reshape(-1, width), x.reshape(-1, width)
    attention = norm1_weight, norm1_bias, in_proj_weight, in_proj_bias, out_weight
    clips = cu_frames, heads, longest, eps
    middle = frames_attention_torch(rows, *attention, out_bias, *clips)
    normed, _, mean, rstd = layer_norm_op(middle, norm2_weight, norm2_bias, None, None, eps)
    pre = torch.addmm(fc_bias, normed, fc_weight.t())
    grad_pre, hidden, grad_fc_bias = quick_gelu_backward_op(grad @ proj_weight, pre, True)
    grad_middle, norm2_grads = layer_norm_backward_op(
        grad_pre @ fc_weight, grad, middle, norm2_weight, None, mean, rstd
    )
    grad_rows, *attention_grads = frames_attention_backward(grad_middle, rows, *attention, *clips)
    mlp_grads = grad_pre.t() @ normed, grad_fc_bias, grad.t() @ hidden, grad.sum(0)
    return [grad_rows.view(x.shape), *attention_grads, norm2_grads, *mlp_grads]


def launches(*arguments: Any) -> int:
    """Kernels that the registered op launches for its arguments; meta tensors will do."""
    from xclip_fast.kernels.temporal_block import launches

    return launches(*arguments)


def _check_clips(x: Tensor, positions: Tensor | None, pooled_with: Tensor | None, cu_frames: Tensor | None) -> None:
    if cu_frames is not None:
        if positions is not None or pooled_with is not None:
            raise ValueError("positions and pooled_with take clips of one length, found cu_frames: add them outside")
        return
    for name, tensor, shape in (("positions", positions, x.shape[1:]), ("pooled_with", pooled_with, x.shape)):
        if tensor is not None and (tensor.shape != shape or tensor.dtype != x.dtype):
            raise ValueError(
                f"{name} must be {x.dtype} {tuple(shape)} to fit x, found {tensor.dtype} {tuple(tensor.shape)}"
            )
    if pooled_with is not None and not x.shape[1]:
        raise ValueError(f"x must have at least one frame a clip to be averaged, found {tuple(x.shape)}")


explains(temporal_block, lambda x, heads: attention_refusal(x.shape[-1], heads))
