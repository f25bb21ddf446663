"""Many files decoded ahead in processes of their own, in order, into shared memory."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from typing import Any

from torch import Tensor

from xclip_fast.errors import InputError
from xclip_fast.video.backends import BACKENDS
from xclip_fast.video.jobs import DEADLINE_SECONDS, Answer, Candidate, decode_jobs
from xclip_fast.video.load import load_video
from xclip_fast.video.members import Member, Source
from xclip_fast.video.preprocess import check_crops, get_preset
from xclip_fast.video.sampling import Sampling

__all__ = ["DEADLINE_SECONDS", "Member", "Source", "check_backend", "decode_files", "default_workers"]

_MOST_WORKERS = 8
_FEW_FILES = 32


def default_workers(files: int) -> int:
    """As many as there are cores, at most 8; none for fewer than 32 files, done before processes start."""
    if files < _FEW_FILES or os.name != "posix":
        return 0
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(cores, _MOST_WORKERS)


def decode_files(
    paths: Sequence[Source],
    *,
    frames: int,
    size: int,
    clips: int = 1,
    crops: int = 1,
    preset: str = "official",
    backend: str = "auto",
    workers: int | None = None,
    timeout: float = DEADLINE_SECONDS,
) -> Iterator[Tensor | InputError]:
    """The views of each file, or why it cannot be used, in the order of the files.

    Closing the iterator ends the processes. They need no ``if __name__ == "__main__"`` in the program that calls.

    Args:
        paths: local files, or members of tar archives.
        frames, size, clips, crops, preset, backend: as for ``load_video``.
        workers: processes; 0 decodes in this one, where a decoder that crashes or hangs cannot be stopped. See
            ``default_workers`` for the default.
        timeout: seconds after which the process that decodes a file is ended, and the file given up.

    Yields:
        uint8 (clips * crops, T, size, size, 3), valid until the next step: copy what is to stay.

    Raises:
        InputError: there is no such preset or backend, or the processes do not start.
        RuntimeError: the decoder failed in a way that is no fault of the file.
        ValueError: a number is out of range.
    """
    Sampling(frames, clips)
    get_preset(preset)
    check_crops(size, crops)
    check_backend(backend)
    options: dict[str, Any] = {
        "frames": frames,
        "size": size,
        "clips": clips,
        "crops": crops,
        "preset": preset,
        "backend": backend,
    }
    if workers is None:
        workers = default_workers(len(paths))
    answers = decode_jobs(
        ([Candidate(path)] for path in paths),
        load_video,
        options,
        (clips * crops, frames, size, size, 3),
        workers=min(workers, len(paths)),
        timeout=timeout,
    )
    return _views_or_error(answers)


def _views_or_error(answers: Iterator[Answer]) -> Iterator[Tensor | InputError]:
    for answer in answers:
        yield answer.failures[0][1] if answer.views is None else answer.views


def check_backend(name: str) -> None:
    """Raise InputError when there is no decode backend of this name."""
    if name != "auto" and name not in BACKENDS:
        raise InputError(f"no decode backend {name!r}; choose auto, {', '.join(BACKENDS)}")
