"""The device that was asked for by name, or the reason why it cannot be used."""

from __future__ import annotations

from functools import cache

import torch

from xclip_fast.errors import InputError, one_line

KINDS = ("cpu", "cuda")


def find_device(asked: str | torch.device, kinds: tuple[str, ...] | None = KINDS) -> torch.device:
    """The device of a name such as "auto" (CUDA where torch finds a usable GPU, else the CPU), "cpu" or "cuda:1".

    Args:
        asked: the name, or a device of torch.
        kinds: types that are taken; None for all that torch can put a tensor on.

    Raises:
        InputError: the name is unknown, or the device cannot be used on this machine.

    Example:
        >>> from xclip_fast.devices import find_device
        >>> find_device("cpu")
        device(type='cpu')
    """
    if asked == "auto":
        return torch.device("cpu" if cuda_refusal() else "cuda")
    device = _parsed(asked)
    if device is None or (kinds is not None and device.type not in kinds):
        raise InputError(f"unknown device {str(asked)!r}: choose auto, cpu, cuda or cuda:N")
    if reason := _refusal(device):
        raise InputError(f"device {str(asked)!r} was asked for: {reason}")
    return torch.device("cpu") if device.type == "cpu" else device


def _parsed(asked: str | torch.device) -> torch.device | None:
    try:
        device = torch.device(asked)
    except RuntimeError:
        return None
    # torch counts modulo 256 and takes cuda:300 for cuda:44
    return device if str(device) == str(asked) else None


def cuda_refusal() -> str | None:
    """Why torch can use no GPU here. Returns the reason, or None."""
    if torch.cuda.is_available():
        return None
    built = torch.version.cuda
    return f"built for CUDA {built}, no usable GPU found" if built else "this torch is built for CPUs"


@cache
def compute_capability(index: int) -> tuple[int, int]:
    """Of the GPU with this number."""
    return torch.cuda.get_device_capability(index)


@cache
def multiprocessors(index: int) -> int:
    """Of the GPU with this number."""
    return torch.cuda.get_device_properties(index).multi_processor_count


def _refusal(device: torch.device) -> str | None:
    if device.type == "cuda":
        if reason := cuda_refusal():
            return f"{reason}: use cpu"
        count = torch.cuda.device_count()
        if device.index is not None and device.index >= count:
            return f"this machine has {count} GPUs, the last is cuda:{count - 1}"
    try:
        torch.empty(0, device=device)
    except (AssertionError, NotImplementedError, RuntimeError) as error:
        return f"torch cannot use it: {one_line(error)}"
    return None
