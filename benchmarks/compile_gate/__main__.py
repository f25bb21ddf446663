"""``python -m benchmarks.compile_gate``: every kernel at every production shape, held to laws and budgets."""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict
from functools import partial
from pathlib import Path

# the interpreter compiles nothing; triton reads this when it is imported
os.environ.pop("TRITON_INTERPRET", None)
# the default, as a launch has it, without the warning that it will change
os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")

import triton
from rich.console import Console

from benchmarks.compile_gate.build import SHARED, Build, architectures, compile_launch, measure
from benchmarks.compile_gate.cases import production_launches
from benchmarks.compile_gate.gate import (
    BUDGETS,
    Budget,
    budget_file,
    changes,
    kernels,
    name_of,
    read_budgets,
    violations,
    write_budgets,
)
from benchmarks.compile_gate.table import table


def builds(arch: int, part: str, first: bool) -> list[Build]:
    """Every different build of one architecture, or the first of each kernel, named after the shape that needs it."""
    seen: set[int] = set()
    found: list[Build] = []
    for shape, launch in production_launches(part):
        if arch not in architectures(launch) or (first and any(build.kernel == launch.name for build in found)):
            continue
        compiled = compile_launch(launch, arch)
        if id(compiled) not in seen:
            seen.add(id(compiled))
            found.append(measure(compiled, launch.name, shape, arch))
    return found


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; 0 when nothing is violated."""
    options = _options(arguments)
    console = Console(width=135 if options.all else 100)
    compile_part = partial(builds, part=options.shape, first=options.first)
    with console.status("compiling"), ProcessPoolExecutor(options.jobs) as pool:
        found = [build for part in pool.map(compile_part, options.arch) for build in part]
    console.print(table(found, every=options.all))
    if options.json:
        options.json.write_text(json.dumps([asdict(build) for build in found]))
    path = budget_file(options.budgets)
    budgets = read_budgets(path)
    if options.update:
        # a part of the builds updates its own budgets, all of them also drop the budgets of builds that are gone
        kept = budgets or {} if _is_partial(options) else {}
        updated = kept | {name_of(build): Budget.of(build) for build in found}
        for line in changes(budgets or {}, updated):
            console.print(line, highlight=False, soft_wrap=True)
        write_budgets(path, updated)
        budgets = updated
    lines = violations(found, budgets)
    if not _is_partial(options):
        missing = kernels().keys() - {build.kernel for build in found}
        lines += [f"{name}: no shape of production launches it" for name in sorted(missing)]
    for line in lines:
        console.print(line, style="red", highlight=False, soft_wrap=True)
    held = "laws and budgets" if budgets is not None else "laws alone, this version of Triton has no budgets"
    verdict = f"{len(lines)} violations" if lines else "no violation"
    console.print(f"{len(found)} builds, Triton {triton.__version__}, {held}: {verdict}", highlight=False)
    return 1 if lines else 0


def _is_partial(options: argparse.Namespace) -> bool:
    return bool(options.shape) or options.first or set(options.arch) != set(SHARED)


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.compile_gate", description=__doc__)
    parser.add_argument("--arch", type=int, nargs="+", choices=SHARED, default=list(SHARED), help="80 for sm_80")
    parser.add_argument("--shape", default="", help="only shapes whose name contains this")
    parser.add_argument("--first", action="store_true", help="only the first build of each kernel")
    parser.add_argument("--all", action="store_true", help="a row for each build, not the worst of each kernel")
    parser.add_argument("--update", action="store_true", help="accept the figures as budgets, and say what changed")
    parser.add_argument("--budgets", type=Path, default=BUDGETS, metavar="FOLDER", help="another folder of budgets")
    parser.add_argument("--jobs", type=int, default=min(len(SHARED), os.cpu_count() or 1), help="processes")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all figures there")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    sys.exit(main())
