"""Jobs done ahead in processes of their own, in order, into shared memory: what all decoding of many files runs on."""

from __future__ import annotations

import logging
import mmap
import os
import threading
from collections.abc import Callable, Generator, Iterable, Iterator
from dataclasses import asdict, dataclass, field
from time import perf_counter
from typing import Any

import torch
from torch import Tensor

from xclip_fast.errors import InputError, is_out_of_memory
from xclip_fast.video.members import Member, Source, nameless_memory
from xclip_fast.video.process import Process
from xclip_fast.video.source import display_name

DEADLINE_SECONDS = 300.0
MOST_SECONDS = 86400.0
AHEAD_BYTES = 1 << 30  # of views that wait for the model, but for at least one file

_log = logging.getLogger("xclip_fast")


@dataclass(frozen=True)
class Candidate:
    """A file that a job may use, and the options of the loader that are its own, ready for JSON."""

    source: Source
    options: dict[str, Any] = field(default_factory=dict)


@dataclass
class Answer:
    """What became of a job.

    used: the candidate decoded, None where none could be.
    views: what the loader made of it, valid until the next step.
    failures: the candidates that failed before it, and why.
    seconds: time spent on all of them by the process that decodes.
    """

    used: Candidate | None = None
    views: Tensor | None = None
    failures: list[tuple[Source, InputError]] = field(default_factory=list)
    seconds: float = 0.0
    log: list[tuple[int, str]] = field(default_factory=list)
    fault: str | None = None


def decode_jobs(
    jobs: Iterable[Iterable[Candidate]],
    load: Callable[..., Tensor],
    options: dict[str, Any],
    shape: tuple[int, ...],
    *,
    workers: int,
    timeout: float = DEADLINE_SECONDS,
    ahead: int = 0,
    failed: Callable[[Source, InputError], object] = lambda source, error: None,
) -> Generator[Answer, None, None]:
    """Of each job the first candidate that decodes, in the order of the jobs.

    Args:
        jobs: read as far ahead as there is room for, by other threads, one at a time. So are a job's candidates, while
            it is worked on.
        load: a function of a module; called with a source, ``options`` and those of the candidate, it gives the views.
        options: ready for JSON.
        shape: of the views.
        workers, timeout: as for ``decode_files``.
        ahead: jobs that may be done before they are asked for, at least two for each process.
        failed: told of each candidate that cannot be used, at once and by other threads.

    Raises:
        InputError: the processes do not start.
        RuntimeError: the loader failed in a way that is no fault of the file.
        ValueError: a number is out of range.
    """
    if workers < 0:
        raise ValueError(f"workers must be 0 or more, found {workers}")
    if not 0 < timeout <= MOST_SECONDS:
        raise ValueError(f"timeout must be more than 0 seconds and at most {MOST_SECONDS:g}, found {timeout}")
    if workers and os.name != "posix":
        raise ValueError(f"{workers} workers were asked for, but this system has no way to share memory: use 0")
    if workers:
        return _decode_ahead(_Pool(iter(jobs), load, options, shape, workers, timeout, ahead, failed))
    return _decode_here(jobs, load, options, failed)


def load_or_error(load: Callable[..., Tensor], source: Source, options: dict[str, Any]) -> Tensor | InputError:
    """What a loader gives for a file, or why it cannot be used."""
    try:
        return load(source, **options)
    except InputError as error:
        return error
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        return InputError(f"{display_name(source)}: not enough memory to decode it: use fewer views or frames")


def _decode_here(
    jobs: Iterable[Iterable[Candidate]],
    load: Callable[..., Tensor],
    options: dict[str, Any],
    failed: Callable[[Source, InputError], object],
) -> Generator[Answer, None, None]:
    for job in jobs:
        answer = Answer()
        for candidate in job:
            start = perf_counter()
            found = load_or_error(load, candidate.source, {**options, **candidate.options})
            answer.seconds += perf_counter() - start
            if isinstance(found, Tensor):
                answer.used, answer.views = candidate, found
                break
            answer.failures.append((candidate.source, found))
            failed(candidate.source, found)
        yield answer


def _decode_ahead(pool: _Pool) -> Generator[Answer, None, None]:
    said: set[str] = set()
    try:
        pool.start()
        while (found := pool.next_answer()) is not None:
            slot, answer = found
            tried = [answer.used.source] if answer.used else []
            names = [str(source) for source in (*tried, *(source for source, _ in answer.failures))]
            for level, message in answer.log:
                # what each process says of no file in particular is said once
                if message not in said or any(name in message or ascii(name) in message for name in names):
                    _log.log(level, "%s", message)
                said.add(message)
            if answer.fault is not None:
                raise RuntimeError(f"{answer.fault}")
            if answer.used is not None:
                answer.views = pool.slots[slot]
            yield answer
            pool.release(slot)
    finally:
        pool.close()


