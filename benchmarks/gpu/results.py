"""``python -m benchmarks.gpu.results FIGURES.json OUT.json``: what a window measured, in the form of all results."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from benchmarks.gpu.figures import CEILINGS, STRONGEST
from xclip_fast.bench.models import roof_of
from xclip_fast.bench.providers import PROVIDERS
from xclip_fast.bench.record import SCHEMA, Row, Run
from xclip_fast.errors import InputError


def results_of(content: dict[str, Any]) -> Run:
    """The rows of whole models with their floors.

    Raises:
        InputError: the record is of a rehearsal, or its ceilings were not measured.
    """
    if content["rehearsed"]:
        raise InputError("these figures were rehearsed without a GPU: they mean nothing")
    head = content["cases"].get(CEILINGS, {})
    if "machine" not in head:
        raise InputError("these figures have no ceilings: the window ended before they were measured")
    rows = []
    for name, case in content["cases"].items():
        found = [row for row in case.get("rows", []) if "provider" in row]
        # the others were measured again beside it, and are there already
        rows += [row for row in found if not name.endswith(STRONGEST) or row["provider"] == STRONGEST]
    run = Run.from_dict({"schema": SCHEMA, "facts": head["machine"], "ceilings": head["rates"], "rows": rows})
    run.rows = [_with_floor(row, run.ceilings) for row in run.rows]
    return run


def _with_floor(row: Row, ceilings: dict[str, float]) -> Row:
    alike = PROVIDERS[row.provider].same and PROVIDERS[row.provider].limit is None
    if row.timing is None or not alike:
        return row
    return replace(row, roof=roof_of(row.case, row.timing, ceilings))


def main(arguments: Sequence[str] | None = None) -> int:
    """Write the file; 1 where the record holds no results."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu.results", description=__doc__)
    parser.add_argument("figures", type=Path)
    parser.add_argument("out", type=Path, help="such as benchmarks/results/h100.json")
    options = parser.parse_args(arguments)
    try:
        run = results_of(json.loads(options.figures.read_text(encoding="utf-8")))
    except (OSError, ValueError, KeyError, InputError) as error:
        print(f"error: {options.figures} holds no results: {type(error).__name__}: {error}", file=sys.stderr)
        return 1
    run.save(options.out)
    print(f"{options.out}: {len(run.rows)} rows of {run.facts['commit']} on {run.facts['gpu']}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
