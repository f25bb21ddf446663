"""Mean over the frames of the layer norm of the patches: T rows in, one row out."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from xclip_fast.kernels._launch import cdiv, contiguous_like, kernel, next_power_of_2, on_device_of
from xclip_fast.kernels._tensors import unit_stride
from xclip_fast.kernels.layer_norm import BACKWARD_PROGRAMS
from xclip_fast.kernels.layer_norm import backward_tile as layer_norm_tile
from xclip_fast.tuning import Tile, every, tunable

# patches of which each program holds more frames: they leave multiprocessors idle anyway
FEW_PATCHES = 256


@tunable("mean_norm_over_frames", fixed=("columns",), candidates=every(num_warps=(8, 4), rows=(8, 4, 2, 1)))
def forward_tile(patches: int, frames: int, width: int) -> Tile:
    """32 numbers a thread. Of few patches all frames are on their way at once; many gain by more programs at a time."""
    columns = next_power_of_2(width)
    rows = max(1, (8192 if patches <= FEW_PATCHES else 4096) // columns)
    rows = min(rows, next_power_of_2(frames))
    return Tile(rows, columns, num_warps=min(8, max(1, rows * columns // 1024)))


@tunable(
    "mean_norm_over_frames_bwd",
    op="mean_norm_over_frames",
    backward=True,
    fixed=("columns",),
    candidates=every(num_warps=(4, 8), rows=(2, 1, 4)),
)
def backward_tile(width: int) -> Tile:
    """As of a layer norm's backward pass, whose sums it holds too."""
    return layer_norm_tile.default(width)


@triton.jit
def _patch_rows(tokens_ptr, patch, patches, batch_stride, patch_stride):
    """Pointers to frame 0 of one flat patch (b, n) or several."""
    return tokens_ptr + patch // patches * batch_stride + patch % patches * patch_stride


@triton.jit
def _rows(
    token_row,
    residual_row,
    constant,
    frame,
    token_stride,
    residual_stride,
    column,
    inside,
    HAS_RESIDUAL: tl.constexpr,
    HAS_CONSTANT: tl.constexpr,
):
    """Several patches of a frame, or frames of a patch, with what is added to them: float32, as ``inside``."""
    x = tl.load((token_row + frame * token_stride)[:, None] + column[None, :], mask=inside, other=0.0).to(tl.float32)
    if HAS_RESIDUAL:
        residual = (residual_row + frame * residual_stride)[:, None] + column[None, :]
        x += tl.load(residual, mask=inside, other=0.0).to(tl.float32)
    if HAS_CONSTANT:
        x += constant[None, :]
    return x


@triton.jit
def _normalise(x, in_width, eps, WIDTH: tl.constexpr):
    """Rows [BLOCK_ROWS, BLOCK_WIDTH] without mean, at unit variance, and their 1 / deviation; padding stays zero."""
    centred = tl.where(in_width[None, :], x - (tl.sum(x, axis=1) / WIDTH)[:, None], 0.0)
    rstd = 1.0 / tl.sqrt(tl.sum(centred * centred, axis=1) / WIDTH + eps)
    return centred * rstd[:, None], rstd


