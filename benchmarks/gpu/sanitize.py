"""PART=sanitize: compute-sanitizer's memcheck and racecheck over every kernel at small shapes, forward and backward."""

from __future__ import annotations

import shutil
from collections import Counter
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import Any

from benchmarks.gpu.journal import Journal
from xclip_fast.bench.cases import IN_EXTENSION, OPS
from xclip_fast.bench.verify import FAILED, SKIPPED, verify

TOOLS = ("memcheck", "racecheck")
FOUND = 9  # exit code of a process in which the tool found something
WORKERS = 4


def main(journal: Journal, out: Path, dry: bool) -> bool:
    """Run what is left; true when everything ran and nothing was found."""
    ops = ["clip_logits"] if dry else list(OPS)
    names = [f"{tool} {op}" for tool in (TOOLS[:1] if dry else TOOLS) for op in ops]
    with ThreadPoolExecutor(WORKERS) as pool:
        running = {pool.submit(_check, name, dry, journal): name for name in journal.todo(names)}
        for done in as_completed(running):
            if found := done.result():
                journal.add(running[done], found)
                print(f"  {running[done]}: {found['status']} {found['outcomes']}", flush=True)
    complete = journal.finish(names)
    return complete and all(case["status"] != FAILED for case in journal.cases.values())


def _check(name: str, dry: bool, journal: Journal) -> dict[str, Any]:
    if journal.left < 10:
        return {}
    tool, op = name.split()
    wrapper: list[str] = []
    if not dry:
        program = shutil.which("compute-sanitizer") or "/usr/local/cuda/bin/compute-sanitizer"
        # every tensor in memory of its own: the allocator's blocks would hide what lies between them
        wrapper = ["env", "PYTORCH_NO_CUDA_MEMORY_CACHING=1", program, "--tool", tool, "--error-exitcode", str(FOUND)]
    backends = ["triton", "extension"] if op in IN_EXTENSION else ["triton"]
    dtypes = ["float32"] if dry else ["bfloat16", "float32"]
    results = list(verify([op], "cpu" if dry else "cuda", dtypes, backends, wrapper=wrapper, deadline=journal.left))
    bad = [
        f"{result.case} {result.backend} {result.dtype}: {result.reason}"
        for result in results
        if result.status == FAILED
    ]
    outcomes = dict(Counter(result.status for result in results))
    status = FAILED if bad else SKIPPED if outcomes.get(SKIPPED) == len(results) else "passed"
    skipped = sorted({f"{result.backend}: {result.reason}" for result in results if result.status == SKIPPED})
    return {"status": status, "outcomes": outcomes, "failures": bad[:20], "skipped": skipped}
