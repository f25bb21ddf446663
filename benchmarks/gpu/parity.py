"""PART=parity: the tests of ops, kernels and model on the GPU, a process a file, several at a time."""

from __future__ import annotations

import ast
import sys
from collections import Counter
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any
from xml.etree import ElementTree

from benchmarks.gpu.journal import Journal
from benchmarks.gpu.prepare import ROOT, run

ROOMS = ("tests/ops", "tests/kernels", "tests/model")
FILE_DEADLINE = 420.0
WORKERS = 6  # each compiles on a core of its own and takes about 1 GB of the GPU


def files(dry: bool) -> list[str]:
    """Test files, those that compile most first."""
    if dry:
        return ["tests/model/test_numerics.py"]
    found = [path for room in ROOMS for path in sorted((ROOT / room).glob("test_*.py"))]
    found.sort(key=lambda path: -path.stat().st_size)
    return [str(path.relative_to(ROOT)) for path in found]


def main(journal: Journal, out: Path, dry: bool) -> bool:
    """Run the files that are left; true when all of them ran and no test failed."""
    names = files(dry)
    with TemporaryDirectory() as folder, ThreadPoolExecutor(1 if dry else WORKERS) as pool:
        running = {pool.submit(_run_file, name, Path(folder), journal): name for name in journal.todo(names)}
        for done in as_completed(running):
            if found := done.result():
                junit = found.pop("junit")
                journal.add(running[done], found)
                _merge(out / "parity.xml", junit)
                counts = ", ".join(f"{count} {what}" for what, count in found["tests"].items())
                print(f"  {running[done]}: {counts or found['output'][-200:]} ({found['seconds']} s)", flush=True)
    complete = journal.finish(names)
    return complete and all(case["code"] in (0, 5) for case in journal.cases.values())


def _run_file(name: str, folder: Path, journal: Journal) -> dict[str, Any]:
    """Nothing when the deadline came before the turn of this file."""
    if journal.left < 10:
        return {}
    path = folder / (name.replace("/", "_") + ".xml")
    command = [sys.executable, "-m", "pytest", name, "-q", "-s", "-p", "no:cacheprovider", f"--junit-xml={path}"]
    found = run(command, min(FILE_DEADLINE, journal.left))
    junit = path.read_text(encoding="utf-8") if path.exists() else ""
    tests, failures, parity = read_junit(junit)
    # of a file that passed, the output says nothing more
    output = "" if found["code"] == 0 else found["output"]
    return found | {"output": output, "tests": tests, "failures": failures, "parity": parity, "junit": junit}


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


def _merge(path: Path, junit: str) -> None:
    """Add the suites of one file to those that are there."""
    if not junit:
        return
    whole = (
        ElementTree.fromstring(path.read_text(encoding="utf-8")) if path.exists() else ElementTree.Element("testsuites")
    )
    whole.extend(ElementTree.fromstring(junit).iter("testsuite"))
    temporary = path.with_suffix(".tmp")
    temporary.write_text(ElementTree.tostring(whole, encoding="unicode"), encoding="utf-8")
    temporary.replace(path)
