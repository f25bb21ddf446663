"""What a run leaves for people: a line a step, curves, and all it takes to repeat it."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from xclip_fast.errors import InputError
from xclip_fast.files import parse_json, replacing

LOG, RUN = "log.jsonl", "run.json"
_CURVES = {
    "loss.svg": ("loss", "loss"),
    "accuracy.svg": ("top1", "validation top-1"),
}


class RunLog:
    """The log of a run: JSON lines, and accelerate's trackers beside them.

    Args:
        folder: of the run.
        step: steps made so far; later lines of an earlier try are dropped, for they will be made again.
        track: called with numbers by name, and the step.

    Example:
        >>> from pathlib import Path
        >>> from xclip_fast.train.log import RunLog, read_log
        >>> log = RunLog(Path("."), step=0)
        >>> log.add(1, loss=2.5)
        >>> log.close()
        >>> read_log(Path("log.jsonl"))
        [{'step': 1, 'loss': 2.5}]
    """

    def __init__(self, folder: Path, step: int, track: Callable[[dict[str, float], int], None] | None = None) -> None:
        self.folder = folder
        self.track = track or (lambda values, step: None)
        path = folder / LOG
        kept = [line for line in read_log(path) if line.get("step", 0) <= step]
        with replacing(path) as temporary:
            temporary.write_text("".join(f"{json.dumps(line)}\n" for line in kept), encoding="utf-8")
        self.file = path.open("a", encoding="utf-8")

    def add(self, step: int, **values: Any) -> None:
        """Write the line of a step: what is worth keeping, numbers to the trackers too."""
        try:
            self.file.write(json.dumps({"step": step, **values}, allow_nan=False) + "\n")
            self.file.flush()
        except OSError as error:
            raise InputError(f"cannot write {str(self.folder / LOG)!r}: {error.strerror}: make room") from error
        self.track({name: value for name, value in values.items() if isinstance(value, int | float)}, step)

    def close(self) -> None:
        """End the log and draw its curves."""
        self.file.close()
        lines = read_log(self.folder / LOG)
        for name, (key, title) in _CURVES.items():
            points = [(line["step"], line[key]) for line in lines if key in line]
            if points:
                with replacing(self.folder / name) as temporary:
                    temporary.write_bytes(_curve(points, title))


def read_log(path: Path) -> list[dict[str, Any]]:
    """The lines of a log; a last one that was cut off is left out."""
    lines: list[dict[str, Any]] = []
    if path.exists():
        for line in path.read_text(encoding="utf-8").splitlines():
            try:
                lines.append(parse_json(line, str(path)))
            except InputError:
                break
    return lines


def write_run(folder: Path, settings: dict[str, Any], data: dict[str, Any], device: str, processes: int) -> None:
    """What it takes to repeat a run: settings, command, data, machine and versions."""
    from xclip_fast.bench.machine import facts

    run = {
        "command": ["xclip-fast", *sys.argv[1:]] if Path(sys.argv[0]).stem == "xclip-fast" else None,
        "settings": settings,
        "data": data,
        "processes": processes,
        "machine": facts(device),
    }
    with replacing(folder / RUN) as temporary:
        temporary.write_text(json.dumps(run, indent=2) + "\n", encoding="utf-8")


def _curve(points: list[tuple[int, float]], title: str) -> bytes:
    from xclip_fast.pages import draw

    def paint(axes: Any) -> None:
        steps, values = zip(*points, strict=True)
        axes.plot(steps, values, linewidth=1, marker="o" if len(points) < 30 else None, markersize=3)
        axes.set_xlabel("step")
        axes.set_ylabel(title)
        axes.grid(axis="y")

    return draw(paint, height=3.2)