@kernel
def _mean_norm_over_frames_fwd_kernel(
    tokens_ptr,
    weight_ptr,
    bias_ptr,
    residual_ptr,
    constant_ptr,
    out_ptr,
    frames,
    patches,
    batch_stride,
    frame_stride,
    patch_stride,
    residual_batch_stride,
    residual_frame_stride,
    residual_patch_stride,
    eps,
    WIDTH: tl.constexpr,
    BLOCK_FRAMES: tl.constexpr,
    BLOCK_WIDTH: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
    HAS_CONSTANT: tl.constexpr,
):
    patch = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK_WIDTH)
    in_width = column < WIDTH
    weight = tl.load(weight_ptr + column, mask=in_width, other=0.0).to(tl.float32)
    bias = tl.load(bias_ptr + column, mask=in_width, other=0.0).to(tl.float32)
    constant = tl.zeros((BLOCK_WIDTH,), tl.float32)
    if HAS_CONSTANT:
        constant = tl.load(constant_ptr + column, mask=in_width, other=0.0).to(tl.float32)
    row = _patch_rows(tokens_ptr, patch, patches, batch_stride, patch_stride)
    added = _patch_rows(residual_ptr, patch, patches, residual_batch_stride, residual_patch_stride)
    total = tl.zeros((BLOCK_WIDTH,), tl.float32)
    for start in range(0, frames, BLOCK_FRAMES):
        frame = start + tl.arange(0, BLOCK_FRAMES).to(tl.int64)
        # [BLOCK_FRAMES, BLOCK_WIDTH]
        inside = (frame < frames)[:, None] & in_width[None, :]
        x = _rows(
            row,
            added,
            constant,
            frame,
            frame_stride,
            residual_frame_stride,
            column,
            inside,
            HAS_RESIDUAL,
            HAS_CONSTANT,
        )
        normalised, _ = _normalise(x, in_width, eps, WIDTH)
        # a frame beyond the last one is zero times what may be infinite
        total += tl.sum(tl.where(inside, normalised, 0.0), axis=0)
    # the affine part commutes with the mean
    out = total / frames * weight + bias
    tl.store(out_ptr + patch * WIDTH + column, out.to(out_ptr.dtype.element_ty), mask=in_width)


