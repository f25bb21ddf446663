"""Files in, rows out, whatever the model computes: full batches of views while the next files are decoded."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from xclip_fast.errors import InputError, is_out_of_memory
from xclip_fast.video.pool import Source, decode_files

BATCH_SIZE = 8
VIEWS_AT_ONCE = 4  # bounds the memory of many-view runs

Encode = Callable[[Tensor], Sequence[Tensor]]


@dataclass(frozen=True)
class FileRows:
    """What became of one file: of each tensor that was asked for the mean over its views, in float32 on the CPU."""

    source: Source
    means: tuple[Tensor, ...] = ()
    error: InputError | None = None


def run_files(
    model: Any,
    encode: Encode,
    sources: Sequence[Source],
    ends: Collection[int] = (),
    *,
    batch_size: int,
    **decoding: Any,
) -> Iterator[FileRows]:
    """What ``encode`` makes of the views of each file, in the order of the files.

    Args:
        model: an ``Engine`` or a model, for its sizes and its device.
        encode: from a batch of views, uint8 (B, T, H, W, 3) on the device, to tensors of B rows each.
        sources: what ``decode_files`` takes.
        ends: no batch goes on past the files whose places are in it.
        batch_size: views in a batch.
        decoding: clips, crops, preset, backend, workers and timeout of ``decode_files``.
    """
    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, found {batch_size}")
    config = model.config
    decoded = decode_files(sources, frames=config.frames, size=config.image_size, **decoding)
    views = config.frames, config.image_size, config.image_size, 3
    return _run(_Batches(encode, device_of(model), batch_size, views), sources, ends, decoded)


def _run(batches: _Batches, sources: Sequence[Source], ends: Collection[int], decoded: Any) -> Iterator[FileRows]:
    waiting: deque[_File] = deque()
    with closing(decoded):
        for number, (source, found) in enumerate(zip(sources, decoded, strict=True)):
            file = _File(source, found if isinstance(found, InputError) else None)
            waiting.append(file)
            if isinstance(found, Tensor):
                file.pending = len(found)
                for view in found:
                    batches.add(file, view)
            if number in ends or number == len(sources) - 1:
                batches.flush()
            while waiting and not waiting[0].pending:
                yield waiting.popleft().finished()


@dataclass
class _File:
    source: Source
    error: InputError | None
    pending: int = 0
    rows: list[tuple[Tensor, ...]] = field(default_factory=list)

    def take(self, row: tuple[Tensor, ...]) -> None:
        self.rows.append(row)
        self.pending -= 1

    def finished(self) -> FileRows:
        if self.error is not None:
            return FileRows(self.source, error=self.error)
        try:
            means = [check_finite(torch.stack(views).mean(dim=0)) for views in zip(*self.rows, strict=True)]
        except InputError as error:
            return FileRows(self.source, error=error)
        return FileRows(self.source, tuple(means))


class _Batches:
    """Batches of views in flight: being filled, computed, or copied back.

    On a GPU two pinned buffers take turns: one is filled while the other is copied and computed, and nothing waits for
    the results of a batch before the next one is under way.
    """

    def __init__(self, encode: Encode, device: torch.device, size: int, view: tuple[int, ...]) -> None:
        self.encode, self.device = encode, device
        self.pinned = self.device.type == "cuda"
        shape = size, *view
        count = 2 if self.pinned else 1
        try:
            self.buffers = [torch.empty(shape, dtype=torch.uint8, pin_memory=self.pinned) for _ in range(count)]
        except (MemoryError, RuntimeError) as error:
            raise _too_large(error, size) from None
        self.owners: list[_File] = []
        self.in_flight: deque[tuple[list[_File], list[Tensor], torch.cuda.Event | None]] = deque()

    def add(self, owner: _File, view: Tensor) -> None:
        """Put a view into the batch; a full one goes to the model."""
        self.buffers[0][len(self.owners)].copy_(view)
        self.owners.append(owner)
        if len(self.owners) == len(self.buffers[0]):
            self._compute()

    def flush(self) -> None:
        """Compute what is left, and hand out all results."""
        if self.owners:
            self._compute()
        while self.in_flight:
            self._collect()

    def _compute(self) -> None:
        try:
            found = self.encode(self.buffers[0][: len(self.owners)].to(self.device, non_blocking=True))
            event = None
            if self.pinned:
                found = [self._to_host(rows) for rows in found]
                event = torch.cuda.current_stream(self.device).record_event()
        except (MemoryError, RuntimeError) as error:
            raise _too_large(error, len(self.owners)) from None
        self.in_flight.append((self.owners, [*found], event))
        self.owners = []
        # the buffer used longest ago is filled next
        self.buffers.append(self.buffers.pop(0))
        while len(self.in_flight) >= len(self.buffers):
            self._collect()

    def _to_host(self, rows: Tensor) -> Tensor:
        return torch.empty(rows.shape, dtype=rows.dtype, pin_memory=True).copy_(rows, non_blocking=True)

    def _collect(self) -> None:
        owners, found, event = self.in_flight.popleft()
        if event is not None:
            event.synchronize()
        for place, owner in enumerate(owners):
            owner.take(tuple(rows[place].float() for rows in found))


def _too_large(error: Exception, size: int) -> Exception:
    if not is_out_of_memory(error):
        return error
    return InputError(f"not enough memory for a batch of {size} views: use a smaller batch size")


def is_engine(model: Any) -> bool:
    """Whether this is an ``Engine``; its class is not imported here, since engines offer ``embed_files`` themselves."""
    return hasattr(model, "embed_video")


def device_of(model: Any) -> torch.device:
    """Where an engine or a model computes."""
    device: torch.device = model.device if is_engine(model) else next(model.parameters()).device
    return device


def check_finite(values: Tensor) -> Tensor:
    """The values given.

    Raises:
        InputError: one of them is NaN or infinite.
    """
    if not values.isfinite().all():
        raise InputError("the model gave values that are not numbers: check the weights, or compute in float32")
    return values
