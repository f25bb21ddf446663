"""Position tables for sizes other than the ones they were trained at."""

from __future__ import annotations

import logging
from functools import cache
from math import isqrt

import torch
from torch import Tensor
from torch.nn.functional import interpolate

_log = logging.getLogger("xclip_fast")


@cache
def _say_once(kind: str, trained: str, wanted: str) -> None:
    _log.warning("%s positions interpolated from %s to %s", kind, trained, wanted)


def spatial_positions(table: Tensor, grid: tuple[int, int]) -> Tensor:
    """The position table for a grid of patches, interpolated (bicubic) where it differs from the trained one.

    Args:
        table: (1 + n * n, D), the class token first.
        grid: rows and columns of patches.

    Returns:
        (1 + rows * columns, D).
    """
    side = isqrt(table.shape[0] - 1)
    if grid == (side, side):
        return table
    _say_once("spatial", f"{side}x{side}", f"{grid[0]}x{grid[1]}")
    patches = table[1:].T.reshape(1, -1, side, side)
    resized = interpolate(patches, size=grid, mode="bicubic", align_corners=False)
    return torch.cat([table[:1], resized.flatten(2)[0].T])


def temporal_positions(table: Tensor, frames: int) -> Tensor:
    """The (1, T, E) table for another number of frames, interpolated linearly in time: (1, frames, E)."""
    # in an exported graph the number may vary; where it is the table's, interpolation changes nothing
    if not torch.compiler.is_exporting():
        if frames == table.shape[1]:
            return table
        _say_once("temporal", f"{table.shape[1]} frames", f"{frames} frames")
    return interpolate(table.transpose(1, 2), size=frames, mode="linear", align_corners=False).transpose(1, 2)
