"""PART=parity: the tests for GPUs, of ops and of the model, a process a file, several at a time."""

from __future__ import annotations

import ast
import os
import sys
from collections import Counter
from concurrent.futures import ThreadPoolExecutor, as_completed
from importlib.metadata import version
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any
from xml.etree import ElementTree

from benchmarks.gpu.journal import Journal
from benchmarks.gpu.prepare import ROOT, run

FULL = "tests/gpu/test_gpu_full_shapes.py"
ROOMS = ("tests/gpu", "tests/ops", "tests/model")
FILE_DEADLINE = 420.0
MARGIN = 15.0  # for the test that runs then
WORKERS = 10  # each compiles on a core of its own and takes about 1 GB of the GPU


def suites(dry: bool) -> dict[str, list[str]]:
    """Name to the arguments of pytest: those that say most first, and among the older ones those that compile most."""
    if dry:
        name = "tests/model/test_numerics.py"
        return {name: [name]}
    # a file that compiles for every model is shared among several processes
    found = {f"{FULL} {variant}": [FULL, "-k", variant] for variant in ("B/16", "L/14 and not 336", "B/32", "336")}
    for room in ROOMS:
        paths = sorted((ROOT / room).glob("test_*.py"), key=lambda path: -path.stat().st_size)
        names = [str(path.relative_to(ROOT)) for path in paths]
        found |= {name: [name] for name in names if name != FULL}
    return found


def main(journal: Journal, out: Path, dry: bool) -> bool:
    """Run what is left; true when everything ran and no test failed."""
    asked = suites(dry)
    workers = 1 if dry else min(WORKERS, os.cpu_count() or 1)
    with TemporaryDirectory() as folder, ThreadPoolExecutor(workers) as pool:
        running = {
            pool.submit(_run_suite, asked[name], Path(folder) / f"{index}.xml", journal): name
            for index, name in enumerate(journal.todo(asked))
        }
        for done in as_completed(running):
            if found := done.result():
                if found.pop("cut_off"):
                    # what it says stays; the next run begins it anew
                    journal.content.setdefault("cut_off", {})[running[done]] = found
                    journal.write()
                else:
                    journal.add(running[done], found)
                counts = ", ".join(f"{count} {what}" for what, count in found["tests"].items())
                print(f"  {running[done]}: {counts or found['output'][-200:]} ({found['seconds']} s)", flush=True)
    complete = journal.finish(asked)
    return complete and all(case["code"] in (0, 5) for case in journal.cases.values())


def _run_suite(asked: list[str], path: Path, journal: Journal) -> dict[str, Any]:
    """Nothing when the deadline came before its turn."""
    left = min(FILE_DEADLINE, journal.left)
    if left < 10:
        return {}
    command = [sys.executable, "-m", "pytest", *asked, "-q", "-s", "-p", "no:cacheprovider", f"--junit-xml={path}"]
    if tuple(map(int, version("pytest-timeout").split(".")[:2])) >= (2, 3):
        # it stops between two tests, and says what it has found until then
        command.append(f"--session-timeout={left - 5:.0f}")
    found = run(command, left + MARGIN)
    junit = path.read_text(encoding="utf-8") if path.exists() else ""
    tests, failures, parity = read_junit(junit)
    cut_off = found["code"] is None or "session-timeout: " in found["output"]
    # of a suite that passed, the output says nothing more
    output = "" if found["code"] == 0 else found["output"]
    return found | {
        "output": output,
        "tests": tests,
        "failures": failures,
        "parity": parity,
        "cut_off": cut_off,
    }


def read_junit(text: str) -> tuple[dict[str, int], list[str], list[dict[str, Any]]]:
    """Outcomes by kind, the first line of each failure, and the worst parity row of each comparison and dtype."""
    if not text:
        return {}, [], []
    counts: Counter[str] = Counter()
    failures = []
    worst: dict[tuple[str, str], dict[str, Any]] = {}
    for case in ElementTree.fromstring(text).iter("testcase"):
        bad = case.find("failure") if case.find("failure") is not None else case.find("error")
        kind = "failed" if bad is not None else "skipped" if case.find("skipped") is not None else "passed"
        counts[kind] += 1
        if bad is not None:
            said = (bad.get("message") or "").splitlines()
            failures.append(f"{case.get('name')}: {said[0] if said else ''}"[:300])
        for entry in case.iter("property"):
            if entry.get("name") == "parity":
                row = _parity_row(entry.get("value") or "")
                key = row["what"], row["dtype"]
                if key not in worst or row["used"] > worst[key]["used"]:
                    worst[key] = row
    return dict(counts), failures[:40], sorted(worst.values(), key=lambda row: (row["what"], row["dtype"]))


def _parity_row(text: str) -> dict[str, Any]:
    # a tuple as Python prints it; infinite and missing errors have no literal
    parts = ast.literal_eval(text.replace("nan", "None").replace("inf", "1e308"))
    what, dtype, error, torch_error, allowance = parts
    return {
        "what": what,
        "dtype": dtype,
        "error": error,
        "torch_error": torch_error,
        "allowance": allowance,
        "used": error / allowance if allowance else float(error > 0),
    }
