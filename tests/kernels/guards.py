"""Memory that shows where a kernel goes: poison in what it must write, guards around all, rows far apart."""

from __future__ import annotations

from math import prod
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from xclip_fast.ops.inputs import Factory

# of each side of a tensor; a multiple of every alignment
GUARD_BYTES = 4096
GUARD = 0xA5
# elements that no number of bytes makes unaligned: a descriptor takes rows that begin at multiples of 16 bytes
ALIGNED = 8
# elements between the rows of an input
GAP = ALIGNED
# more than an int32 can count
FAR = 2**31
STEP = 2**20


class GuardedMemory(TorchFunctionMode):
    """Hands out tensors between guards while it is active: poisoned ones for empty ones, and inputs by ``make``.

    The inputs' rows have gaps of NaN between them, which spoil what reads them.
    """

    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.dtype = dtype
        self.buffers: list[Tensor] = []
        self.outputs: list[Tensor] = []
        self.inputs: list[tuple[Tensor, Tensor]] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func not in (torch.empty, torch.empty_like, Tensor.new_empty, torch.zeros):
            return result
        guarded = self._guarded(result.numel(), result.dtype).view(result.shape)
        # bytes have no poison
        poison = float("nan") if result.is_floating_point() else 255
        guarded.fill_(0.0 if func is torch.zeros else poison)
        self.outputs.append(guarded)
        return guarded

    @property
    def draw(self) -> Factory:
        """Its inputs as example arguments are drawn."""
        return Factory(self.make)

    def make(self, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        """A random input."""
        dtype = dtype or self.dtype
        *outer, width = shape or (1,)
        padded = width + GAP if outer else width
        rows = self._guarded(prod(outer) * padded, dtype).view(*outer, padded)
        # bytes have no poison
        rows.fill_(float("nan") if dtype.is_floating_point else 255)
        tensor = rows[..., :width].reshape(shape).copy_(_values(shape, dtype))
        self.inputs.append((rows, rows.clone()))
        return tensor

    def check(self) -> None:
        """Every element of every output was written, and nothing else.

        Raises:
            AssertionError: a guard, an input or a gap changed, or poison is left.
        """
        for buffer in self.buffers:
            for side in (buffer[:GUARD_BYTES], buffer[-GUARD_BYTES:]):
                assert (side == GUARD).all(), "a guard was written"
        for rows, before in self.inputs:
            assert torch.equal(rows.view(torch.uint8), before.view(torch.uint8)), "an input was written"
        for output in self.outputs:
            left = int(output.isnan().sum())
            assert not left, (
                f"{left} of {output.numel()} elements were not written, or from memory that is not the input"
            )

    def _guarded(self, elements: int, dtype: torch.dtype) -> Tensor:
        size = elements * dtype.itemsize
        buffer = torch.full((size + 2 * GUARD_BYTES,), GUARD, dtype=torch.uint8)
        self.buffers.append(buffer)
        return buffer[GUARD_BYTES : GUARD_BYTES + size].view(dtype)


def _values(shape: tuple[int, ...], dtype: torch.dtype, generator: torch.Generator | None = None) -> Tensor:
    """Normal numbers, or any bytes."""
    if dtype == torch.uint8:
        return torch.randint(256, shape, dtype=dtype, generator=generator)
    return torch.randn(shape, generator=generator).to(dtype)


def factories(axis: int) -> tuple[Factory, Factory]:
    """Two draws of the same float16 inputs: in blocks of their own, and with a stride along ``axis`` so large that
    its first and last index lie more than an int32 apart. Memory never touched is never allocated.

    Rows keep their unit stride, and inputs without such an axis are alike in both.
    """
    storage = torch.empty(FAR + 2**28, dtype=torch.float16)
    used = 0

    def values(generator: torch.Generator, shape: tuple[int, ...], dtype: torch.dtype | None) -> Tensor:
        return _values(shape, dtype or torch.float16, generator)

    def far(*shape: int, dtype: torch.dtype | None = None) -> Tensor:
        nonlocal used
        found = values(generators[0], shape, dtype)
        if found.dtype != storage.dtype or axis >= len(shape) - 1 or shape[axis] < 2:
            return found
        strides = list(found.stride())
        # whole steps, so that the inputs lie between each other's rows
        strides[axis] = -(-FAR // (shape[axis] - 1) // STEP) * STEP
        place = storage.as_strided(shape, strides, used)
        used += -(-found.numel() // ALIGNED) * ALIGNED
        assert used <= STEP
        return place.copy_(found)

    def near(*shape: int, dtype: torch.dtype | None = None) -> Tensor:
        return values(generators[1], shape, dtype)

    generators = [torch.Generator().manual_seed(0) for _ in range(2)]
    return Factory(near), Factory(far)
