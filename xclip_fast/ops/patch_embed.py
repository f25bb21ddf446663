"""Frames to first tokens: pixels normalised, cut into patches, projected, with class token, positions and norm."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from xclip_fast.ops import _patch_extension
from xclip_fast.ops._backends import choose, explains, kernel_refusal
from xclip_fast.ops._dtypes import autocast_dtype, exact_dtype
from xclip_fast.ops._patch_contract import affine, channels_last, check, pixel_statistics, vector
from xclip_fast.ops._register import fused_op


def patch_embed(
    frames: Tensor,
    weight: Tensor,
    class_embedding: Tensor,
    positions: Tensor,
    *,
    norm_weight: Tensor | None = None,
    norm_bias: Tensor | None = None,
    eps: float = 1e-5,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    dtype: torch.dtype | None = None,
    backend: str | None = None,
    _packed: _patch_extension.Packed | None = None,
) -> Tensor:
    """The tokens of frames, from decoded bytes on: normalise, project, prepend the class, add positions, norm.

    Args:
        frames: uint8 (F, H, W, 3) or (F, 3, H, W), any strides, so a crop needs no copy; where both readings fit it is
            the former. Or floating point (F, 3, H, W), already normalised, computed in the dtype of ``weight``.
        weight: (D, 3, P, P); H and W are multiples of P.
        class_embedding: (D,).
        positions: (1 + N, D) for this grid of N = (H / P) (W / P) patches, that of the class first.
        norm_weight, norm_bias: (D,) each, of a layer norm of the tokens; both or neither.
        eps: added to the variance of the norm.
        mean, std: three numbers each, of pixels from 0 to 1, for uint8 frames alone; by default OpenAI CLIP's.
        dtype: of the result; by default that of ``weight``, or of autocast.
        backend: "reference", "torch", "triton", "extension", or the automatic choice.

    Returns:
        (F, 1 + N, D). Sums and the norm are in float32 where the kernels or the extension compute them; on a GPU the
        result of the GEMM is rounded before them, to the dtype of the weights, and by the extension to float16. On the
        CPU the extension rounds weights of uint8 frames to 24 bits (float32) or 16 bits (half precision) beside the
        largest of their row, on CUDA to float16 beside the sum of their row.

    Raises:
        ValueError: shapes, dtypes or devices do not fit, frames or tokens have 2^31 elements or more, mean or std are
            given for floating point frames, or the backend asked for cannot serve the call.

    Source: ``visual.conv1``, ``class_embedding``, ``positional_embedding`` and ``ln_pre``.

    Example:
        >>> import torch
        >>> from xclip_fast.ops import patch_embed
        >>> frames = torch.randint(0, 256, (8, 32, 32, 3), dtype=torch.uint8)  # as they are decoded
        >>> weight, class_embedding, positions = torch.randn(64, 3, 16, 16), torch.randn(64), torch.randn(5, 64)
        >>> patch_embed(frames, weight, class_embedding, positions).shape  # the class token and 4 patches of each frame
        torch.Size([8, 5, 64])
    """
    computed = autocast_dtype(frames.device.type)
    if computed is not None and weight.is_floating_point():
        weight = weight.to(computed)
    dtype = weight.dtype if dtype is None else dtype
    check(frames, weight, class_embedding, positions, norm_weight, norm_bias, dtype)
    mean, std = pixel_statistics(frames, mean, std)
    extension = _patch_extension.refusal(frames, weight)
    tensors = frames, weight, class_embedding, positions, norm_weight, norm_bias
    # on a GPU packing takes as long as both kernels: only weights that are packed are worth it there
    wins = frames.device.type != "cuda" or _packed is not None or kernel_refusal(*tensors) is not None
    chosen = choose("patch_embed", backend, *tensors, extension=extension, extension_wins=wins)
    if chosen == "reference":
        return patch_embed_ref(*tensors, eps, mean, std, dtype)
    if chosen == "torch":
        return _patch_embed_torch(*tensors, eps, mean, std, dtype)
    if chosen == "extension" and _packed is not None:
        # the engine packed these weights, which never change: no gradients there, and no operator between
        call = _patch_extension.Call(*tensors, eps, affine(mean, std), dtype, save_embedded=False)
        return _patch_extension.on_cuda(call, _packed)[0]
    wants_gradient = torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in tensors)
    save_embedded = norm_weight is not None and wants_gradient
    return patch_embed_op(*tensors, eps, mean, std, dtype, save_embedded, chosen == "extension")[0]


def patch_embed_ref(
    frames: Tensor,
    weight: Tensor,
    class_embedding: Tensor,
    positions: Tensor,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    eps: float,
    mean: Sequence[float],
    std: Sequence[float],
    dtype: torch.dtype,
) -> Tensor:
    """The definition."""
    pixels = channels_last(frames)
    if frames.dtype == torch.uint8:
        exact = exact_dtype(weight.dtype)
        shift, scale = (vector(numbers, exact, pixels.device) for numbers in (mean, std))
        pixels = (pixels.to(exact) / 255 - shift) / scale
    pixels = pixels.permute(0, 3, 1, 2).to(weight.dtype)
    patches = torch.nn.functional.conv2d(pixels, weight, stride=weight.shape[-1]).flatten(2).transpose(1, 2)
    classes = class_embedding.to(weight.dtype).expand(len(frames), 1, -1)
    tokens = torch.cat([classes, patches], dim=1).to(torch.promote_types(weight.dtype, dtype))
    tokens = tokens + positions.to(tokens.dtype)
    if norm_weight is not None and norm_bias is not None:
        centred = tokens - tokens.mean(-1, keepdim=True)
        deviation = (centred.square().mean(-1, keepdim=True) + eps).sqrt()
        tokens = centred / deviation * norm_weight.to(tokens.dtype) + norm_bias.to(tokens.dtype)
    return tokens.to(dtype)


def _patch_embed_torch(
    frames: Tensor,
    weight: Tensor,
    class_embedding: Tensor,
    positions: Tensor,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    eps: float,
    mean: Sequence[float],
    std: Sequence[float],
    dtype: torch.dtype,
) -> Tensor:
    embedded = _embedded_torch(frames, weight, class_embedding, positions, mean, std, dtype)
    return _normed_torch(embedded, norm_weight, norm_bias, eps).to(dtype)


def _embedded_torch(
    frames: Tensor,
    weight: Tensor,
    class_embedding: Tensor,
    positions: Tensor,
    mean: Sequence[float],
    std: Sequence[float],
    dtype: torch.dtype,
) -> Tensor:
    """The tokens before their norm, in the wider of the dtypes of the weights and the result."""
    rows = _rows_torch(frames, weight.shape[-1], mean, std, weight.dtype)
    wide = torch.promote_types(weight.dtype, dtype)
    patches = torch.nn.functional.linear(rows, weight.flatten(1)).to(wide)
    positions = positions.to(wide)
    classes = (class_embedding.to(wide) + positions[0]).expand(len(frames), 1, -1)
    return torch.cat([classes, patches.view(len(frames), len(positions) - 1, len(weight)) + positions[1:]], dim=1)


def _normed_torch(embedded: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> Tensor:
    if weight is None or bias is None:
        return embedded
    weight, bias = weight.to(embedded.dtype), bias.to(embedded.dtype)
    return torch.nn.functional.layer_norm(embedded, embedded.shape[-1:], weight, bias, eps)


def _rows_torch(frames: Tensor, patch: int, mean: Sequence[float], std: Sequence[float], dtype: torch.dtype) -> Tensor:
    """Patches as rows (F N, 3 P P), their pixels normalised, in the order of the weights."""
    pixels = channels_last(frames)
    count, height, width, _ = pixels.shape
    if frames.dtype == torch.uint8:
        exact = exact_dtype(dtype)
        scale, offset = (vector(numbers, exact, pixels.device) for numbers in affine(mean, std))
        pixels = torch.addcmul(offset, pixels.to(exact), scale)
    grid = pixels.to(dtype).view(count, height // patch, patch, width // patch, patch, 3)
    return grid.permute(0, 1, 3, 5, 2, 4).reshape(count * (height // patch) * (width // patch), 3 * patch * patch)


def _launch(
    frames: Tensor,
    weight: Tensor,
    class_embedding: Tensor,
    positions: Tensor,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    eps: float,
    mean: Sequence[float],
    std: Sequence[float],
    dtype: torch.dtype,
    save_embedded: bool,
    extension: bool,
) -> tuple[Tensor, Tensor]:
    from xclip_fast.kernels.patch_embed import patch_embed_fwd

    tensors = weight, class_embedding, positions, norm_weight, norm_bias
    return patch_embed_fwd(channels_last(frames), *tensors, eps, affine(mean, std), dtype, save_embedded)


def _kernel_refusal(weight: Tensor, extension: bool) -> str | None:
    return "the extension was asked for" if extension else kernel_refusal(weight)


def _rows_fake(frames: Tensor, patch: int, mean: Sequence[float], std: Sequence[float], dtype: torch.dtype) -> Tensor:
    count, height, width, _ = channels_last(frames).shape
    return frames.new_empty(count * (height // patch) * (width // patch), 3 * patch * patch, dtype=dtype)


@fused_op("patch_rows", launcher=None, fake=_rows_fake)
def patch_rows_op(
    frames: Tensor, patch: int, mean: Sequence[float], std: Sequence[float], dtype: torch.dtype
) -> Tensor:
    """Patches as rows (F N, 3 P P), their pixels normalised: what the gradient of the weights multiplies."""
    if _patch_extension.serves_rows(frames):
        return _patch_extension.patch_rows(frames, patch, affine(mean, std), dtype)
    return _rows_torch(frames, patch, mean, std, dtype).clone()


def _fake(
    frames: Tensor,
    weight: Tensor,
    class_embedding: Tensor,
    positions: Tensor,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    eps: float,
    mean: Sequence[float],
    std: Sequence[float],
    dtype: torch.dtype,
    save_embedded: bool,
    extension: bool,
) -> tuple[Tensor, Tensor]:
    shape = (frames.shape[0], *positions.shape)
    saved = shape if save_embedded else (0,)
    return (
        weight.new_empty(shape, dtype=dtype),
        weight.new_empty(saved, dtype=torch.promote_types(weight.dtype, dtype)),
    )


def _save(ctx: Any, inputs: Any, output: Any) -> None:
    frames, weight, class_embedding, positions, norm_weight, norm_bias, ctx.eps, ctx.mean, ctx.std, dtype, saved, _ = (
        inputs
    )
    ctx.dtypes = class_embedding.dtype, positions.dtype, None if norm_bias is None else norm_bias.dtype
    # to compute again what a call of the registered op did not save
    embedding: Any = (class_embedding, positions) if norm_weight is not None and not saved else (None, None)
    ctx.save_for_backward(frames, weight, norm_weight, output[1] if saved else None, *embedding)
    ctx.dtype = dtype
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(output[1])


def _backward(ctx: Any, grad: Tensor | None, _: None) -> Any:
    frames, weight, norm_weight, embedded, class_embedding, positions = ctx.saved_tensors
    if grad is None:
        return (None,) * 12
    class_dtype, positions_dtype, bias_dtype = ctx.dtypes
    grad_norm_weight: Any = None
    grad_norm_bias: Any = None
    grad = grad.to(torch.promote_types(weight.dtype, ctx.dtype))
    if norm_weight is not None:
        if embedded is None:
            embedded = _embedded_torch(frames, weight, class_embedding, positions, ctx.mean, ctx.std, ctx.dtype)
        exact = exact_dtype(embedded.dtype)
        scale = norm_weight.to(exact)
        normed, _mean, rstd = torch.native_layer_norm(embedded.to(exact), scale.shape, None, None, ctx.eps)
        # of numbers that are centred already PyTorch's formula cancels nothing
        zero, one = torch.zeros_like(rstd), torch.ones_like(rstd)
        grad, grad_norm_weight, grad_norm_bias = torch.ops.aten.native_layer_norm_backward(
            grad.to(exact), normed, scale.shape, zero, one, scale, scale, [True, True, True]
        )
        grad = grad * rstd
        grad_norm_weight, grad_norm_bias = grad_norm_weight.to(norm_weight.dtype), grad_norm_bias.to(bias_dtype)
    wants_frames, wants_weight = ctx.needs_input_grad[:2]
    patch = weight.shape[-1]
    rows = grad[:, 1:].reshape(-1, len(weight)).to(weight.dtype)
    grad_frames = grad_weight = None
    if wants_weight:
        pixels = patch_rows_op(frames, patch, ctx.mean, ctx.std, weight.dtype)
        grad_weight = (rows.T @ pixels).view(weight.shape)
    if wants_frames:
        count, _, height, width = frames.shape
        blocks = (rows @ weight.flatten(1)).view(count, height // patch, width // patch, 3, patch, patch)
        grad_frames = blocks.permute(0, 3, 1, 4, 2, 5).reshape(frames.shape).to(frames.dtype)
    grad_positions = grad.sum(0, dtype=exact_dtype(grad.dtype))
    return (
        grad_frames,
        grad_weight,
        grad_positions[0].to(class_dtype),
        grad_positions.to(positions_dtype),
        grad_norm_weight,
        grad_norm_bias,
        *[None] * 6,
    )


def _flops(
    frames_shape: Any, weight_shape: Any, class_shape: Any, positions_shape: Any, *args: object, **kwargs: object
) -> int:
    """One GEMM; normalising, the sums and the norm are not counted, like PyTorch's own."""
    return 2 * frames_shape[0] * (positions_shape[0] - 1) * torch.Size(weight_shape).numel()


@fused_op(
    "patch_embed",
    launcher=_launch,
    fake=_fake,
    save=_save,
    backward=_backward,
    flops=_flops,
    refusal=_kernel_refusal,
)
def patch_embed_op(
    frames: Tensor,
    weight: Tensor,
    class_embedding: Tensor,
    positions: Tensor,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    eps: float,
    mean: Sequence[float],
    std: Sequence[float],
    dtype: torch.dtype,
    save_embedded: bool,
    extension: bool,
) -> tuple[Tensor, Tensor]:
    """The tokens, and what they were before their norm if that is to be saved."""
    tensors = frames, weight, class_embedding, positions
    norm = norm_weight, norm_bias, eps
    if extension:
        return _patch_extension.patch_embed_fwd(
            _patch_extension.Call(*tensors, *norm, affine(mean, std), dtype, save_embedded)
        )
    embedded = _embedded_torch(*tensors, mean, std, dtype)
    tokens = _normed_torch(embedded, *norm).to(dtype)
    return tokens, embedded if save_embedded else embedded.new_empty(0)


explains(patch_embed, extension=lambda frames, weight: _patch_extension.refusal(frames, weight))
