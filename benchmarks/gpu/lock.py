"""Turns on one GPU: whoever measures has it alone, whoever only works shares it. Between processes, by files."""

from __future__ import annotations

import fcntl
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


class Turns:
    """Locks in a folder. Who asks waits at the gate behind who asked before, so that nobody waits for ever.

    The system frees what a process held that has died.
    """

    def __init__(self, folder: Path) -> None:
        self.gate, self.gpu = folder / "gate.lock", folder / "gpu.lock"

    @contextmanager
    def together(self) -> Iterator[None]:
        """Work beside others that share, and beside nobody who measures."""
        with self._held(fcntl.LOCK_SH):
            yield

    @contextmanager
    def alone(self) -> Iterator[None]:
        """Measure: nobody else has the GPU."""
        with self._held(fcntl.LOCK_EX):
            yield

    @contextmanager
    def _held(self, how: int) -> Iterator[None]:
        with self.gpu.open("a") as gpu:
            with self.gate.open("a") as gate:
                fcntl.flock(gate, fcntl.LOCK_EX)
                fcntl.flock(gpu, how)
            yield
