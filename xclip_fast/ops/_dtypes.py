"""Dtypes: autocast as PyTorch does it for its own functions, and the one to sum in."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def autocast_dtype(device_type: str) -> torch.dtype | None:
    """The dtype autocast would give a GEMM on this kind of device, or None when autocast is off."""
    if device_type == "meta" or not torch.is_autocast_enabled(device_type):
        return None
    return torch.get_autocast_dtype(device_type)


def cast_for_gemm(*tensors: Tensor | None) -> tuple[Any, ...]:
    """Cast the tensors of a GEMM or an attention as autocast would; unchanged when autocast is off."""
    device_type = next(tensor.device.type for tensor in tensors if tensor is not None)
    dtype = autocast_dtype(device_type)
    if dtype is None:
        return tensors
    return tuple(None if tensor is None else tensor.to(dtype) for tensor in tensors)


def cast_for_sum(x: Tensor, other: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """Cast two summands to the wider of their dtypes, as PyTorch adds what autocast left in two; else unchanged."""
    if other is None or x.dtype == other.dtype or autocast_dtype(x.device.type) is None:
        return x, other
    wide = torch.promote_types(x.dtype, other.dtype)
    return x.to(wide), other.to(wide)


def exact_dtype(dtype: torch.dtype) -> torch.dtype:
    """float32, in which half precision is summed up; float64 stays itself, so that gradcheck holds."""
    return torch.promote_types(dtype, torch.float32)
