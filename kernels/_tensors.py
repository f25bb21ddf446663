"""What launchers ask of their tensors: unit stride along the rows, and how exact a dot of them is."""

from __future__ import annotations

import torch
from torch import Tensor


def unit_stride(tensor: Tensor) -> Tensor:
    """The tensor itself where its rows have unit stride, however far apart, else a copy."""
    return tensor if tensor.stride(-1) == 1 else tensor.contiguous()


def dot_precision(x: Tensor) -> str:
    """``input_precision`` of a dot of such numbers: TF32 would halve the digits of float32, and half has no choice."""
    return "ieee" if x.dtype == torch.float32 else "tf32"
