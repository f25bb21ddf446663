"""Dtypes: autocast as PyTorch does it for its own functions, and the one to sum in."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def autocast_dtype(device_type: str) -> torch.dtype | None:
    """The dtype autocast would give a product on this kind of device, or nothing when autocast is off."""
    if device_type == "meta" or not torch.is_autocast_enabled(device_type):
        return None
    return torch.get_autocast_dtype(device_type)


def cast_for_product(*tensors: Tensor | None) -> tuple[Any, ...]:
    """Cast the tensors of a product or an attention as autocast would; unchanged when autocast is off."""
    device_type = next(tensor.device.type for tensor in tensors if tensor is not None)
    dtype = autocast_dtype(device_type)
    if dtype is None:
        return tensors
    return tuple(None if tensor is None else tensor.to(dtype) for tensor in tensors)


def exact_dtype(dtype: torch.dtype) -> torch.dtype:
    """float32, in which half precision is summed up; float64 stays itself, so that gradcheck holds."""
    return torch.promote_types(dtype, torch.float32)
