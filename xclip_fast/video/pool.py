"""Many files decoded ahead in processes of their own, in order, into shared memory."""

from __future__ import annotations

import json
import logging
import mmap
import os
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from xclip_fast.errors import InputError, is_out_of_memory
from xclip_fast.video.backends import BACKENDS
from xclip_fast.video.load import load_video
from xclip_fast.video.preprocess import check_crops, get_preset
from xclip_fast.video.sampling import Sampling

DEADLINE_SECONDS = 300.0
MOST_SECONDS = 86400.0
AHEAD_BYTES = 1 << 30  # of views that wait for the model, but for at least one file
_START_SECONDS = 120.0
_MOST_WORKERS = 8
_FEW_FILES = 32
_WORKER = Path(__file__).with_name("worker.py")

_log = logging.getLogger("xclip_fast")


def default_workers(files: int) -> int:
    """As many as there are cores, at most 8; none for fewer than 32 files, done before processes start."""
    if files < _FEW_FILES or os.name != "posix":
        return 0
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(cores, _MOST_WORKERS)


def decode_files(
    paths: Sequence[str],
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
        paths: local files.
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
    if backend != "auto" and backend not in BACKENDS:
        raise InputError(f"no decode backend {backend!r}; choose auto, {', '.join(BACKENDS)}")
    if workers is not None and workers < 0:
        raise ValueError(f"workers must be 0 or more, found {workers}")
    if not 0 < timeout <= MOST_SECONDS:
        raise ValueError(f"timeout must be more than 0 seconds and at most {MOST_SECONDS:g}, found {timeout}")
    workers = default_workers(len(paths)) if workers is None else min(workers, len(paths))
    if workers and os.name != "posix":
        raise ValueError(f"{workers} workers were asked for, but this system has no way to share memory: use 0")
    options: dict[str, Any] = {
        "frames": frames,
        "size": size,
        "clips": clips,
        "crops": crops,
        "preset": preset,
        "backend": backend,
    }
    if workers:
        return _decode_ahead(paths, options, workers, timeout)
    return _decode_here(paths, options)


def load_or_error(path: str, options: dict[str, Any]) -> Tensor | InputError:
    """What ``load_video`` gives for a file, or why it cannot be used."""
    try:
        return load_video(path, **options)
    except InputError as error:
        return error
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        return InputError(f"{path}: not enough memory to decode it: use fewer views or frames")


def _decode_here(paths: Sequence[str], options: dict[str, Any]) -> Iterator[Tensor | InputError]:
    for path in paths:
        yield load_or_error(path, options)


def _decode_ahead(
    paths: Sequence[str], options: dict[str, Any], workers: int, timeout: float
) -> Iterator[Tensor | InputError]:
    pool = _Pool(paths, options, workers, timeout)
    said: set[str] = set()
    try:
        for number, path in enumerate(paths):
            slot, answer = pool.wait_for(number)
            for level, message in answer.get("log", ()):
                # what each process says of no file in particular is said once
                if path in message or ascii(path) in message or message not in said:
                    _log.log(level, "%s", message)
                said.add(message)
            if "fault" in answer:
                raise RuntimeError(f"{path!a}: decoding failed\n{answer['fault']}")
            yield InputError(answer["error"]) if "error" in answer else pool.slots[slot]
            pool.release(slot)
    finally:
        pool.close()


class _Pool:
    """A thread for each process; slots of shared memory bound how far they run ahead."""

    def __init__(self, paths: Sequence[str], options: dict[str, Any], workers: int, timeout: float) -> None:
        self.paths, self.options, self.timeout = paths, options, timeout
        size = options["size"]
        shape = options["clips"] * options["crops"], options["frames"], size, size, 3
        count = max(1, min(2 * workers, AHEAD_BYTES // torch.Size(shape).numel()))
        self.shape = count, *shape
        # nameless: gone with the last process that maps it, however that ends
        self.memory = _nameless_memory(torch.Size(self.shape).numel())
        self.slots = torch.frombuffer(mmap.mmap(self.memory, 0), dtype=torch.uint8).view(self.shape)
        self.free = list(range(count))
        self.answers: dict[int, tuple[int, dict[str, Any]]] = {}
        self.next = 0
        self.closed = False
        self.fault: BaseException | None = None
        self.changed = threading.Condition()
        self.running: set[_Worker] = set()
        self.threads = [threading.Thread(target=self._serve, daemon=True) for _ in range(min(workers, count))]
        for thread in self.threads:
            thread.start()

    def wait_for(self, number: int) -> tuple[int, dict[str, Any]]:
        """The slot and the answer of a file."""
        with self.changed:
            self.changed.wait_for(lambda: number in self.answers or self.fault is not None)
            if self.fault is not None:
                raise self.fault
            return self.answers.pop(number)

    def release(self, slot: int) -> None:
        """Let the next file have a slot."""
        with self.changed:
            self.free.append(slot)
            self.changed.notify_all()

    def close(self) -> None:
        """End all processes and wait until they are gone."""
        with self.changed:
            self.closed = True
            for worker in self.running:
                worker.kill()
            self.changed.notify_all()
        for thread in self.threads:
            thread.join()
        os.close(self.memory)

    def _serve(self) -> None:
        worker = None
        try:
            while (job := self._job()) is not None:
                number, slot = job
                worker = worker or self._start()
                answer = worker.decode(self.paths[number], slot)
                if answer is None:
                    answer = {"error": worker.end(self.paths[number])}
                with self.changed:
                    if worker.process.returncode is not None:
                        self.running.discard(worker)
                        worker = None
                    self.answers[number] = slot, answer
                    self.changed.notify_all()
        except BaseException as error:
            with self.changed:
                self.fault = error
                self.changed.notify_all()
        finally:
            if worker is not None:
                worker.end("")

    def _job(self) -> tuple[int, int] | None:
        with self.changed:
            self.changed.wait_for(lambda: self.free or self.closed or self.next == len(self.paths))
            if self.closed or self.next == len(self.paths):
                return None
            self.next += 1
            return self.next - 1, self.free.pop()

    def _start(self) -> _Worker:
        worker = _Worker(self.memory, self.timeout)
        with self.changed:
            self.running.add(worker)
            if self.closed:
                worker.kill()
        worker.prepare(
            {
                "path": sys.path,
                "memory": self.memory,
                "shape": self.shape,
                "options": self.options,
                "seconds": self.timeout,
            }
        )
        return worker


class _Worker:
    """A process that decodes, with whatever processes it starts itself."""

    def __init__(self, memory: int, timeout: float) -> None:
        self.timeout, self.late, self.lock = timeout, False, threading.Lock()
        self.process = subprocess.Popen(
            [sys.executable, str(_WORKER)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            pass_fds=[memory],
            # its own group: ctrl-c in a terminal is the parent's to handle, and decoders are ended with it
            start_new_session=True,
            env={**os.environ, "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
        )

    def prepare(self, work: dict[str, Any]) -> None:
        """Describe the work, and wait until the process is ready."""
        answer = self._ask(work, _START_SECONDS)
        if answer is None or "fault" in answer:
            self.end("")
            reason = answer["fault"].strip().splitlines()[-1] if answer else _status(self.process.returncode)
            raise InputError(f"a process that decodes videos does not start ({reason}): decode in this one, 0 workers")

    def decode(self, path: str, slot: int) -> dict[str, Any] | None:
        """The answer for a file, or None when the process ended or was ended."""
        return self._ask({"file": path, "slot": slot}, self.timeout)

    def kill(self) -> None:
        """End the process and those it started."""
        with self.lock, suppress(ProcessLookupError):
            # a process that is not yet waited for keeps its number
            if self.process.returncode is None:
                os.killpg(self.process.pid, signal.SIGKILL)

    def end(self, path: str) -> str:
        """Make sure that the process is gone; what happened to it, in a line."""
        # one that died by itself keeps its status
        self.kill()
        with self.lock:
            self.process.wait()
        pipes: Any = self.process.stdin, self.process.stdout
        for pipe in pipes:
            with suppress(OSError):
                pipe.close()
        if self.late:
            return f"{path}: decoding was stopped after {self.timeout:g} seconds: give another file, or more time"
        return f"{path}: the decoder crashed ({_status(self.process.returncode)}): the file is damaged, give another"

    def _ask(self, question: dict[str, Any], seconds: float) -> dict[str, Any] | None:
        pipes: Any = self.process.stdin, self.process.stdout
        timer = threading.Timer(seconds, self._stop)
        timer.daemon = True
        timer.start()
        try:
            pipes[0].write(json.dumps(question).encode() + b"\n")
            pipes[0].flush()
            answer: dict[str, Any] = json.loads(pipes[1].readline())
            return answer
        except (OSError, ValueError):
            return None
        finally:
            timer.cancel()

    def _stop(self) -> None:
        self.late = True
        self.kill()


def _status(code: int | None) -> str:
    if code is not None and code < 0:
        with suppress(ValueError):
            return signal.Signals(-code).name
    return f"exit status {code}"


def _nameless_memory(size: int) -> int:
    if hasattr(os, "memfd_create"):
        memory = os.memfd_create("xclip_fast")
    else:
        with tempfile.TemporaryFile() as file:
            memory = os.dup(file.fileno())
    os.ftruncate(memory, size)
    return memory
