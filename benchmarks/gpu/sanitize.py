"""PART=sanitize: compute-sanitizer's memcheck and racecheck over every kernel, forward and backward.

First a planted fault of each kind, which the tool must find; then it looks at this project's kernels alone.
"""

from __future__ import annotations

import os
import shutil
import sys
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from benchmarks.gpu.journal import Journal
from benchmarks.gpu.lane import TOOLS
from benchmarks.gpu.launches import launchers
from benchmarks.gpu.prepare import run

FOUND = 9  # exit code of a process in which the tool found something
WORKERS = 8
# parts of the names of this project's kernels, and of the planted one
NAMES = (
    "_fwd_kernel",
    "_bwd_kernel",
    "_bwd_key_kernel",
    "_bwd_query_kernel",
    "_head_kernel",
    "patch_rows_kernel",
)
FILTERS = [option for name in NAMES for option in ("--kernel-name", f"kns={name}")]
EXTENSION = "tests/gpu/test_gpu_patch_extension.py"
CONTROL = "planted fault"
PASSED, FAILED = "passed", "failed"


def main(journal: Journal, out: Path, dry: bool) -> bool:
    """Run what is left; true when everything ran and nothing was found."""
    names = names_of(dry)
    filters = [] if dry else controls(journal)
    with ThreadPoolExecutor(min(WORKERS, os.cpu_count() or 1)) as pool:
        running = {pool.submit(_check, name, filters, dry, journal): name for name in journal.todo(names)}
        for done in as_completed(running):
            if found := done.result():
                journal.add(running[done], found)
                print(f"  {running[done]}: {found['status']} ({found['seconds']} s) {found['said'][-1:]}", flush=True)
    complete = journal.finish(names)
    return complete and all(case["status"] == PASSED for case in journal.cases.values())


def names_of(dry: bool) -> list[str]:
    """Of the cases, memcheck of everything first: a fault it finds explains a race."""
    if dry:
        return ["memcheck clip_logits"]
    return [f"{tool} {what}" for tool in TOOLS for what in (*launchers(), "extension", "extension-graph")]


def controls(journal: Journal) -> list[str]:
    """The options that restrict the tools to our kernels; none where the planted faults are not found with them."""
    filters = FILTERS
    if not all(f"{tool} {CONTROL}" in journal.cases for tool in TOOLS):
        with TemporaryDirectory() as folder:
            program = str(Path(folder) / "planted")
            built = run(["nvcc", "-arch=native", "-o", program, "benchmarks/gpu/planted.cu"], 60)
            for tool in TOOLS:
                tried = [(_tool(tool, options), options) for options in (filters, [])]
                results = [(run([*command, program, tool], 60), options) for command, options in tried]
                caught = [options for result, options in results if result["code"] == FOUND]
                found = _found(results[0][0] if built["code"] == 0 else built)
                found |= {"status": PASSED if caught else FAILED, "filtered": filters in caught}
                journal.add(f"{tool} {CONTROL}", found)
                print(f"  {tool} {CONTROL}: {'found' if caught else 'NOT found'}", flush=True)
    return filters if all(journal.cases[f"{tool} {CONTROL}"]["filtered"] for tool in TOOLS) else []


def check_small(tool: str, what: str, deadline: float, *, rehearsed: bool = False) -> dict[str, Any]:
    """A tool over the small launches of one launcher, or of the extension; rehearsed, the launches without the tool."""
    command = [sys.executable, "-m", "benchmarks.gpu.launches", what, "--small"]
    settings = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    return _found(run(command if rehearsed else [*_tool(tool, FILTERS), *command], deadline, settings))


def _tool(tool: str, filters: list[str]) -> list[str]:
    program = shutil.which("compute-sanitizer") or "/usr/local/cuda/bin/compute-sanitizer"
    return [program, "--tool", tool, "--error-exitcode", str(FOUND), *filters]


def _check(name: str, filters: list[str], dry: bool, journal: Journal) -> dict[str, Any]:
    """Nothing when the deadline came first: the next run begins it anew."""
    tool, what = name.split()
    command = [sys.executable, "-m", "benchmarks.gpu.launches", what]
    if what.startswith("extension"):
        chosen = "graph" if what == "extension-graph" else "not graph and not repeats and not triton"
        command = [sys.executable, "-m", "pytest", EXTENSION, "-q", "-p", "no:cacheprovider", "-k", chosen]
    # every tensor in memory of its own: the allocator's blocks would hide what lies between them; a graph needs them
    settings = {} if what == "extension-graph" else {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    if journal.left < 10:
        return {}
    found = run(command if dry else [*_tool(tool, filters), *command], journal.left, settings)
    return {} if found["code"] is None and journal.left < 1 else _found(found)


def _found(done: dict[str, Any]) -> dict[str, Any]:
    """The outcome of one process, and of what it said the lines that count."""
    lines = [line for line in done["output"].splitlines() if line.strip()]
    said = lines[-1:] if done["code"] == 0 else lines[-30:]
    return {"status": PASSED if done["code"] == 0 else FAILED, "code": done["code"], "seconds": done["seconds"]} | {
        "said": said
    }
