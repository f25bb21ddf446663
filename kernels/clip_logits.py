"""Logits of videos against adapted class texts: prompts added, normalised, scaled and dotted in one pass."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from xclip_fast.kernels._launch import cdiv, contiguous_like, kernel, next_power_of_2, on_device_of
from xclip_fast.kernels._tensors import unit_stride
from xclip_fast.tuning import Tile, every, tunable

# below this length a vector is divided by it instead, as torch.nn.functional.normalize does
TINY = tl.constexpr(1e-12)


@tunable("clip_logits", fixed=("columns",), candidates=every(num_warps=(4, 8), rows=(4, 1, 2, 8, 16)))
def forward_tile(width: int) -> Tile:
    """Whole texts: four classes a program, one where they are wide."""
    columns = next_power_of_2(width)
    return Tile(rows=4 if columns <= 1024 else 1, columns=columns)


@tunable(
    "clip_logits_bwd",
    op="clip_logits",
    backward=True,
    fixed=("columns",),
    candidates=every(num_warps=(4, 8), rows=(4, 1, 2, 8)),
)
def backward_tile(width: int) -> Tile:
    """Half the classes: their gradients are held in registers beside them."""
    tile = forward_tile.default(width)
    return tile._replace(rows=max(1, tile.rows // 2))


@triton.jit
def _adapted_texts(
    text_ptr,
    prompts_ptr,
    residual_ptr,
    alpha,
    row,
    column,
    inside,
    text_stride,
    prompt_stride,
    residual_stride,
    HAS_RESIDUAL: tl.constexpr,
):
    """``text + alpha * prompts`` and the prompts with their residual, both [BLOCK_CLASSES, BLOCK_WIDTH] in float32."""
    text = tl.load(text_ptr + row[:, None] * text_stride + column[None, :], mask=inside, other=0.0).to(tl.float32)
    prompts = tl.load(prompts_ptr + row[:, None] * prompt_stride + column[None, :], mask=inside, other=0.0)
    prompts = prompts.to(tl.float32)
    if HAS_RESIDUAL:
        residual = residual_ptr + row[:, None] * residual_stride + column[None, :]
        prompts += tl.load(residual, mask=inside, other=0.0).to(tl.float32)
    return text + alpha[None, :] * prompts, prompts


@triton.jit
def _length(square_sum):
    """A vector's length, or the smallest one it may be divided by; not a number stays one."""
    length = tl.sqrt(square_sum)
    return tl.where(length < TINY, TINY, length)


@kernel
def _clip_logits_fwd_kernel(
    video_ptr,
    text_ptr,
    prompts_ptr,
    alpha_ptr,
    logit_scale_ptr,
    residual_ptr,
    logits_ptr,
    classes,
    class_blocks,
    video_stride,
    text_stride,
    prompt_batch_stride,
    prompt_stride,
    residual_batch_stride,
    residual_stride,
    WIDTH: tl.constexpr,
    BLOCK_CLASSES: tl.constexpr,
    BLOCK_WIDTH: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
):
    program = tl.program_id(0).to(tl.int64)
    batch = program // class_blocks
    row = program % class_blocks * BLOCK_CLASSES + tl.arange(0, BLOCK_CLASSES)
    column = tl.arange(0, BLOCK_WIDTH)
    in_width = column < WIDTH
    inside = (row < classes)[:, None] & in_width[None, :]
    alpha = tl.load(alpha_ptr + column, mask=in_width, other=0.0).to(tl.float32)
    video = tl.load(video_ptr + batch * video_stride + column, mask=in_width, other=0.0).to(tl.float32)
    video = video / _length(tl.sum(video * video, axis=0))
    # [BLOCK_CLASSES, BLOCK_WIDTH]
    texts, _ = _adapted_texts(
        text_ptr,
        prompts_ptr + batch * prompt_batch_stride,
        residual_ptr + batch * residual_batch_stride,
        alpha,
        row,
        column,
        inside,
        text_stride,
        prompt_stride,
        residual_stride,
        HAS_RESIDUAL,
    )
    cosine = tl.sum(texts * video[None, :], axis=1) / _length(tl.sum(texts * texts, axis=1))
    scale = tl.exp(tl.load(logit_scale_ptr).to(tl.float32))
    logits = (scale * cosine).to(logits_ptr.dtype.element_ty)
    tl.store(logits_ptr + batch * classes + row, logits, mask=row < classes)


