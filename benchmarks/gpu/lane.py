"""One lane of a window in this process: ``python -m benchmarks.gpu.lane MODULE LANE FOLDER``.

A lane is a list of cases that share what they build: a model, an engine. Each is recorded before it starts, with the
time it may take, and as soon as it ends; whoever started the lane ends it when that time has passed, and starts it
again after the case.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import re
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from typing import Any, TypeVar

from benchmarks.gpu import standin
from benchmarks.gpu.journal import Journal, leave_if_lost
from benchmarks.gpu.lock import Turns

FACTS = "facts.json"  # of the run: its commit and machine, written by whoever starts the lanes
IMPORTS = "imports"  # what a lane is at before its first case
OVER = "over"  # of a lane that is not started again
KERNELS = "kernels"  # what a case has asked Triton for: names and keys, compiled or found
PASSED, WRONG, FAILED, RAN = "passed", "wrong", "failed", "ran"
TOOLS = ("memcheck", "racecheck")  # of compute-sanitizer, and the lanes that run them
UNAVAILABLE = "unavailable"  # a tool that this machine does not let work
PATIENCE = 60  # a rehearsal compiles on few cores what sixteen do on a GPU's machine: that many times as long

Found = dict[str, Any]
Made = TypeVar("Made")


@dataclass
class Desk:
    """What the cases of a lane work with.

    Attributes:
        folder: of the window, where the lanes' records and locks are.
        record: of this lane.
        commit: of the code.
        lanes: all that the window has.
        tiny: the smallest shapes, to try the code itself.
        judged: whether numbers mean something; on the stand-in nothing is computed.
        turns: who has the GPU.
    """

    folder: Path
    record: Path
    commit: str
    lanes: tuple[str, ...]
    tiny: bool
    judged: bool
    turns: Turns
    _kept: dict[str, Any] = field(default_factory=dict)

    def keep(self, name: str, make: Callable[[], Made]) -> Made:
        """What an earlier case of this process made under this name, or what ``make`` gives now."""
        if name not in self._kept:
            self._kept[name] = make()
        found: Made = self._kept[name]
        return found

    def kept(self, name: str) -> Any:
        """What was made under this name in this process, or None."""
        return self._kept.get(name)

    def wait_while(self, busy: Callable[[str], bool]) -> None:
        """Wait until no other lane is at a case of which this is true; one that has not begun is at its imports."""
        self.turns.waiting(True)
        while any(busy(name) for name in self._elsewhere()):
            time.sleep(0.2)
        self.turns.waiting(False)

    def _elsewhere(self) -> Iterator[str]:
        """What each other lane is at, one that has not begun at its imports; those that are over are left out."""
        for lane in self.lanes:
            path = record_of(self.folder, lane)
            content = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
            if path != self.record and not content.get(OVER):
                yield content.get("running", IMPORTS)

    def verdict(self, right: bool) -> str:
        """The status of a case that has run to its end."""
        return RAN if not self.judged else PASSED if right else WRONG


@dataclass(frozen=True)
class Task:
    """A case: how many seconds it may take, the wait for its turn not counted, and what it does."""

    seconds: float
    run: Callable[[], Found]


def main() -> int:
    """Run what no earlier process of this lane has finished."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu.lane", description=__doc__)
    parser.add_argument("module", help="with a function tasks(lane, desk)")
    parser.add_argument("lane")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--tiny", action="store_true")
    options = parser.parse_args()
    folder: Path = options.folder
    rehearsed = standin.in_force()
    given = json.loads((folder / FACTS).read_text(encoding="utf-8"))
    record = record_of(folder, options.lane)
    lanes = tuple(given["lanes"])
    journal = Journal(record, given["facts"], given["end"] - time.time())
    # whoever waits for others has its whole time when they are done; a cold disk is no fault of the imports
    limits: dict[str, float] = {}
    turns = Turns(folder, lambda begins: journal.clock(None if begins else limits.get(journal.content["running"])))
    desk = Desk(folder, record, given["facts"]["commit"], lanes, options.tiny, not rehearsed, turns)
    journal.start(IMPORTS)
    start = time.monotonic()
    if rehearsed:
        standin.enter()
    tasks: dict[str, Task] = import_module(options.module).tasks(options.lane, desk)
    compiled = _watch_triton()
    journal.content["imports"] = round(time.monotonic() - start, 1)
    limits |= {name: task.seconds * (PATIENCE if rehearsed else 1) for name, task in tasks.items()}
    for name in journal.todo(tasks):
        journal.start(name, limits[name])
        start, busy, before = time.monotonic(), time.process_time(), standin.counts() if rehearsed else {}
        try:
            found = tasks[name].run()
        except Exception as error:
            found = {"status": FAILED, "reason": last_line(error)}
        found |= {"seconds": round(time.monotonic() - start, 2), "cpu_s": round(time.process_time() - busy, 2)}
        found[KERNELS] = list(compiled)
        compiled.clear()
        if rehearsed:
            found["counted"] = {what: count - before[what] for what, count in standin.counts().items()}
            found["counted"]["captured"] = standin.counts()["captured"]
        found["reserved_gb"] = round(_freed() / 1e9, 2)
        journal.add(name, found)
        leave_if_lost()
    journal.content[OVER] = True
    journal.finish(tasks)
    return 0


def record_of(folder: Path, lane: str) -> Path:
    """The file of a lane."""
    return folder / f"{re.sub('[^A-Za-z0-9]+', '-', lane)}.lane.json"


def last_line(error: BaseException) -> str:
    """What an exception says, in one line."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    # compilers say what is wrong at the end, others at the start
    said = " ... ".join(dict.fromkeys([*lines[:1], *lines[-1:]]))
    return f"{type(error).__name__}: {said}"[:400]


def _freed() -> int:
    """The most memory that a case has held, in bytes; what it holds no longer is there for other lanes."""
    import torch

    if not torch.cuda.is_initialized():
        return 0
    try:
        held = torch.cuda.max_memory_reserved()
        gc.collect()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    except RuntimeError:
        # the GPU is lost to this process, which the next step finds out
        return 0
    return held


def _watch_triton() -> list[dict[str, Any]]:
    """A list that gets every kernel that Triton compiles in this process or finds in its cache."""
    from triton import knobs

    seen: list[dict[str, Any]] = []

    def listen(*, src: Any, metadata: Any, metadata_group: Any, times: Any, cache_hit: bool) -> None:
        seen.append({"kernel": metadata["name"], "hash": metadata["hash"], "found": cache_hit})

    knobs.compilation.listener = listen
    return seen


if __name__ == "__main__":
    code = main()
    sys.stdout.flush()
    # threads of compilers and libraries have nothing left to say
    os._exit(code)
