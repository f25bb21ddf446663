"""Launches recorded instead of made: which kernel, with what, over how many programs."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from triton.runtime.interpreter import InterpretedFunction
from triton.runtime.jit import JITFunction


@dataclass(frozen=True)
class Launch:
    """One launch as its launcher asked for it.

    Attributes:
        kernel: the function decorated with ``triton.jit``.
        grid: programs along each axis.
        arguments: arguments and launch options by name.
    """

    kernel: Any
    grid: tuple[int, ...]
    arguments: dict[str, Any]

    @property
    def name(self) -> str:
        """The kernel's name as in its source."""
        return self.kernel.fn.__name__


@contextmanager
def captured_launches() -> Iterator[list[Launch]]:
    """Record the launches made inside, and run none of them; tensors on the meta device do."""
    launches: list[Launch] = []

    def run(self: Any, *args: Any, grid: tuple[int, ...], warmup: bool, **kwargs: Any) -> None:
        launches.append(Launch(self, tuple(grid), dict(zip(self.arg_names, args, strict=False)) | kwargs))

    # which of the two a kernel is depends on TRITON_INTERPRET
    original = JITFunction.run, InterpretedFunction.run
    JITFunction.run = InterpretedFunction.run = run
    try:
        yield launches
    finally:
        JITFunction.run, InterpretedFunction.run = original
