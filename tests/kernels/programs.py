"""Which programs of a launch the interpreter runs, and in which order: a GPU promises none."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any


@contextmanager
def programs(select: Callable[[int], Sequence[int]]) -> Iterator[None]:
    """Run these programs of each launch, in this order; ``select`` is given how many there are along the one axis."""
    from triton.runtime import interpreter

    builder, executor = interpreter.InterpreterBuilder, interpreter.GridExecutor
    original = builder.set_grid_dim, builder.set_grid_idx, executor.__call__
    count, chosen = 0, []

    def call(self: Any, *args: Any, **kwargs: Any) -> None:
        nonlocal count, chosen
        (count,) = self.grid
        chosen = list(select(count))
        self.grid = (len(chosen),)
        original[2](self, *args, **kwargs)

    builder.set_grid_dim = lambda self, x, y, z: original[0](self, count, y, z)
    builder.set_grid_idx = lambda self, x, y, z: original[1](self, chosen[x], y, z)
    executor.__call__ = call
    try:
        yield
    finally:
        builder.set_grid_dim, builder.set_grid_idx, executor.__call__ = original