@kernel
def _clip_logits_bwd_kernel(
    grad_ptr,
    video_ptr,
    text_ptr,
    prompts_ptr,
    alpha_ptr,
    logit_scale_ptr,
    residual_ptr,
    grad_text_ptr,
    grad_prompts_ptr,
    partial_video_ptr,
    partial_alpha_ptr,
    partial_scale_ptr,
    batch,
    classes,
    video_stride,
    text_stride,
    prompt_batch_stride,
    prompt_stride,
    residual_batch_stride,
    residual_stride,
    WIDTH: tl.constexpr,
    BLOCK_CLASSES: tl.constexpr,
    BLOCK_WIDTH: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
):
    # a program keeps a block of classes and walks over the videos, so that sums over videos need no atomics
    program = tl.program_id(0).to(tl.int64)
    row = program * BLOCK_CLASSES + tl.arange(0, BLOCK_CLASSES)
    column = tl.arange(0, BLOCK_WIDTH)
    in_row = row < classes
    in_width = column < WIDTH
    inside = in_row[:, None] & in_width[None, :]
    alpha = tl.load(alpha_ptr + column, mask=in_width, other=0.0).to(tl.float32)
    scale = tl.exp(tl.load(logit_scale_ptr).to(tl.float32))
    grad_text = tl.zeros((BLOCK_CLASSES, BLOCK_WIDTH), tl.float32)
    grad_alpha = tl.zeros((BLOCK_WIDTH,), tl.float32)
    grad_scale = tl.zeros((BLOCK_CLASSES,), tl.float32)
    for index in range(batch):
        video_index = tl.cast(index, tl.int64)
        video = tl.load(video_ptr + video_index * video_stride + column, mask=in_width, other=0.0).to(tl.float32)
        video = video / _length(tl.sum(video * video, axis=0))
        # [BLOCK_CLASSES, BLOCK_WIDTH]
        texts, prompts = _adapted_texts(
            text_ptr,
            prompts_ptr + video_index * prompt_batch_stride,
            residual_ptr + video_index * residual_batch_stride,
            alpha,
            row,
            column,
            inside,
            text_stride,
            prompt_stride,
            residual_stride,
            HAS_RESIDUAL,
        )
        length = _length(tl.sum(texts * texts, axis=1))
        direction = texts / length[:, None]
        cosine = tl.sum(direction * video[None, :], axis=1)
        grad = tl.load(grad_ptr + video_index * classes + row, mask=in_row, other=0.0).to(tl.float32) * scale
        grad_scale += grad * cosine
        grad_texts = (grad / length)[:, None] * (video[None, :] - cosine[:, None] * direction)
        grad_texts = tl.where(inside, grad_texts, 0.0)
        grad_text += grad_texts
        grad_alpha += tl.sum(grad_texts * prompts, axis=0)
        out = (video_index * classes + row)[:, None] * WIDTH + column[None, :]
        grad_prompts = (grad_texts * alpha[None, :]).to(grad_prompts_ptr.dtype.element_ty)
        tl.store(grad_prompts_ptr + out, grad_prompts, mask=inside)
        partial = partial_video_ptr + (program * batch + video_index) * WIDTH + column
        tl.store(partial, tl.sum(tl.where(inside, grad[:, None] * direction, 0.0), axis=0), mask=in_width)
    out = row[:, None] * WIDTH + column[None, :]
    tl.store(grad_text_ptr + out, grad_text.to(grad_text_ptr.dtype.element_ty), mask=inside)
    tl.store(partial_alpha_ptr + program * WIDTH + column, grad_alpha, mask=in_width)
    tl.store(partial_scale_ptr + program, tl.sum(grad_scale, axis=0))


