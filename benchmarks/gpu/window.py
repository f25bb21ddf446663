"""``python -m benchmarks.gpu --window check`` and ``--window figures``: all that a few minutes on a GPU can tell.

Lanes run side by side, each a process of its own; whoever measures has the GPU alone. A case that hangs, crashes or
loses its GPU costs itself: its lane is started again after it. What is known stands in one file, written anew after
each case, and in one table at the end.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from tempfile import mkdtemp
from typing import Any

from benchmarks.gpu import kit, standin, verdict
from benchmarks.gpu.journal import give_up, write_json
from benchmarks.gpu.lane import FACTS, IMPORTS, OVER, record_of
from benchmarks.gpu.prepare import ROOT

MODULES = {"check": "benchmarks.gpu.check", "figures": "benchmarks.gpu.figures"}
# seconds of a whole window, from the first line to the table
SECONDS = {"check": 170.0, "figures": 400.0}
# the first get the cores first, should there be few of them
LANES = {
    "check": (
        *("B/16", "B/32", "L/14"),
        *("ops 1", "ops 2", "ops 3", "ops 4"),
        *("extension", "compile", "memcheck", "racecheck"),
    ),
    "figures": (
        *("B/16 x8", "B/32 x1", "L/14 x8", "B/16 x1", "B/32 x8"),
        *("kernels", "train: B/16 x8", "train layers: B/16 x8", "B/16 x32", "B/32 x32", "L/14 x1", "L/14 x32"),
        *("max-autotune: B/16 x8", "eager", "L/14-336 x8"),
    ),
}
TINY = {
    "check": ("tiny", "ops 1", "extension"),
    "figures": ("tiny x1", "kernels", "train: tiny x1", "train layers: tiny x1", "max-autotune: tiny x1", "eager"),
}
RESTARTS = 8  # of one lane
WIDTH = max(4, os.cpu_count() or 1)  # lanes at once: each has a core, and a machine of few has little memory too
POLL = 0.1
PATIENCE = 5.0  # seconds for a killed process to go: one whose kernel hangs may stay in the driver
GRACE = 5.0  # of the whole, for the table


@dataclass
class _Lane:
    """A running lane."""

    name: str
    record: Path
    process: subprocess.Popen[bytes] | None = None
    restarts: int = 0
    finished: bool = False


def run(window: str, out: Path, *, dry: bool = False, tiny: bool = False, seconds: float | None = None) -> int:
    """Run a window; 0 where every case ran to its end and none was wrong.

    Args:
        window: of ``LANES``.
        out: folder that gets ``WINDOW.json``.
        dry: rehearse on the stand-in.
        tiny: the smallest shapes and fewest lanes.
        seconds: instead of ``SECONDS``.

    Raises:
        OSError: it is to be rehearsed, and the stand-in cannot be built.
    """
    start = time.time()
    end = start + (seconds or SECONDS[window])
    settings = standin.environment(standin.build()) if dry else {}
    folder = Path(mkdtemp(prefix=f"{window}-"))
    try:
        settings |= {"TORCHINDUCTOR_CACHE_DIR": str(folder / "inductor"), "TORCHINDUCTOR_COMPILE_THREADS": "2"}
        names = (TINY if tiny else LANES)[window]
        # a thread a core for all lanes together: those that wait for one another keep the cores busy (with sixteen
        # threads in each of eleven lanes on sixteen cores, work of 16 s took more than 60)
        settings["OMP_NUM_THREADS"] = str(max(1, (os.cpu_count() or 1) // len(names)))
        prepared = kit.prepare(kit.KIT, carry=not dry)
        settings["TRITON_CACHE_DIR"] = prepared.pop("cache")
        for line in prepared["said"]:
            print(line, flush=True)
        head = {"facts": prepared["facts"], "window": window, "rehearsed": dry, "kit": prepared, "limit_s": end - start}
        write_json(folder / FACTS, {"facts": prepared["facts"], "end": end - GRACE, "lanes": names})
        before = kit.entries(Path(settings["TRITON_CACHE_DIR"]))
        lanes = [_Lane(name, record_of(folder, name)) for name in names]
        _watch(window, lanes, out, head, os.environ | settings, end - GRACE, tiny=tiny)
        head["kit"]["compiled_here"] = len(kit.entries(Path(settings["TRITON_CACHE_DIR"])) - before)
        head["wall_s"] = round(time.time() - start, 1)
        content = _merge(out / f"{window}.json", lanes, head)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    try:
        print(verdict.table(out, content), flush=True)
    except (KeyError, TypeError, ValueError) as error:
        # the figures are worth more than their table
        print(f"error: no table of {out / window}.json: {type(error).__name__}: {error}", flush=True)
        return 1
    return 0 if verdict.sound(content) else 1


def _watch(
    window: str,
    lanes: list[_Lane],
    out: Path,
    head: dict[str, Any],
    settings: dict[str, str],
    end: float,
    *,
    tiny: bool,
) -> None:
    """Keep the lanes running until all are finished or the time is over; the record is written as they go on."""
    written = 0.0
    try:
        while time.time() < end and not all(lane.finished for lane in lanes):
            for lane in lanes:
                running = sum(one.process is not None for one in lanes)
                if lane.process is not None or running < WIDTH:
                    _look_after(window, lane, settings, tiny)
            changed = max((lane.record.stat().st_mtime for lane in lanes if lane.record.exists()), default=0.0)
            if changed > written:
                written = changed
                _merge(out / f"{window}.json", lanes, head)
            time.sleep(POLL)
    finally:
        for lane in lanes:
            if lane.process is not None:
                _kill(lane.process)
                give_up(lane.record, "the window was over")


def _look_after(window: str, lane: _Lane, settings: dict[str, str], tiny: bool) -> None:
    """Start a lane; end a case that takes too long, and start the lane again after one that ended its process."""
    if lane.finished:
        return
    if lane.process is None or lane.process.poll() is not None:
        code = None if lane.process is None else lane.process.returncode
        # one that could not even begin will not begin the next time
        hopeless = IMPORTS in _read(lane.record).get("cases", {})
        if code == 0 or hopeless or lane.restarts > RESTARTS:
            lane.finished, lane.process = True, None
            write_json(lane.record, _read(lane.record) | {OVER: True})
            return
        if code is not None:
            print(f"  {lane.name}: a process ended with code {code}", flush=True)
            give_up(lane.record, f"the process ended with code {code}")
            lane.restarts += 1
        command = [sys.executable, "-m", "benchmarks.gpu.lane", MODULES[window], lane.name, str(lane.record.parent)]
        command += ["--tiny"] if tiny else []
        with lane.record.with_suffix(".log").open("ab") as log:
            streams = {"stdin": subprocess.DEVNULL, "stdout": log, "stderr": log}
            lane.process = subprocess.Popen(command, cwd=ROOT, env=settings, start_new_session=True, **streams)  # type: ignore[call-overload]
        return
    content = _read(lane.record)
    until = content.get("until")
    if content.get("running") and until is not None and time.time() > until:
        _kill(lane.process)
        give_up(lane.record, "it took longer than it may, and was ended")
        print(f"  {lane.name}: {content['running']} took too long", flush=True)
        lane.restarts += 1
        lane.process = None


def _kill(process: subprocess.Popen[bytes]) -> None:
    """End a process and all that it has started, also what has a session of its own."""
    for one in _family(process.pid)[::-1]:
        with suppress(ProcessLookupError):
            os.kill(one, signal.SIGKILL)
    with suppress(subprocess.TimeoutExpired):
        process.wait(PATIENCE)


def _family(process: int) -> list[int]:
    """A process and its descendants, parents first."""
    children: dict[int, list[int]] = {}
    for path in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError):
            # the name in front may hold anything
            parent = int(path.read_text().rpartition(")")[2].split()[1])
            children.setdefault(parent, []).append(int(path.parent.name))
    found = [process]
    for one in found:
        found += children.get(one, [])
    return found


def _merge(path: Path, lanes: list[_Lane], head: dict[str, Any]) -> dict[str, Any]:
    """The records of all lanes in one file."""
    content: dict[str, Any] = head | {"lanes": {}, "cases": {}}
    for lane in lanes:
        found = _read(lane.record)
        content["cases"] |= found.get("cases", {})
        log = lane.record.with_suffix(".log")
        said = log.read_text(encoding="utf-8", errors="replace")[-1500:] if log.exists() else ""
        content["lanes"][lane.name] = {
            "complete": found.get("complete", False),
            "restarts": lane.restarts,
            "imports_s": found.get("imports"),
            "log": said if lane.restarts or not found else "",
        }
    write_json(path, content)
    return content


def _read(path: Path) -> dict[str, Any]:
    try:
        found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found
