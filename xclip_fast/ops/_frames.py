"""Attention among the frames of a clip, the sublayer that CFA and the temporal blocks share: x + out(MHA(LN(x)))."""

from __future__ import annotations

import reprlib
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from xclip_fast.ops._dtypes import exact_dtype
from xclip_fast.ops.layer_norm import MAX_WIDTH, layer_norm_backward_op, layer_norm_op, layer_norm_ref

HEAD_DIMS = (32, 64, 128)  # tiles of the kernels


def frames_attention_ref(
    x: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    in_proj_weight: Tensor,
    in_proj_bias: Tensor,
    out_weight: Tensor,
    out_bias: Tensor,
    cu_frames: Tensor | None,
    heads: int,
    eps: float,
) -> Tensor:
    """The definition, clip by clip."""
    normed, _ = layer_norm_ref(x, norm_weight, norm_bias, None, None, eps)
    packed = functional.linear(normed, in_proj_weight, in_proj_bias)
    if cu_frames is None:
        attended = _attend_ref(packed, heads)
    else:
        bounds = cu_frames.tolist()
        clips = [_attend_ref(packed[first:last], heads) for first, last in pairwise(bounds)]
        attended = torch.cat([*clips, torch.zeros_like(x[bounds[-1] :])])
    return x + functional.linear(attended, out_weight, out_bias)


def _attend_ref(packed: Tensor, heads: int) -> Tensor:
    query, key, value = packed.unflatten(-1, (3, heads, -1)).transpose(-4, -2).unbind(-3)
    scores = query @ key.transpose(-2, -1) * query.shape[-1] ** -0.5
    return (scores.softmax(-1) @ value).transpose(-3, -2).flatten(-2)


