"""Sees what the interpreter lets pass in silence: loads and stores outside the tensors of a launch.

An offset that wraps in int32 lands outside too. The check covers what a tensor's view spans, not its whole storage, and
counts the launches on the way.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy
import torch
from torch import Tensor


class OutOfBoundsError(AssertionError):
    """A kernel touched memory outside the tensors it was given."""


@dataclass
class Launches:
    """Names of the kernels launched, in order, and the largest stride of each that was given strides."""

    names: list[str] = field(default_factory=list)
    strides: dict[str, int] = field(default_factory=dict)


def span(tensor: Tensor) -> tuple[int, int]:
    """First address of a view, and the one behind its last element."""
    if not tensor.numel():
        return tensor.data_ptr(), tensor.data_ptr()
    reach = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return tensor.data_ptr(), tensor.data_ptr() + (reach + 1) * tensor.element_size()


@contextmanager
def checked_pointers() -> Iterator[Launches]:
    """Raise ``OutOfBoundsError`` when a kernel run by the interpreter leaves its tensors."""
    from triton.runtime import interpreter

    launches = Launches()
    spans: list[tuple[int, int]] = []
    builder, function = interpreter.InterpreterBuilder, interpreter.InterpretedFunction
    original = builder.create_masked_load, builder.create_masked_store, function.run

    def check(action: str, pointers: Any, mask: Any, width: int) -> None:
        # the mask of a descriptor is a plain array
        addresses = pointers.data.astype(numpy.uint64)[numpy.asarray(mask.data).astype(bool)]
        inside = numpy.zeros(addresses.shape, dtype=bool)
        for start, end in spans:
            inside |= (addresses >= start) & (addresses + numpy.uint64(width) <= end)
        if not inside.all():
            strays = addresses[~inside]
            raise OutOfBoundsError(
                f"{launches.names[-1]}: {action} of {strays.size} elements outside its tensors, first at {strays[0]:#x}"
            )

    def masked_load(self: Any, pointers: Any, mask: Any, *args: Any, **options: Any) -> Any:
        check("load", pointers, mask, max(1, pointers.get_element_ty().primitive_bitwidth // 8))
        return original[0](self, pointers, mask, *args, **options)

    def masked_store(self: Any, pointers: Any, value: Any, mask: Any, *args: Any, **options: Any) -> Any:
        check("store", pointers, mask, max(1, pointers.get_element_ty().primitive_bitwidth // 8))
        return original[1](self, pointers, value, mask, *args, **options)

    def run(self: Any, *args: Any, **kwargs: Any) -> Any:
        name = self.fn.__name__
        launches.names.append(name)
        strides = [value for key, value in kwargs.items() if key.endswith("_stride")]
        # a descriptor has the strides of its tensor, and names it
        strides += [stride for value in kwargs.values() for stride in getattr(value, "strides", ())]
        if strides:
            launches.strides[name] = max(launches.strides.get(name, 0), *strides)
        values = (getattr(x, "base", x) for x in (*args, *kwargs.values()))
        spans[:] = [span(x) for x in values if isinstance(x, torch.Tensor)]
        return original[2](self, *args, **kwargs)

    builder.create_masked_load, builder.create_masked_store, function.run = masked_load, masked_store, run
    try:
        yield launches
    finally:
        builder.create_masked_load, builder.create_masked_store, function.run = original
