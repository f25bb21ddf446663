"""What patch embedding takes: the checks of its arguments, and views of frames in one layout."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from xclip_fast.config import CLIP_MEAN, CLIP_STD

MAX_ELEMENTS = 2**31 - 1  # of frames and of tokens: the tuned paths count them in 32 bits
DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def channels_last(frames: Tensor) -> Tensor:
    """Frames of either layout viewed as (F, H, W, 3)."""
    if frames.dtype == torch.uint8 and frames.shape[-1] == 3:
        return frames
    return frames.permute(0, 2, 3, 1)


def affine(mean: Sequence[float], std: Sequence[float]) -> list[list[float]]:
    """Factors and summands, one a channel, that normalise bytes; two empty lists for floating point frames."""
    return [[1 / (255 * s) for s in std], [-m / s for m, s in zip(mean, std, strict=True)]]


def vector(numbers: Sequence[float], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Numbers as a tensor that the device fills by itself: no CUDA graph can capture a copy from the host."""
    return torch.stack([torch.full((), number, dtype=dtype, device=device) for number in numbers])


def pixel_statistics(
    frames: Tensor, mean: Sequence[float] | None, std: Sequence[float] | None
) -> tuple[list[float], list[float]]:
    """Mean and deviation as lists, OpenAI CLIP's by default; of floating point frames nothing is needed."""
    if frames.dtype != torch.uint8:
        if mean is not None or std is not None:
            raise ValueError(f"mean and std are for uint8 frames, found {frames.dtype} frames, already normalised")
        return [], []
    found = []
    for name, values, default in (("mean", mean, CLIP_MEAN), ("std", std, CLIP_STD)):
        numbers = [float(value) for value in (default if values is None else values)]
        if len(numbers) != 3 or (name == "std" and min(numbers) <= 0):
            raise ValueError(f"{name} must hold three {'positive ' * (name == 'std')}numbers, found {values!r}")
        found.append(numbers)
    return found[0], found[1]


def check(
    frames: Tensor,
    weight: Tensor,
    class_embedding: Tensor,
    positions: Tensor,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    dtype: torch.dtype,
) -> None:
    """Raise ValueError, naming argument, expected and found, unless everything fits."""
    shape = tuple(frames.shape)
    bytes_last = frames.dtype == torch.uint8 and frames.ndim == 4 and shape[-1] == 3
    if not (
        frames.ndim == 4
        and 0 not in shape[1:]
        and frames.dtype in (torch.uint8, *DTYPES)
        and (bytes_last or shape[1] == 3)
    ):
        raise ValueError(
            "frames must be uint8 (F, H, W, 3) or (F, 3, H, W), or floating point (F, 3, H, W), "
            f"found {frames.dtype} {shape}"
        )
    if weight.ndim != 4 or weight.shape[1] != 3 or weight.shape[2] != weight.shape[3] or 0 in weight.shape:
        raise ValueError(f"weight must have shape (D, 3, P, P), found {tuple(weight.shape)}")
    for name, found in (("weight", weight.dtype), ("dtype", dtype)):
        if found not in DTYPES:
            raise ValueError(f"{name} must be float16, bfloat16, float32 or float64, found {found}")
    patch, width = weight.shape[-1], weight.shape[0]
    height, side = channels_last(frames).shape[1:3]
    if height % patch or side % patch:
        raise ValueError(f"height and width of the frames must be multiples of {patch}, found {height}x{side}")
    count = 1 + (height // patch) * (side // patch)
    if positions.shape != (count, width):
        raise ValueError(
            f"positions must have shape ({count}, {width}) to fit frames and weight, found {tuple(positions.shape)}"
        )
    if (norm_weight is None) != (norm_bias is None):
        raise ValueError("norm_weight and norm_bias go together, found one of them")
    vectors = (("class_embedding", class_embedding), ("norm_weight", norm_weight), ("norm_bias", norm_bias))
    for name, vector in vectors:
        if vector is not None and vector.shape != (width,):
            raise ValueError(f"{name} must have shape ({width},) to fit weight, found {tuple(vector.shape)}")
    for name, tensor in (("weight", weight), ("positions", positions), *vectors):
        if tensor is not None and tensor.device != frames.device:
            raise ValueError(f"{name} must be on {frames.device} like frames, found {tensor.device}")
        if tensor is not None and not tensor.is_floating_point():
            raise ValueError(f"{name} must be floating point, found {tensor.dtype}")
    for name, size in (("frames", frames.numel()), ("the tokens", frames.shape[0] * count * width)):
        if size > MAX_ELEMENTS:
            raise ValueError(f"{name} may have up to {MAX_ELEMENTS} elements, found {size}: give fewer frames at once")