def frames_attention_torch(
    rows: Tensor,
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
    """The fused formulation on rows (F, D)."""
    normed = functional.layer_norm(rows, rows.shape[-1:], norm_weight.to(rows.dtype), norm_bias.to(rows.dtype), eps)
    packed = functional.linear(normed, in_proj_weight, in_proj_bias)
    clips = Clips.of(rows, cu_frames, longest)
    query, key, value = clips.split(packed, heads, 3)
    attended = functional.scaled_dot_product_attention(query, key, value, attn_mask=clips.mask)
    return rows + functional.linear(clips.merge(attended), out_weight, out_bias)


def frames_attention_backward(
    grad: Tensor,
    rows: Tensor,
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
    """Gradients of the rows and of the parameters, the two of the norm in one tensor (3, D); all recomputed from rows.

    The GEMMs run in the dtype of the rows, everything among the frames of a clip in float32: its share is tiny.
    """
    normed, _, mean, rstd = layer_norm_op(rows, norm_weight, norm_bias, None, None, eps)
    packed = torch.addmm(in_proj_bias, normed, in_proj_weight.t())
    clips = Clips.of(rows, cu_frames, longest)
    query, key, value = clips.split(packed, heads, 3, mean.dtype)
    scale = query.shape[-1] ** -0.5
    scores = query @ key.transpose(-2, -1) * scale
    weights = (scores if clips.mask is None else scores.masked_fill(~clips.mask, float("-inf"))).softmax(-1)
    attended = clips.merge(weights @ value).to(rows.dtype)
    (grad_attended,) = clips.split(grad @ out_weight, heads, 1, mean.dtype)
    if clips.inside is not None:
        grad_attended = grad_attended.masked_fill(~clips.inside, 0.0)
    grad_weights = grad_attended @ value.transpose(-2, -1)
    grad_scores = torch.ops.aten._softmax_backward_data(grad_weights, weights, -1, weights.dtype) * scale
    grads = (grad_scores @ key, grad_scores.transpose(-2, -1) @ query, weights.transpose(-2, -1) @ grad_attended)
    grad_packed = clips.merge(torch.cat(grads, 1)).to(rows.dtype)
    grad_rows, vectors = layer_norm_backward_op(grad_packed @ in_proj_weight, grad, rows, norm_weight, None, mean, rstd)
    return [
        grad_rows,
        vectors,
        grad_packed.t() @ normed,
        grad_packed.sum(0),
        grad.t() @ attended,
        grad.sum(0),
    ]


def empty_norm_grads(x: Tensor) -> Tensor:
    """The shape and dtype of what ``layer_norm_backward`` gives for the parameters of a norm of ``x``."""
    return x.new_empty(3, x.shape[-1], dtype=exact_dtype(x.dtype))


def split_norm_grads(vectors: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    """The gradients of a norm's weight and bias from the rows ``layer_norm_backward`` gave, rounded to their dtypes."""
    if weight.dtype != bias.dtype:
        return vectors[0].to(weight.dtype), vectors[1].to(bias.dtype)
    grad_weight, grad_bias, _ = vectors.to(weight.dtype).unbind(0)
    return grad_weight, grad_bias


class Clips(NamedTuple):
    """Rows (F, C) of frames as a batch (clips, longest, C) and back.

    Attributes:
        longest: frames of a clip in the batch.
        row: (clips, longest) the row of each place, or None where all clips have ``longest`` frames. A place beyond its
            clip shows the clip's own last frame: nothing of another clip, not even a NaN, comes near.
        inside: (clips, 1, longest, 1) the places within their clip.
        place: (F,) the place of each row.
        outside: (F, 1) the rows that belong to no clip.
    """

    longest: int
    row: Tensor | None = None
    inside: Tensor | None = None
    place: Tensor | None = None
    outside: Tensor | None = None

    @classmethod
    def of(cls, rows: Tensor, cu_frames: Tensor | None, longest: int) -> Clips:
        """The clips of rows (F, C)."""
        if cu_frames is None:
            return cls(longest)
        if cu_frames.shape[0] == 1:
            cu_frames = functional.pad(cu_frames, (0, 1))
        frames, clips = rows.shape[0], cu_frames.shape[0] - 1
        first = cu_frames[:-1].long()
        length = cu_frames.diff().clamp(0, longest)
        step = torch.arange(longest, device=rows.device)
        row = first[:, None] + torch.minimum(step, (length - 1).clamp(min=0)[:, None])
        frame = torch.arange(frames, device=rows.device)
        clip = (torch.searchsorted(cu_frames, frame, right=True) - 1).clamp(0, clips - 1)
        offset = frame - first[clip]
        return cls(
            longest=longest,
            row=row.clamp(0, frames - 1),
            inside=(step < length[:, None])[:, None, :, None],
            place=clip * longest + offset.clamp(0, longest - 1),
            outside=(offset >= length[clip])[:, None],
        )

    @property
    def mask(self) -> Tensor | None:
        """(clips, 1, 1, longest) the keys to attend to; the first place of an empty clip too, lest it give NaN."""
        if self.inside is None:
            return None
        inside = self.inside.transpose(-2, -1)
        return inside | (torch.arange(self.longest, device=inside.device) == 0)

    def split(self, rows: Tensor, heads: int, parts: int, dtype: torch.dtype | None = None) -> tuple[Tensor, ...]:
        """Rows (F, parts * D) to parts of (clips, heads, longest, head_dim); with a dtype contiguous copies in that."""
        if self.row is None:
            batch = rows.reshape(rows.shape[0] // max(self.longest, 1), self.longest, rows.shape[1])
        else:
            batch = rows[self.row]
        batch = batch.unflatten(-1, (parts, heads, rows.shape[1] // (parts * heads))).permute(2, 0, 3, 1, 4)
        # what several GEMMs read is lined up and cast once, in one pass
        return (batch if dtype is None else batch.new_empty(batch.shape, dtype=dtype).copy_(batch)).unbind(0)

    def merge(self, batch: Tensor) -> Tensor:
        """(clips, heads, longest, head_dim), heads of several parts too, to rows; zero where a frame is of no clip."""
        rows = batch.transpose(1, 2).flatten(2).flatten(0, 1)
        return rows if self.place is None else rows[self.place].masked_fill(self.outside, 0.0)  # type: ignore[arg-type]


def longest_clip(name: str, x: Tensor, cu_frames: Tensor | None, max_frames: int | None) -> int:
    """Check the clips of frames ``x`` and bound their length: (B, T, D) whole, (F, D) with ``cu_frames`` ragged.

    The boundaries are data of the device: they are read, and the bound is exact, on the CPU alone and outside of a
    compiled graph. Elsewhere the bound is ``max_frames``, or else all F frames.

    Raises:
        ValueError: the frames do not have this shape, or the boundaries do not fit them.
    """
    if cu_frames is None:
        if max_frames is not None:
            raise ValueError(f"max_frames ({max_frames}) bounds ragged clips: give cu_frames too")
        if x.ndim != 3:
            raise ValueError(f"{name} must be (B, T, D), or (F, D) with cu_frames, found {tuple(x.shape)}")
        return x.shape[1]
    if x.ndim != 2:
        raise ValueError(f"{name} must be (F, D) with cu_frames, found {tuple(x.shape)}")
    if cu_frames.ndim != 1 or not cu_frames.shape[0] or cu_frames.dtype != torch.int32 or cu_frames.device != x.device:
        found = f"{cu_frames.dtype} {tuple(cu_frames.shape)} on {cu_frames.device}"
        raise ValueError(f"cu_frames must be torch.int32 (clips + 1,) on {x.device}, found {found}")
    if max_frames is not None and max_frames < 1:
        raise ValueError(f"max_frames must be at least 1, found {max_frames}")
    frames = x.shape[0]
    bound = frames if max_frames is None else min(frames, max_frames)
    if cu_frames.device.type != "cpu" or torch.compiler.is_compiling():
        return bound
    bounds = cu_frames.tolist()
    lengths = [last - first for first, last in pairwise(bounds)]
    if bounds[0] != 0 or min(lengths, default=0) < 0 or bounds[-1] > frames:
        raise ValueError(f"cu_frames must rise from 0 to at most {frames} frames, found {reprlib.repr(bounds)}")
    longest = max(lengths, default=0)
    if max_frames is not None and longest > max_frames:
        raise ValueError(f"max_frames is {max_frames}, but a clip has {longest} frames")
    return min(max(longest, 1), bound)


def check_parameters(x: Tensor, name: str, parameters: dict[str, tuple[Tensor, tuple[int, ...]]]) -> None:
    """Each parameter has its shape and the dtype of ``x``; those of a norm may be in float32.

    Raises:
        ValueError: one does not.
    """
    for parameter, (tensor, shape) in parameters.items():
        if tensor.shape != shape:
            raise ValueError(f"{parameter} must have shape {shape} to fit {name}, found {tuple(tensor.shape)}")
        wide = parameter.startswith("norm") and tensor.dtype == torch.float32
        if tensor.dtype != x.dtype and not wide:
            raise ValueError(f"{parameter} must be {x.dtype} like {name}, found {tensor.dtype}")


def check_heads(width: int, heads: int) -> None:
    """The heads divide the width.

    Raises:
        ValueError: they do not.
    """
    if heads < 1 or width < heads or width % heads:
        raise ValueError(f"heads must divide the width {width}, found {heads}")


def attention_refusal(width: int, heads: int) -> str | None:
    """The reason why the kernels cannot attend with heads of this size, or None."""
    if width // heads not in HEAD_DIMS:
        return f"its heads hold {', '.join(map(str, HEAD_DIMS))} numbers, found {width // heads}"
    return width_refusal(width)


def width_refusal(width: int) -> str | None:
    """The reason why the kernels cannot normalise rows of this size, or None."""
    return f"its rows hold up to {MAX_WIDTH} numbers, found {width}" if width > MAX_WIDTH else None