def clip_logits_fwd(
    video: Tensor, text: Tensor, prompts: Tensor, alpha: Tensor, logit_scale: Tensor, residual: Tensor | None
) -> Tensor:
    """Launch the forward pass: (B, K)."""
    # without a residual the prompts stand in for it, unread
    parts = (video, text, prompts, prompts if residual is None else residual)
    video, text, prompts, added = map(unit_stride, parts)
    batch, classes, width = prompts.shape
    logits = video.new_empty(batch, classes, dtype=text.dtype)
    tile = forward_tile(width)
    class_blocks = cdiv(classes, tile.rows)
    if logits.numel():
        with on_device_of(video):
            _clip_logits_fwd_kernel[(batch * class_blocks,)](
                video_ptr=video,
                text_ptr=text,
                prompts_ptr=prompts,
                alpha_ptr=alpha.contiguous(),
                logit_scale_ptr=logit_scale,
                residual_ptr=added,
                logits_ptr=logits,
                classes=classes,
                class_blocks=class_blocks,
                video_stride=video.stride(0),
                text_stride=text.stride(0),
                prompt_batch_stride=prompts.stride(0),
                prompt_stride=prompts.stride(1),
                residual_batch_stride=added.stride(0),
                residual_stride=added.stride(1),
                WIDTH=width,
                BLOCK_CLASSES=tile.rows,
                BLOCK_WIDTH=tile.columns,
                HAS_RESIDUAL=residual is not None,
                num_warps=tile.num_warps,
                num_stages=tile.num_stages,
            )
    return logits


def clip_logits_bwd(
    grad: Tensor,
    video: Tensor,
    text: Tensor,
    prompts: Tensor,
    alpha: Tensor,
    logit_scale: Tensor,
    residual: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Launch the backward pass.

    Returns:
        The gradients of the normalised videos (B, E) in float32, text, prompts (the residual's is the same), alpha and
        logit_scale, the last two in float32.
    """
    parts = (video, text, prompts, prompts if residual is None else residual)
    video, text, prompts, added = map(unit_stride, parts)
    batch, classes, width = prompts.shape
    tile = backward_tile(width)
    programs = cdiv(classes, tile.rows)
    grad_text = contiguous_like(text)
    grad_prompts = contiguous_like(prompts)
    partial_video = video.new_empty(programs, batch, width, dtype=torch.float32)
    partial_alpha = video.new_empty(programs, width, dtype=torch.float32)
    partial_scale = video.new_empty(programs, dtype=torch.float32)
    if programs:
        with on_device_of(video):
            _clip_logits_bwd_kernel[(programs,)](
                grad_ptr=grad.contiguous(),
                video_ptr=video,
                text_ptr=text,
                prompts_ptr=prompts,
                alpha_ptr=alpha.contiguous(),
                logit_scale_ptr=logit_scale,
                residual_ptr=added,
                grad_text_ptr=grad_text,
                grad_prompts_ptr=grad_prompts,
                partial_video_ptr=partial_video,
                partial_alpha_ptr=partial_alpha,
                partial_scale_ptr=partial_scale,
                batch=batch,
                classes=classes,
                video_stride=video.stride(0),
                text_stride=text.stride(0),
                prompt_batch_stride=prompts.stride(0),
                prompt_stride=prompts.stride(1),
                residual_batch_stride=added.stride(0),
                residual_stride=added.stride(1),
                WIDTH=width,
                BLOCK_CLASSES=tile.rows,
                BLOCK_WIDTH=tile.columns,
                HAS_RESIDUAL=residual is not None,
                num_warps=tile.num_warps,
                num_stages=tile.num_stages,
            )
    return partial_video.sum(0), grad_text, grad_prompts, partial_alpha.sum(0), partial_scale.sum(0)
