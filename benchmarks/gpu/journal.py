"""The record of one part: written whole after each case, so that a run that is cut off still counts and can go on."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterable, Iterator
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from xclip_fast.files import replacing

LOST = 3  # exit code of a process whose CUDA context is of no more use
PATIENCE = 2  # a case that was killed for want of time as often is not begun again


class Journal:
    """Cases of one part by name, in a JSON file.

    Args:
        path: the file; cases that an earlier run finished are read from it.
        facts: what identifies the machine and the code; a file with others is started anew.
        deadline: seconds that the part may take.
    """

    def __init__(self, path: Path, facts: dict[str, Any], deadline: float) -> None:
        self.path = path
        self.end = time.monotonic() + deadline
        self.content: dict[str, Any] = {"facts": facts, "complete": False, "killed": [], "cases": {}}
        before = _read(path)
        if before.get("facts") == facts:
            self.content["cases"] = before["cases"]
            self.content["killed"] = before.get("killed", [])
            if crashed := before.get("running"):
                self.cases[crashed] = {"status": "failed", "reason": "the process crashed"}
        self.write()

    @property
    def cases(self) -> dict[str, Any]:
        """Name of each finished case to what was found."""
        found: dict[str, Any] = self.content["cases"]
        return found

    @property
    def left(self) -> float:
        """Seconds until the deadline."""
        return self.end - time.monotonic()

    def todo(self, names: Iterable[str]) -> Iterator[str]:
        """The cases that no run has finished, one after the other, until the deadline has passed."""
        names = list(names)
        for name in names:
            if name in self.cases:
                continue
            if self.left <= 0:
                return
            yield name

    def start(self, name: str, seconds: float | None = None) -> None:
        """Say which case runs in this very process: should it crash, the next process begins after it.

        ``seconds`` is what it may take at most; whoever watches ends it then.
        """
        self.content["running"] = name
        self.clock(seconds)

    def clock(self, seconds: float | None) -> None:
        """Give the case that runs so many seconds from now on, or all there are."""
        self.content["until"] = None if seconds is None else time.time() + seconds
        self.write()

    def add(self, name: str, found: dict[str, Any]) -> None:
        """Keep what a case found."""
        self.content.pop("running", None)
        self.cases[name] = {"utc": datetime.now(timezone.utc).isoformat(timespec="seconds"), **found}
        self.write()

    def finish(self, names: Iterable[str]) -> bool:
        """Say in the file whether all these cases are done, and return it."""
        self.content["complete"] = all(name in self.cases for name in names)
        self.write()
        return bool(self.content["complete"])

    def write(self) -> None:
        """Replace the file in one step."""
        write_json(self.path, self.content)


def forgive(path: Path) -> None:
    """After a process was killed at its deadline: the case it was at did not crash, and the next run begins it anew."""
    content = _read(path)
    if name := content.get("running"):
        content.setdefault("killed", []).append(name)
        if content["killed"].count(name) < PATIENCE:
            del content["running"]
        write_json(path, content)


def give_up(path: Path, reason: str) -> None:
    """After a process was killed over a case that took too long: the case has failed, and the next run passes by it."""
    content = _read(path)
    if name := content.pop("running", None):
        content.setdefault("cases", {})[name] = {"status": "failed", "reason": reason}
        write_json(path, content)


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Replace a file in one step."""
    with replacing(path) as temporary:
        temporary.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


def leave_if_lost() -> None:
    """End this process where an illegal access has cost it its GPU; the next one begins after what is recorded."""
    import torch

    if not torch.cuda.is_initialized():
        return
    try:
        torch.cuda.synchronize()
    except RuntimeError:
        os._exit(LOST)


def _read(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}
