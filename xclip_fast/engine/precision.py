"""Which precisions an engine of a dtype on a device computes in, and which it refuses."""

from __future__ import annotations

import logging
from functools import cache

import torch

from xclip_fast import processor
from xclip_fast.engine.linears import int8_linear
from xclip_fast.errors import InputError

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.int8, torch.float8_e4m3fn)

_log = logging.getLogger("xclip_fast")


def precision_of(dtype: torch.dtype, device: torch.device) -> tuple[torch.dtype, str | None, torch.dtype | None]:
    """The dtype of the residual stream, the narrow one of the blocks' GEMMs, and the one weights are kept in, if any.

    Raises:
        InputError: an engine cannot compute in this dtype on this device.
    """
    if dtype not in DTYPES and dtype is not torch.float64:
        raise InputError(f"an engine in {dtype!r} was asked for: choose one of {', '.join(map(str, DTYPES))}")
    if dtype is torch.int8:
        if device.type != "cpu" or int8_linear() is None:
            raise InputError(
                f"an engine in int8 was asked for on {device}: it needs a CPU and a PyTorch that multiply bytes; "
                "use bfloat16"
            )
        return torch.bfloat16 if processor.multiplies(torch.bfloat16) else torch.float32, "int8", None
    if dtype is torch.float8_e4m3fn:
        if device.type != "cuda" or torch.cuda.get_device_capability(device) < (9, 0):
            raise InputError(
                f"an engine in float8_e4m3fn was asked for on {device}: it needs an NVIDIA Hopper GPU or newer"
            )
        return torch.bfloat16, "float8_e4m3fn", None
    if device.type == "cpu" and dtype in (torch.bfloat16, torch.float16) and not processor.multiplies(dtype):
        _say_once(dtype)
        return torch.float32, None, dtype
    return dtype, None, None


@cache
def _say_once(dtype: torch.dtype) -> None:
    name = str(dtype).removeprefix("torch.")
    _log.warning(
        "this processor (%s) multiplies no %s: weights are kept in it and multiplied in float32",
        processor.describe(),
        name,
    )
