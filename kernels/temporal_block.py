"""A whole pre-norm block among the frames of a clip, in four launches where the rows are few."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from xclip_fast.kernels._launch import as_rows
from xclip_fast.kernels.message_attention import attend_frames, attend_launches
from xclip_fast.kernels.skinny_linear import Norm, skinny_launches, skinny_linear


def launches(x: Tensor, *arguments: Any) -> int:
    """Kernels that ``temporal_block_fwd`` launches for its arguments, whose data it does not read (meta tensors do).

    Four up to MAX_ROWS rows in clips of up to FUSED_FRAMES frames, and more as in ``message_attention``.
    """
    cu_frames, heads, longest, _ = arguments[-4:]
    rows = x.numel() // x.shape[-1]
    perceptron = skinny_launches(rows, norm=True, quick_gelu=True) + skinny_launches(rows, residual=True)
    return attend_launches(x, cu_frames, heads, longest) + skinny_launches(rows, residual=True) + perceptron


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
    cu_frames: Tensor | None,
    heads: int,
    longest: int,
    eps: float,
) -> Tensor:
    """Launch the forward pass: the block's result in the shape of ``x``."""
    rows = as_rows(x)
    attended = attend_frames(
        rows, Norm(norm1_weight, norm1_bias, eps), in_proj_weight, in_proj_bias, cu_frames, heads, longest
    )
    middle = skinny_linear(attended, out_weight, out_bias, residual=rows)
    hidden = skinny_linear(middle, fc_weight, fc_bias, norm=Norm(norm2_weight, norm2_bias, eps), quick_gelu=True)
    return skinny_linear(hidden, proj_weight, proj_bias, residual=middle).view(x.shape)
