"""What every launcher needs: kernels launched at little cost, on the device of their tensors, and sizes for them.

Triton's own launch asks again each time what decides which compiled kernel fits: 40 us of host time, more than most of
these kernels run. ``kernel`` asks once.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any

import torch
import triton
from torch import Tensor
from triton import knobs
from triton.runtime.jit import JITFunction

KEPT = 4096  # compiled kernels remembered, of one kernel and all the shapes it was launched for
_HERE: AbstractContextManager[object] = nullcontext()

# written out for the arguments of each kernel, for loops over them would cost more than the launch
_LAUNCH = """
def launch(grid, {names}, **options):
    if not {first}.is_cuda or hooks.launch_enter_hook.calls or hooks.launch_exit_hook.calls:
        return miss(None, grid, dict({given}, **options))
    {addresses}
    device = current_device()
    key = (device, {dtypes}, {rest}, *options.items())
    found = remembered.get(key)
    if found is None or ({together}) & 15:
        return miss(None if ({together}) & 15 else key, grid, dict({given}, **options))
    run, function, metadata, _ = found
    x, y, z = grid if len(grid) == 3 else (*grid, 1, 1)[:3]
    run(x, y, z, stream(device), function, metadata, None, None, None, {passed}, {rest})
"""


class Kernel(JITFunction):
    """A kernel that remembers what Triton compiled for the arguments of a launch, and then launches just that.

    What is remembered goes by the device, the dtype of each pointer and the value of everything else: that is finer
    than what Triton compiles apart. Addresses that 16 does not divide, and launches that are counted or watched, are
    left to Triton. The first arguments are pointers, named ``*_ptr``.
    """

    def __init__(self, function: Callable[..., None]) -> None:
        super().__init__(function)
        self.remembered: dict[tuple[Any, ...], Any] = {}
        pointers = [name for name in self.arg_names if name.endswith("_ptr")]
        rest = self.arg_names[len(pointers) :]
        text = _LAUNCH.format(
            names=", ".join(self.arg_names),
            first=pointers[0],
            given=", ".join(f"{name}={name}" for name in self.arg_names),
            addresses="; ".join(f"_{name} = 0 if {name} is None else {name}.data_ptr()" for name in pointers),
            dtypes=", ".join(f"None if {name} is None else {name}.dtype" for name in pointers),
            together=" | ".join(f"_{name}" for name in pointers),
            passed=", ".join(f"_{name} or None" for name in pointers),
            rest=", ".join(rest),
        )
        scope = {
            "hooks": knobs.runtime,
            "current_device": torch._C._cuda_getDevice if torch.cuda._is_compiled() else None,
            "stream": torch._C._cuda_getCurrentRawStream if torch.cuda._is_compiled() else None,
            "remembered": self.remembered,
            "miss": self._miss,
        }
        exec(text, scope)
        self.launch: Any = scope["launch"]

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        """The launch on this grid."""
        return partial(self.launch, grid)

    def _miss(self, key: tuple[Any, ...] | None, grid: tuple[int, ...], arguments: dict[str, Any]) -> None:
        compiled = self.run(grid=grid, warmup=False, **arguments)
        # what is still being compiled, or was only counted, has no function
        if key is None or getattr(compiled, "function", None) is None:
            return
        if len(self.remembered) >= KEPT:
            self.remembered.clear()
        # kept itself too: once nobody has it, newer versions of Triton unload its code
        self.remembered[key] = compiled.run, compiled.function, compiled.packed_metadata, compiled


def kernel(function: Callable[..., None]) -> Any:
    """Make a function a kernel that launchers launch; ``triton.jit`` is for the functions that kernels call."""
    # the interpreter takes it as it is
    return triton.jit(function) if knobs.runtime.interpret else Kernel(function)


def on_device_of(tensor: Tensor) -> AbstractContextManager[object]:
    """Launch on the device of this tensor, whichever is current; Triton launches on the current one."""
    if tensor.device.type != "cuda" or tensor.device.index == torch._C._cuda_getDevice():
        return _HERE
    return torch.cuda.device(tensor.device)


def as_rows(tensor: Tensor) -> Tensor:
    """(..., D) as (rows, D) with unit stride along D; copied only where no view exists."""
    if tensor.ndim == 2 and tensor.stride(1) == 1:
        return tensor
    rows = tensor.reshape(-1, tensor.shape[-1])
    return rows if rows.stride(-1) == 1 else rows.contiguous()


def contiguous_like(tensor: Tensor) -> Tensor:
    """An empty tensor of this shape, dtype and device, contiguous; costs half of what ``torch.empty`` does."""
    return torch.empty_like(tensor, memory_format=torch.contiguous_format)


def cdiv(count: int, size: int) -> int:
    """Blocks of this size that hold so many; Triton's own is wrapped for use in kernels, and slow on the host."""
    return -(-count // size)


def next_power_of_2(count: int) -> int:
    """The least power of two that holds so many; see ``cdiv``."""
    return 1 << max(count - 1, 0).bit_length()
