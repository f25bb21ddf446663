"""Features of one video, and of many files: decoded in processes of their own while full batches are computed."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from xclip_fast.errors import InputError, is_out_of_memory
from xclip_fast.reference.model import VideoFeatures
from xclip_fast.video.pool import DEADLINE_SECONDS, decode_files

BATCH_SIZE = 8
VIEWS_AT_ONCE = 4  # bounds the memory of many-view runs


@dataclass(frozen=True)
class FileFeatures:
    """What became of one file.

    path: as given.
    video: float32 (E,) on the CPU, not normalised, the mean over the views; None for a file that cannot be used.
    patches: float32 (N, E), or None where they were not asked for.
    error: why the file cannot be used.

    Example:
        >>> from xclip_fast import InputError
        >>> from xclip_fast.pipeline import FileFeatures
        >>> FileFeatures("none.mp4", error=InputError("none.mp4: cannot be read")).video is None
        True
    """

    path: str
    video: Tensor | None = None
    patches: Tensor | None = None
    error: InputError | None = None


@torch.inference_mode()
def embed(model: Any, views: Tensor) -> VideoFeatures:
    """Features of one video, float32 and not normalised: ``video`` (E,) and ``patches`` (N, E), the mean of its views.

    Args:
        model: an ``Engine``, or what ``create_model`` or ``load_model`` returns.
        views: uint8 (views, T, H, W, 3) of one video.

    Raises:
        InputError: the model gave something that is not a number.

    Example:
        >>> import torch
        >>> from xclip_fast import XCLIPConfig, create_model
        >>> from xclip_fast.pipeline import embed
        >>> config = XCLIPConfig(image_size=32, patch_size=16, vision_width=64, vision_layers=1, embed_dim=64)
        >>> model = create_model(config)
        >>> features = embed(model, torch.zeros(4, 8, 32, 32, 3, dtype=torch.uint8))
        >>> features.video.shape, features.patches.shape
        (torch.Size([64]), torch.Size([4, 64]))
    """
    parts = [model.encode_video(some) for some in views.to(device_of(model)).split(VIEWS_AT_ONCE)]
    video = torch.cat([part.video for part in parts]).float().mean(dim=0).cpu()
    patches = torch.cat([part.patches for part in parts]).float().mean(dim=0).cpu()
    return VideoFeatures(check_finite(video), check_finite(patches))


def embed_files(
    model: Any,
    paths: Iterable[str | os.PathLike[str]],
    *,
    batch_size: int = BATCH_SIZE,
    patches: bool = False,
    clips: int = 1,
    crops: int = 1,
    preset: str = "official",
    backend: str = "auto",
    workers: int | None = None,
    timeout: float = DEADLINE_SECONDS,
) -> Iterator[FileFeatures]:
    """The features of each file, in the order of the files; one that cannot be used comes with its error.

    Views of several files share a batch. The number of workers changes no bit. A batch of another size, or a file more
    or less before it, may change the rounding of a GEMM: some 1e-6 of a feature in float32.

    Args:
        model: an ``Engine``, or what ``create_model`` or ``load_model`` returns.
        paths: local video files.
        batch_size: views in a batch.
        patches: also the patch features.
        clips, crops, preset, backend: as for ``load_video``; frames and size are the model's.
        workers, timeout: as for ``decode_files``. Ending the iterator ends the processes.

    Raises:
        InputError: an option cannot be used, the memory is too small for the batch, or the processes do not start.
        ValueError: a number is out of range, or ``paths`` is one path.

    Example:
        >>> from xclip_fast import Engine, XCLIPConfig, create_model
        >>> from xclip_fast.pipeline import embed_files
        >>> config = XCLIPConfig(image_size=32, patch_size=16, vision_width=64, vision_layers=1, embed_dim=64)
        >>> engine = Engine(create_model(config))
        >>> for found in embed_files(engine, ["clip.mp4", "none.mp4"], clips=2):
        ...     print(found.path, found.error or found.video.shape)
        clip.mp4 torch.Size([64])
        none.mp4 none.mp4: cannot be read (No such file or directory); give the path of a local video file
    """
    if isinstance(paths, str | os.PathLike):
        raise ValueError(f"paths must be a list of files, found the one path {os.fspath(paths)!r}")
    return embed_in_groups(
        model,
        [os.fsdecode(path) for path in paths],
        (),
        batch_size=batch_size,
        patches=patches,
        clips=clips,
        crops=crops,
        preset=preset,
        backend=backend,
        workers=workers,
        timeout=timeout,
    )


def embed_in_groups(
    model: Any, paths: Sequence[str], ends: Collection[int], *, batch_size: int, patches: bool, **decoding: Any
) -> Iterator[FileFeatures]:
    """``embed_files``, but no batch goes on past the files whose places are in ``ends``."""
    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, found {batch_size}")
    config = model.config
    decoded = decode_files(paths, frames=config.frames, size=config.image_size, **decoding)
    views = config.frames, config.image_size, config.image_size, 3
    return _embed(_Batches(model, batch_size, views, patches), paths, ends, decoded)


def _embed(batches: _Batches, paths: Sequence[str], ends: Collection[int], decoded: Any) -> Iterator[FileFeatures]:
    waiting: deque[_File] = deque()
    with closing(decoded):
        for number, (path, found) in enumerate(zip(paths, decoded, strict=True)):
            file = _File(path, found if isinstance(found, InputError) else None)
            waiting.append(file)
            if isinstance(found, Tensor):
                file.pending = len(found)
                for view in found:
                    batches.add(file, view)
            if number in ends or number == len(paths) - 1:
                batches.flush()
            while waiting and not waiting[0].pending:
                yield waiting.popleft().features()


@dataclass
class _File:
    path: str
    error: InputError | None
    pending: int = 0
    rows: list[tuple[Tensor, ...]] = field(default_factory=list)

    def take(self, row: tuple[Tensor, ...]) -> None:
        self.rows.append(row)
        self.pending -= 1

    def features(self) -> FileFeatures:
        if self.error is not None:
            return FileFeatures(self.path, error=self.error)
        try:
            means = [check_finite(torch.stack(views).mean(dim=0)) for views in zip(*self.rows, strict=True)]
        except InputError as error:
            return FileFeatures(self.path, error=error)
        return FileFeatures(self.path, means[0], means[1] if len(means) > 1 else None)


class _Batches:
    """Batches of views in flight: being filled, computed, or copied back.

    On a GPU two pinned buffers take turns: one is filled while the other is copied and computed, and nothing waits for
    the results of a batch before the next one is under way.
    """

    def __init__(self, model: Any, size: int, view: tuple[int, ...], patches: bool) -> None:
        self.encode = _encoder(model, patches)
        self.device = device_of(model)
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


def _encoder(model: Any, patches: bool) -> Callable[[Tensor], Sequence[Tensor]]:
    """From a batch of views to its rows: video features, then patch features where they are asked for."""

    @torch.inference_mode()
    def encode(views: Tensor) -> Sequence[Tensor]:
        # without patches an engine computes only the class rows of the last block
        if not patches and is_engine(model):
            return [model.embed_video(views)]
        return model.encode_video(views)[: 2 if patches else 1]

    return encode


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
