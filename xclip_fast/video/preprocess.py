"""From decoded frames to what the model takes: resize, crop, and the mean and deviation to normalise with."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from torch.nn import functional

from xclip_fast.config import CLIP_MEAN, CLIP_STD, IMAGENET_MEAN, IMAGENET_STD
from xclip_fast.errors import InputError


@dataclass(frozen=True)
class Preset:
    """One way to prepare frames.

    ``margin`` is the short side before a single crop, over the size of the crop, in 224ths; three crops need none.
    ``rounds_side`` and ``rounds_crop`` say whether the long side, and the place of the centre crop, are rounded or cut
    to whole numbers, as in the code each preset follows.

    Example:
        >>> from xclip_fast.video import PRESETS
        >>> PRESETS["official"].resized(height=480, width=640, size=224, crops=1)
        (256, 341)
    """

    name: str
    interpolation: str
    antialias: bool
    margin: int
    rounds_side: bool
    rounds_crop: bool
    mean: tuple[float, float, float]
    std: tuple[float, float, float]

    def short_side(self, size: int, crops: int) -> int:
        """The short side after the resize, in pixels, for crops of ``size`` x ``size``."""
        return size if crops == 3 else size * self.margin // 224

    def resized(self, height: int, width: int, size: int, crops: int) -> tuple[int, int]:
        """Height and width after the resize; the aspect ratio is kept."""
        short = self.short_side(size, crops)
        long = max(height, width) * short / min(height, width)
        long = max(int(long + 0.5) if self.rounds_side else int(long), short)
        return (short, long) if height <= width else (long, short)


PRESETS: dict[str, Preset] = {
    preset.name: preset
    for preset in (
        Preset("official", "bilinear", False, 256, True, False, IMAGENET_MEAN, IMAGENET_STD),
        Preset("hf", "bilinear", True, 224, False, False, IMAGENET_MEAN, IMAGENET_STD),
        Preset("clip", "bicubic", True, 224, False, True, CLIP_MEAN, CLIP_STD),
    )
}


def preprocess(frames: Any, preset: str = "official", size: int = 224, crops: int = 1) -> torch.Tensor:
    """Resize frames so that their short side fits, and cut squares out of them.

    Args:
        frames: uint8 (T, H, W, 3) RGB, a numpy array or a tensor on the CPU.
        preset: "official" (short side 256/224 of the crop, bilinear, no antialias), "hf" (short side = crop, bilinear
            with antialias) or "clip" (the same, bicubic).
        size: side of the crops in pixels.
        crops: 1 for the centre; 3 for left, middle and right, or top, middle and bottom of an upright video, after a
            resize of the short side to ``size``.

    Returns:
        uint8 (crops, T, size, size, 3): one view for each crop.

    Raises:
        InputError: no preset has this name.
        ValueError: frames, size or crops are not as described.

    Example:
        >>> import numpy as np
        >>> from xclip_fast.video import preprocess
        >>> preprocess(np.zeros((8, 240, 320, 3), np.uint8), crops=3).shape
        torch.Size([3, 8, 224, 224, 3])
    """
    chosen = get_preset(preset)
    check_crops(size, crops)
    stack = torch.as_tensor(frames)
    if stack.dtype != torch.uint8 or stack.ndim != 4 or stack.shape[-1] != 3 or 0 in stack.shape:
        raise ValueError(f"frames must be uint8 (T, H, W, 3), found {stack.dtype} {tuple(stack.shape)}")
    height, width = chosen.resized(stack.shape[1], stack.shape[2], size, crops)
    resized = resize(stack, height, width, chosen)
    if crops == 3:
        # two whole steps apart, so an odd rest leaves the last pixel out
        top, left = (height - size) // 2, (width - size) // 2
        places = [(step * top, step * left) for step in range(3)]
    elif chosen.rounds_crop:
        places = [(round((height - size) / 2), round((width - size) / 2))]
    else:
        places = [((height - size) // 2, (width - size) // 2)]
    return torch.stack([resized[:, y : y + size, x : x + size] for y, x in places])


def resize(frames: torch.Tensor, height: int, width: int, preset: Preset) -> torch.Tensor:
    if frames.shape[1:3] == (height, width):
        return frames
    # (T, 3, H, W) over the bytes as they are: the channels-last kernels of torch need no copy
    pixels = frames.permute(0, 3, 1, 2)
    resize = partial(functional.interpolate, size=(height, width), mode=preset.interpolation, align_corners=False)
    if preset.antialias:
        resized = resize(pixels, antialias=True)
    else:
        # of bytes it would cut the fraction off, half a grey level darker; one frame at a time as floats are large
        resized = torch.cat([resize(frame.float()).round_().byte() for frame in pixels.split(1)])
    return resized.permute(0, 2, 3, 1)


def normalise(frames: torch.Tensor, preset: str = "official") -> torch.Tensor:
    """Float frames as the model takes them, for those who do not hand it the uint8 ones.

    Args:
        frames: uint8 (..., T, H, W, 3) RGB.
        preset: whose mean and standard deviation to use, for pixels from 0 to 1.

    Returns:
        float32 (..., T, 3, H, W).

    Raises:
        InputError: no preset has this name.
        ValueError: frames are not as described.

    Example:
        >>> import torch
        >>> from xclip_fast.video import normalise
        >>> normalise(torch.zeros(8, 224, 224, 3, dtype=torch.uint8)).shape
        torch.Size([8, 3, 224, 224])
    """
    chosen = get_preset(preset)
    if frames.dtype != torch.uint8 or frames.ndim < 4 or frames.shape[-1] != 3:
        raise ValueError(f"frames must be uint8 (..., T, H, W, 3), found {frames.dtype} {tuple(frames.shape)}")
    mean = torch.tensor(chosen.mean, device=frames.device)
    std = torch.tensor(chosen.std, device=frames.device)
    return ((frames / 255 - mean) / std).movedim(-1, -3).contiguous()


def get_preset(name: str) -> Preset:
    """The preset of this name.

    Raises:
        InputError: there is none.
    """
    if name not in PRESETS:
        raise InputError(f"no preprocessing preset {name!r}; choose {', '.join(PRESETS)}")
    return PRESETS[name]


def check_crops(size: int, crops: int) -> None:
    """Raise ValueError unless ``size`` is a positive integer and ``crops`` is 1 or 3."""
    if not isinstance(size, int | np.integer) or isinstance(size, bool) or size < 1:
        raise ValueError(f"size must be a positive integer, found {size!r}")
    if crops not in (1, 3):
        raise ValueError(f"crops must be 1 or 3, found {crops!r}")
