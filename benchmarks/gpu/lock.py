"""Turns on one GPU: whoever measures has it alone, whoever only works shares it. Between processes, by files."""

from __future__ import annotations

import fcntl
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path


class Turns:
    """Locks in a folder. A first-come, first-served queue, so that nobody waits for ever.

    The system frees what a process held that has died.

    Args:
        folder: of the locks.
        waiting: told when this process begins to wait, and when it has its turn.
    """

    def __init__(self, folder: Path, waiting: Callable[[bool], None] = lambda begins: None) -> None:
        self.gate, self.gpu, self.waiting = folder / "gate.lock", folder / "gpu.lock", waiting
        self._kept = ExitStack()
        self._staying = False

    @contextmanager
    def together(self) -> Iterator[None]:
        """Work beside others that share, and beside nobody who measures."""
        if self._staying:
            yield
            return
        with self._held(fcntl.LOCK_SH):
            yield

    def stay(self) -> None:
        """Share until this process asks to be alone, so that nobody measures in the midst of what it builds."""
        if not self._staying:
            self._kept.enter_context(self._held(fcntl.LOCK_SH))
            self._staying = True

    @contextmanager
    def alone(self) -> Iterator[None]:
        """Measure: nobody else has the GPU."""
        self._kept.close()
        self._staying = False
        with self._held(fcntl.LOCK_EX):
            yield

    @contextmanager
    def _held(self, how: int) -> Iterator[None]:
        with self.gpu.open("a") as gpu:
            self.waiting(True)
            with self.gate.open("a") as gate:
                fcntl.flock(gate, fcntl.LOCK_EX)
                fcntl.flock(gpu, how)
            self.waiting(False)
            yield
