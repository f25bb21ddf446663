"""Several processes of one evaluation, as torchrun starts them: what each found, brought together over gloo."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
from torch import Tensor

from xclip_fast.errors import InputError

Result = TypeVar("Result")

# the slowest share of the videos is waited for; torchrun ends those that wait for a process that is gone
_PATIENCE = timedelta(days=7)


@dataclass(frozen=True)
class Processes:
    """This process and those beside it.

    Attributes:
        rank: the number of this one.
        count: of all.
        group: of torch.distributed, or None for the default one.

    Example:
        >>> from xclip_fast.evaluate import Processes
        >>> Processes().gather(b"alone")
        [b'alone']
    """

    rank: int = 0
    count: int = 1
    group: Any = None

    def gather(self, data: bytes) -> list[bytes]:
        """What each process gives, in their order, in all of them."""
        if self.count == 1:
            return [data]
        from torch import distributed

        sizes = self._all(distributed, torch.tensor([len(data)]))
        longest = max(int(size) for size in sizes)
        padded = torch.frombuffer(bytearray(data.ljust(max(1, longest), b"\0")), dtype=torch.uint8)
        rows = self._all(distributed, padded)
        return [row.numpy().tobytes()[: int(size)] for row, size in zip(rows, sizes, strict=True)]

    def agreed(self, work: Callable[[], Result]) -> Result:
        """What the work gives here, once it has gone well in every process.

        Raises:
            InputError: in all of them, where it raised one in any.
        """
        result, error = None, ""
        try:
            result = work()
        except InputError as refused:
            error = str(refused)
        messages = [
            message.decode("utf-8", "surrogateescape")
            for message in self.gather(error.encode("utf-8", "surrogateescape"))
        ]
        for rank, message in enumerate(messages):
            if message:
                raise InputError(message if rank == 0 else f"process {rank}: {message}")
        return result  # type: ignore[return-value]

    def _all(self, distributed: Any, own: Tensor) -> list[Tensor]:
        rows = [torch.empty_like(own) for _ in range(self.count)]
        distributed.all_gather(rows, own, group=self.group)
        return rows


@contextmanager
def processes() -> Iterator[Processes]:
    """The processes that torchrun started, or this one alone; joined here where the program has not done so.

    Raises:
        InputError: the processes do not find each other.

    Example:
        >>> from xclip_fast.evaluate import processes
        >>> with processes() as all_of_them:
        ...     all_of_them.count
        1
    """
    from torch import distributed

    joined = distributed.is_available() and distributed.is_initialized()
    if not joined and os.environ.get("WORLD_SIZE", "1") == "1":
        yield Processes()
        return
    if joined:
        # the program's own may be of NCCL, which takes no tensors of the CPU
        group = distributed.new_group(backend="gloo", timeout=_PATIENCE)
    else:
        try:
            distributed.init_process_group("gloo", timeout=_PATIENCE)
        except (AttributeError, RuntimeError, ValueError) as error:
            lines = str(error).splitlines() or [type(error).__name__]
            raise InputError(
                f"WORLD_SIZE asks for several processes, and they do not meet: {lines[0]}: use torchrun"
            ) from None
        group = None
    try:
        yield Processes(distributed.get_rank(), distributed.get_world_size(), group)
    finally:
        if joined:
            distributed.destroy_process_group(group)
        else:
            distributed.destroy_process_group()


def local_device(asked: str) -> str:
    """The device of this process: of several on a machine with GPUs, each has its own."""
    if "LOCAL_RANK" in os.environ and asked in ("auto", "cuda") and torch.cuda.is_available():
        return f"cuda:{int(os.environ['LOCAL_RANK']) % torch.cuda.device_count()}"
    return asked


def local_share(workers: int) -> int:
    """How many of the processes that decode fall to this one, of those that a machine has room for."""
    beside = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    return workers if workers == 0 else max(1, workers // beside)
