"""A whole pre-norm block among the frames of a clip, and their mean, in four launches where the rows are few."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from xclip_fast.kernels._launch import as_rows
from xclip_fast.kernels.message_attention import attend_frames, attend_launches
from xclip_fast.kernels.skinny_linear import Norm, pools, skinny_launches, skinny_linear, skinny_linear_mean


def launches(x: Tensor, *arguments: Any) -> int:
    """Kernels that ``temporal_block_fwd`` launches for its arguments, whose data it does not read (meta tensors do).

    Four up to MAX_ROWS rows in clips of up to FUSED_FRAMES frames, and more as in ``message_attention``; two more for
    the mean where a block of rows does not hold whole clips.
    """
    proj_weight, _, positions, pooled_with, cu_frames, heads, longest, _ = arguments[-8:]
    rows = x.numel() // x.shape[-1]
    attention = attend_launches(x, cu_frames, heads, longest, positions=positions is not None)
    fc = skinny_launches(rows, norm=True, quick_gelu=True)
    proj = skinny_launches(rows, residual=True)
    if pooled_with is not None and rows:
        proj += 0 if pools(rows, proj_weight.shape[1], proj_weight.shape[0], x.element_size(), longest) else 2
    return attention + skinny_launches(rows, residual=True) + fc + proj


def temporal_block_fwd(
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
    """Launch the forward pass: the block's result in the shape of ``x``, or its mean with ``pooled_with`` (B, E)."""
    attended, rows = attend_frames(
        as_rows(x),
        Norm(norm1_weight, norm1_bias, eps),
        in_proj_weight,
        in_proj_bias,
        cu_frames,
        heads,
        longest,
        positions,
    )
    middle = skinny_linear(attended, out_weight, out_bias, residual=rows)
    hidden = skinny_linear(middle, fc_weight, fc_bias, norm=Norm(norm2_weight, norm2_bias, eps), quick_gelu=True)
    if pooled_with is None:
        return skinny_linear(hidden, proj_weight, proj_bias, residual=middle).view(x.shape)
    return skinny_linear_mean(
        hidden, proj_weight, proj_bias, residual=middle, pooled_with=as_rows(pooled_with), frames=longest
    )