@kernel
def _mean_norm_over_frames_bwd_kernel(
    grad_ptr,
    tokens_ptr,
    weight_ptr,
    residual_ptr,
    constant_ptr,
    grad_tokens_ptr,
    partial_ptr,
    rows,
    frames,
    patches,
    batch_stride,
    frame_stride,
    patch_stride,
    residual_batch_stride,
    residual_frame_stride,
    residual_patch_stride,
    eps,
    programs,
    WIDTH: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_WIDTH: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
    HAS_CONSTANT: tl.constexpr,
):
    program = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK_WIDTH)
    in_width = column < WIDTH
    weight = tl.load(weight_ptr + column, mask=in_width, other=0.0).to(tl.float32)
    constant = tl.zeros((BLOCK_WIDTH,), tl.float32)
    if HAS_CONSTANT:
        constant = tl.load(constant_ptr + column, mask=in_width, other=0.0).to(tl.float32)
    grad_weight = tl.zeros((BLOCK_WIDTH,), tl.float32)
    grad_bias = tl.zeros((BLOCK_WIDTH,), tl.float32)
    for block in range(program, tl.cdiv(rows, BLOCK_ROWS), programs):
        patch = tl.cast(block, tl.int64) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
        inside = (patch < rows)[:, None] & in_width[None, :]
        row = _patch_rows(tokens_ptr, patch, patches, batch_stride, patch_stride)
        added = _patch_rows(residual_ptr, patch, patches, residual_batch_stride, residual_patch_stride)
        # [BLOCK_ROWS, BLOCK_WIDTH]
        grad = tl.load(grad_ptr + patch[:, None] * WIDTH + column[None, :], mask=inside, other=0.0).to(tl.float32)
        weighted = grad * weight[None, :] / frames
        along_mean = tl.sum(weighted, axis=1) / WIDTH
        total = tl.zeros((BLOCK_ROWS, BLOCK_WIDTH), tl.float32)
        for index in range(frames):
            frame = tl.cast(index, tl.int64)
            x = _rows(
                row,
                added,
                constant,
                frame,
                frame_stride,
                residual_frame_stride,
                column,
                inside,
                HAS_RESIDUAL,
                HAS_CONSTANT,
            )
            normalised, rstd = _normalise(x, in_width, eps, WIDTH)
            total += normalised
            along_x = tl.sum(weighted * normalised, axis=1) / WIDTH
            grad_x = (weighted - along_mean[:, None] - normalised * along_x[:, None]) * rstd[:, None]
            out = ((patch // patches * frames + frame) * patches + patch % patches)[:, None] * WIDTH + column[None, :]
            tl.store(grad_tokens_ptr + out, grad_x.to(grad_tokens_ptr.dtype.element_ty), mask=inside)
        grad_weight += tl.sum(tl.where(inside, grad * total, 0.0), axis=0) / frames
        grad_bias += tl.sum(grad, axis=0)
    partial = partial_ptr + program * 2 * WIDTH + column
    tl.store(partial, grad_weight, mask=in_width)
    tl.store(partial + WIDTH, grad_bias, mask=in_width)


def mean_norm_over_frames_fwd(
    tokens: Tensor, weight: Tensor, bias: Tensor, residual: Tensor | None, constant: Tensor | None, eps: float
) -> Tensor:
    """Launch the forward pass: (B, T, N, D) to (B, N, D)."""
    tokens, added = _addressable(tokens, residual)
    batch, frames, patches, width = tokens.shape
    out = tokens.new_empty(batch, patches, width)
    tile = forward_tile(batch * patches, frames, width)
    if out.numel():
        with on_device_of(tokens):
            _mean_norm_over_frames_fwd_kernel[(batch * patches,)](
                tokens_ptr=tokens,
                weight_ptr=weight.contiguous(),
                bias_ptr=bias.contiguous(),
                residual_ptr=added,
                constant_ptr=None if constant is None else constant.contiguous(),
                out_ptr=out,
                frames=frames,
                patches=patches,
                batch_stride=tokens.stride(0),
                frame_stride=tokens.stride(1),
                patch_stride=tokens.stride(2),
                residual_batch_stride=added.stride(0),
                residual_frame_stride=added.stride(1),
                residual_patch_stride=added.stride(2),
                eps=eps,
                WIDTH=width,
                BLOCK_FRAMES=tile.rows,
                BLOCK_WIDTH=tile.columns,
                HAS_RESIDUAL=residual is not None,
                HAS_CONSTANT=constant is not None,
                num_warps=tile.num_warps,
                num_stages=tile.num_stages,
            )
    return out


def mean_norm_over_frames_bwd(
    grad: Tensor, tokens: Tensor, weight: Tensor, residual: Tensor | None, constant: Tensor | None, eps: float
) -> tuple[Tensor, Tensor]:
    """Launch the backward pass: gradient of tokens and residual, and of weight and bias as float32 (2, D)."""
    tokens, added = _addressable(tokens, residual)
    batch, frames, patches, width = tokens.shape
    tile = backward_tile(width)
    programs = min(cdiv(batch * patches, tile.rows), BACKWARD_PROGRAMS)
    grad_tokens = contiguous_like(tokens)
    partial = tokens.new_empty(programs, 2, width, dtype=torch.float32)
    if grad_tokens.numel():
        with on_device_of(tokens):
            _mean_norm_over_frames_bwd_kernel[(programs,)](
                grad_ptr=grad.contiguous(),
                tokens_ptr=tokens,
                weight_ptr=weight.contiguous(),
                residual_ptr=added,
                constant_ptr=None if constant is None else constant.contiguous(),
                grad_tokens_ptr=grad_tokens,
                partial_ptr=partial,
                rows=batch * patches,
                frames=frames,
                patches=patches,
                batch_stride=tokens.stride(0),
                frame_stride=tokens.stride(1),
                patch_stride=tokens.stride(2),
                residual_batch_stride=added.stride(0),
                residual_frame_stride=added.stride(1),
                residual_patch_stride=added.stride(2),
                eps=eps,
                programs=programs,
                WIDTH=width,
                BLOCK_ROWS=tile.rows,
                BLOCK_WIDTH=tile.columns,
                HAS_RESIDUAL=residual is not None,
                HAS_CONSTANT=constant is not None,
                num_warps=tile.num_warps,
                num_stages=tile.num_stages,
            )
    return grad_tokens, partial.sum(0)


def _addressable(tokens: Tensor, residual: Tensor | None) -> tuple[Tensor, Tensor]:
    """Tokens and residual with unit stride along D; without a residual the tokens stand in for it, unread."""
    tokens = unit_stride(tokens)
    return tokens, tokens if residual is None else unit_stride(residual)
