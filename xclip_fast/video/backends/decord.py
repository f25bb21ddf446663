"""decord: kept for those who have nothing else; every file is read in a child process with a deadline."""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import json
import os
import subprocess
import sys
import threading
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np

from xclip_fast.errors import InputError
from xclip_fast.video.backends.base import Decoded, Keep, Request, VideoInfo, gather, log, undecodable
from xclip_fast.video.source import CheckedFile, check_length, check_picture

DEADLINE_SECONDS = 60
# it decodes ahead without bound: beyond this the child dies, not the machine
MEMORY_BYTES = 4 * 1024**3
_CHILD = Path(__file__).with_name("decord_child.py")


class Decord:
    """Decodes on one thread in a child that does not import torch, lives for one file and is killed at a deadline."""

    name = "decord"
    # in mpegts it numbers frames from the wrong place
    containers = frozenset({"mov", "matroska", "avi", "mpeg"})

    def unavailable(self) -> str | None:
        """Why decord can't be used here, or None when it can; decord itself is loaded in a child only."""
        if importlib.util.find_spec("decord") is None:
            return "the package decord is not installed; pip install av is the better choice"
        found = _versions()
        return found if isinstance(found, str) else None

    def probe(self, source: CheckedFile) -> VideoInfo:
        """Open the file and decode its first frame, for its size; decord does not tell the codec."""
        with _Child(source) as child:
            frames, _ = child.read({0}, lambda frame: frame.shape[:2])
        if not frames:
            raise undecodable(source, "no frame comes out")
        height, width = frames[0]
        return VideoInfo(child.count, child.fps, width, height, "unknown", child.count / child.fps)

    def read(self, source: CheckedFile, request: Request, keep: Keep) -> Decoded:
        """Decode from the start to the last wanted frame."""
        _warn_once()
        with _Child(source) as child:
            return gather(
                source,
                request,
                count=child.count,
                declared=child.count,
                first=lambda wanted: child.read(wanted, keep)[0],
                in_order=lambda wanted: _read_again(source, wanted, keep),
            )


def _read_again(source: CheckedFile, wanted: set[int], keep: Keep) -> tuple[dict[int, Any], int]:
    with _Child(source) as child:
        return child.read(wanted, keep)


class _Child:
    """A child process that has one file open: ``count`` and ``fps`` are what it found there."""

    def __init__(self, source: CheckedFile) -> None:
        self._source = source
        self._process = _start(source.path, str(DEADLINE_SECONDS), str(MEMORY_BYTES))
        # typed as files of unknown kind, and possibly missing, there
        self._input: Any = self._process.stdin
        self._output: Any = self._process.stdout
        self._late = False
        self._timer = threading.Timer(DEADLINE_SECONDS, self._stop)
        self._timer.daemon = True

    def __enter__(self) -> _Child:
        self._timer.start()
        try:
            found = self._line()
            self.count = int(found["count"])
            self.fps = max(float(found["fps"]), 1e-6)
            check_length(self._source.name, self.count, self.count / self.fps)
        except BaseException:
            self.__exit__(None, None, None)
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._timer.cancel()
        self._process.kill()
        self._output.close()
        # closing writes what is left to a child that is gone
        with contextlib.suppress(OSError):
            self._input.close()
        self._process.wait()

    def read(self, wanted: set[int], keep: Keep) -> tuple[dict[int, Any], int]:
        """The wanted frames, and how many frames came out of the file when it ended before the last of them."""
        frames: dict[int, Any] = {}
        try:
            self._input.write(json.dumps(sorted(wanted)).encode() + b"\n")
            self._input.flush()
        except OSError:
            raise self._failure() from None
        while True:
            found = self._line()
            if "seen" in found:
                return frames, int(found["seen"])
            height, width = int(found["height"]), int(found["width"])
            check_picture(self._source.name, width, height)
            pixels = self._read(height * width * 3)
            frames[int(found["number"])] = keep(np.frombuffer(pixels, np.uint8).reshape(height, width, 3))

    def _line(self) -> dict[str, Any]:
        try:
            found = json.loads(self._output.readline())
        except ValueError:
            raise self._failure() from None
        if "error" in found:
            raise undecodable(self._source, found["error"])
        return found

    def _read(self, size: int) -> bytearray:
        pixels = bytearray(size)
        if self._output.readinto(pixels) != size:
            raise self._failure()
        return pixels

    def _stop(self) -> None:
        self._late = True
        self._process.kill()

    def _failure(self) -> InputError:
        try:
            code: int | str = self._process.wait(timeout=1)
        except subprocess.TimeoutExpired:
            code = "none, it answers nonsense"
        if self._late:
            found = f"decord was stopped after {DEADLINE_SECONDS} seconds"
        else:
            found = f"decord crashed or ran out of its {MEMORY_BYTES // 1024**3} GiB (exit status {code})"
        return InputError(f"{self._source.name}: {found}; use the pyav backend (pip install av) or another file")


def _start(*arguments: str) -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        [sys.executable, str(_CHILD), *arguments],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        env={**os.environ, "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"},
    )


@functools.cache
def _versions() -> dict[str, str] | str:
    """The versions decord tells, or why it can't be loaded."""
    process = _start()
    try:
        answer, _ = process.communicate(timeout=DEADLINE_SECONDS)
        found: dict[str, str] = json.loads(answer)
    except (subprocess.TimeoutExpired, ValueError):
        process.kill()
        process.wait()
        return "decord crashes when it is loaded; pip install av is the better choice"
    return f"decord does not load ({found['error']}); pip install av" if "error" in found else found


@functools.cache
def _warn_once() -> None:
    found = _versions()
    if isinstance(found, dict):
        log.warning(
            "decord %s decodes with its own FFmpeg %s, which gets no security fixes: prefer PyAV (pip install av)",
            found["decord"],
            found["ffmpeg"],
        )
