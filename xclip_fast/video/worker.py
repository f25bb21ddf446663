"""Decodes files in a process of its own, for ``xclip_fast.video.process``: started as a script, never imported.

It reads lines of JSON, first a description of the work and then a job a line, writes the views of each file into
memory shared with the parent, and answers with a line. It dies with its parent.
"""

from __future__ import annotations

import importlib
import json
import logging
import mmap
import os
import queue
import signal
import sys
import threading
import traceback
from contextlib import suppress
from typing import Any, BinaryIO

_GRACE_SECONDS = 10  # the parent's own deadline comes first


def _claim_output() -> BinaryIO:
    """The pipe to the parent; decoders may write what they like to the old outputs."""
    out = os.fdopen(os.dup(1), "wb")
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 1)
    os.dup2(nowhere, 2)
    return out


def _read_lines(lines: queue.SimpleQueue[str]) -> None:
    for line in sys.stdin:
        lines.put(line)
    # the parent is gone or wants no more: a decoder that hangs must not stay, nor a process it started
    os.killpg(0, signal.SIGKILL)


class _Records(logging.Handler):
    """Keeps log records for the parent."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.kept: list[tuple[int, str]] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.kept.append((record.levelno, record.getMessage()))


def _limit_dump() -> None:
    with suppress(ImportError, ValueError, OSError):
        import resource

        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))


def _decode(load: Any, source: Any, views: Any, options: dict[str, Any]) -> dict[str, Any]:
    from xclip_fast.video.jobs import load_or_error
    from xclip_fast.video.members import Member

    try:
        found = load_or_error(load, Member(*source) if isinstance(source, list) else source, options)
    except Exception:
        return {"fault": traceback.format_exc()}
    if isinstance(found, Exception):
        return {"error": str(found)}
    views.copy_(found)
    return {}


def main() -> None:
    """Serve the parent until it closes the pipe."""
    out = _claim_output()
    lines: queue.SimpleQueue[str] = queue.SimpleQueue()
    threading.Thread(target=_read_lines, args=(lines,), daemon=True).start()
    _limit_dump()

    def send(answer: dict[str, Any]) -> None:
        out.write(json.dumps(answer).encode() + b"\n")
        out.flush()

    work = json.loads(lines.get())
    try:
        # as the parent found its modules, and not in the folder of this script
        sys.path[:] = work["path"]
        import torch

        import xclip_fast.video.jobs  # noqa: F401

        load = getattr(importlib.import_module(work["load"][0]), work["load"][1])
        torch.set_num_threads(1)
        shared = mmap.mmap(work["memory"], 0)
        slots = torch.frombuffer(shared, dtype=torch.uint8).view(work["shape"])
        records = _Records()
        logging.getLogger("xclip_fast").addHandler(records)
    except Exception:
        send({"fault": traceback.format_exc()})
        os._exit(1)
    send({})
    while True:
        job = json.loads(lines.get())
        # by default this signal ends the process, even where a decoder never gives the interpreter back
        signal.alarm(int(work["seconds"]) + _GRACE_SECONDS)
        answer = _decode(load, job["source"], slots[job["slot"]], {**work["options"], **job["options"]})
        signal.alarm(0)
        send({**answer, "log": records.kept})
        records.kept = []


if __name__ == "__main__":
    main()