class _Pool:
    """A thread for each process; slots of shared memory bound how far they run ahead."""

    def __init__(
        self,
        jobs: Iterator[Iterable[Candidate]],
        load: Callable[..., Tensor],
        options: dict[str, Any],
        shape: tuple[int, ...],
        workers: int,
        timeout: float,
        ahead: int,
        failed: Callable[[Source, InputError], object],
    ) -> None:
        self.jobs, self.timeout, self.failed = jobs, timeout, failed
        self.count = max(1, min(max(2 * workers, ahead), AHEAD_BYTES // torch.Size(shape).numel()))
        self.shape = torch.Size((self.count, *shape))
        self.work = {"shape": self.shape, "load": (load.__module__, load.__name__), "options": options}
        self.workers = min(workers, self.count)
        self.free = list(range(self.count))
        self.answers: dict[int, tuple[int, Answer]] = {}
        self.taken = self.given = 0
        self.exhausted = self.closed = False
        self.fault: BaseException | None = None
        self.changed = threading.Condition()
        self.running: set[Process] = set()
        self.threads: list[threading.Thread] = []

    def start(self) -> None:
        """Make the memory and start the threads."""
        # nameless: gone with the last process that maps it, however that ends
        self.memory = nameless_memory(self.shape.numel())
        self.slots = torch.frombuffer(mmap.mmap(self.memory, 0), dtype=torch.uint8).view(self.shape)
        self.threads = [threading.Thread(target=self._serve, daemon=True) for _ in range(self.workers)]
        for thread in self.threads:
            thread.start()

    def next_answer(self) -> tuple[int, Answer] | None:
        """The slot and the answer of the next job, or None when there are no more."""
        with self.changed:
            self.changed.wait_for(
                lambda: (
                    self.given in self.answers
                    or self.fault is not None
                    or (self.exhausted and self.given == self.taken)
                )
            )
            if self.fault is not None:
                raise self.fault
            if self.given not in self.answers:
                return None
            self.given += 1
            return self.answers.pop(self.given - 1)

    def release(self, slot: int) -> None:
        """Let the next job have a slot."""
        with self.changed:
            self.free.append(slot)
            self.changed.notify_all()

    def close(self) -> None:
        """End all processes and wait until they are gone."""
        with self.changed:
            self.closed = True
            for process in self.running:
                process.kill()
            self.changed.notify_all()
        for thread in self.threads:
            thread.join()
        if self.threads:
            os.close(self.memory)

    def _serve(self) -> None:
        desk = _Desk(self)
        try:
            while (job := self._take()) is not None:
                number, slot, candidates = job
                answer = desk.answer(candidates, slot)
                with self.changed:
                    self.answers[number] = slot, answer
                    self.changed.notify_all()
        except BaseException as error:
            with self.changed:
                self.fault = error
                self.changed.notify_all()
        finally:
            desk.leave()

    def _take(self) -> tuple[int, int, Iterable[Candidate]] | None:
        with self.changed:
            self.changed.wait_for(lambda: self.free or self.closed or self.exhausted)
            if self.closed or self.exhausted:
                return None
            candidates = next(self.jobs, None)
            if candidates is None:
                self.exhausted = True
                self.changed.notify_all()
                return None
            self.taken += 1
            return self.taken - 1, self.free.pop(), candidates


class _Desk:
    """Where one thread works through its jobs, with one process at a time."""

    def __init__(self, pool: _Pool) -> None:
        self.pool = pool
        self.process: Process | None = None

    def answer(self, candidates: Iterable[Candidate], slot: int) -> Answer:
        """The first candidate that decodes."""
        answer = Answer()
        for candidate in candidates:
            source = candidate.source
            named = list(asdict(source).values()) if isinstance(source, Member) else source
            found = self._decode({"source": named, "slot": slot, "options": candidate.options}, answer)
            answer.log += found.get("log", ())
            if "fault" in found:
                answer.fault = f"{str(source)!a}: decoding failed\n{found['fault']}"
                break
            if "error" not in found and "ended" not in found:
                answer.used = candidate
                break
            reason = found.get("error") or f"{display_name(source)}: {found['ended']}"
            error = InputError(reason)
            answer.failures.append((source, error))
            if self.pool.closed:
                break
            self.pool.failed(source, error)
        return answer

    def leave(self) -> None:
        """End the process."""
        if self.process is not None:
            with self.pool.changed:
                self.pool.running.discard(self.process)
            self.process.end()
            self.process = None

    def _decode(self, job: dict[str, Any], answer: Answer) -> dict[str, Any]:
        # one that dies is asked again: the system may have killed it, which is no fault of the file
        for _ in range(2):
            process = self.process = self.process or self._start()
            start = perf_counter()
            found = process.decode(job)
            answer.seconds += perf_counter() - start
            if found is not None:
                return found
            said = process.end()
            self.leave()
            if process.late or self.pool.closed:
                break
        return {"ended": said}

    def _start(self) -> Process:
        pool = self.pool
        process = Process(pool.memory, pool.timeout)
        with pool.changed:
            pool.running.add(process)
            if pool.closed:
                process.kill()
        process.prepare({"memory": pool.memory, **pool.work})
        return process
