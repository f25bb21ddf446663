"""``python -m benchmarks.gpu``: a window on a borrowed GPU, or the parts of ``make gpu``, each with a deadline."""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from benchmarks.gpu.goals import goals
from benchmarks.gpu.journal import forgive
from benchmarks.gpu.prepare import build_extension, facts, make_importable

PARTS = ("parity", "sanitize", "questions", "sweep", "e2e", "train")
WINDOWS = ("check", "figures")
DEADLINE = 440.0  # seconds of a part
GRACE = 30.0  # for the case that runs when they have passed; eight minutes in all
RESTARTS = 12


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the parts asked for; 0 when all are complete and nothing failed."""
    options = _options(arguments)
    out: Path = options.out
    out.mkdir(parents=True, exist_ok=True)
    if options.window:
        from benchmarks.gpu import kit, window

        # torch takes seconds to import, and is asked where nothing else knows
        if not options.dry_run and kit.gpu()[0] is None and not _torch_finds_a_gpu():
            print("error: a window on a GPU was asked for, and torch finds none here: try --dry-run", file=sys.stderr)
            return 2
        try:
            return window.run(options.window, out, dry=options.dry_run, tiny=options.tiny, seconds=options.seconds)
        except OSError as error:
            print(f"error: {error}", file=sys.stderr)
            return 2
    if options.dry_run:
        os.environ["TRITON_INTERPRET"] = "1"
    import torch

    if not options.dry_run and not torch.cuda.is_available():
        print("error: torch finds no GPU here: try make gpu-dry-run", file=sys.stderr)
        return 2
    print("prepare", flush=True)
    prepared = {"importable": make_importable()}
    if not options.dry_run:
        prepared["extension"] = build_extension("{}.{}".format(*torch.cuda.get_device_capability()))
    (out / "prepare.json").write_text(json.dumps({"facts": facts()} | prepared, indent=1) + "\n", encoding="utf-8")
    for step, found in prepared.items():
        how = found.get("how") or found.get("built") or found["output"]
        print(f"  {step}: code {found['code']}, {found['seconds']} s: {how[:300]}", flush=True)
    if prepared["importable"]["code"] != 0:
        print(f"error: xclip_fast.kernels cannot be imported:\n{prepared['importable']['output']}", file=sys.stderr)
        return 2
    failed = [step for step, found in prepared.items() if found["code"] != 0]
    failed += [part for part in options.parts or PARTS if not _run(part, options)]
    # the end of the output is what a borrowed machine is sure to send back
    for goal in goals(out):
        if goal.found is not None:
            print(goal, flush=True)
    print(f"failed or unfinished: {', '.join(failed)}" if failed else "all parts are complete", flush=True)
    return 1 if failed else 0


def _torch_finds_a_gpu() -> bool:
    import torch

    return torch.cuda.is_available()


def _run(part: str, options: argparse.Namespace) -> bool:
    """Run a part in a process of its own; one that crashes is started again after the case that did it."""
    print(part, flush=True)
    start = time.monotonic()
    command = [sys.executable, "-m", "benchmarks.gpu.part", part, str(options.out)]
    command += ["--dry-run"] if options.dry_run else []
    code: int | None = None
    for _ in range(RESTARTS):
        left = options.deadline - (time.monotonic() - start)
        # the part stops by itself before it is killed
        child = subprocess.Popen([*command, str(left)], start_new_session=True)
        try:
            code = child.wait(left + GRACE)
        except subprocess.TimeoutExpired:
            os.killpg(child.pid, signal.SIGKILL)
            child.wait()
            forgive(options.out / f"{part}.json")
            code = None
        if code in (0, 1, None):
            break
        print(f"  ended with code {code}", flush=True)
    print(f"  {'complete' if code == 0 else 'failed or unfinished'}, {time.monotonic() - start:.0f} s", flush=True)
    return code == 0


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description=__doc__)
    # no choices: an empty list would not be one of them
    parser.add_argument("parts", nargs="*", metavar="PART", help=f"{', '.join(PARTS)}; all of them without")
    parser.add_argument("--out", type=Path, default=Path(os.environ.get("OUT") or "build/gpu"), help="folder to write")
    parser.add_argument("--deadline", type=float, default=DEADLINE, help="seconds of a part")
    parser.add_argument("--window", choices=WINDOWS, help="instead of parts: all that a few minutes can tell")
    parser.add_argument("--seconds", type=float, help="of the whole window, instead of its own")
    parser.add_argument("--tiny", action="store_true", help="a window of the smallest shapes")
    parser.add_argument(
        "--dry-run", action="store_true", help="without a GPU: parts in tiny shapes on the CPU, windows on a stand-in"
    )
    options = parser.parse_args(arguments)
    for part in options.parts:
        if part not in PARTS:
            parser.error(f"unknown part {part!r}: choose from {', '.join(PARTS)}")
    return options


if __name__ == "__main__":
    sys.exit(main())
