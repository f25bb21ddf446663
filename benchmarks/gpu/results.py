"""``python -m benchmarks.gpu.results FIGURES.json OUT.json``: what a window measured, in the form of all results."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from benchmarks.gpu.figures import CEILINGS, MACHINE
from xclip_fast.bench.models import roof_of
from xclip_fast.bench.providers import PROVIDERS
from xclip_fast.bench.record import SCHEMA, Row, Run
from xclip_fast.errors import InputError


def results_of(content: dict[str, Any]) -> Run:
    """The rows of whole models with their floors.

    Raises:
        InputError: the record is of a rehearsal, or does not say of which machine.
    """
    if content["rehearsed"]:
        raise InputError("these figures were rehearsed without a GPU: they mean nothing")
    machine = content["cases"].get(MACHINE, {}).get(MACHINE)
    if machine is None:
        raise InputError("these figures are of no machine: the window ended before it was asked")
    rates = content["cases"].get(CEILINGS, {}).get("rates", {})
    rows: dict[tuple[Any, ...], dict[str, Any]] = {}
    for case in content["cases"].values():
        found = [row for row in case.get("rows", []) if "provider" in row]
        for row in found:
            # what was measured again, beside another, is there already
            method = row["timing"] and row["timing"]["method"]
            rows.setdefault((*row["case"].values(), row["provider"], method), row)
    content = {"schema": SCHEMA, "facts": machine, "ceilings": rates, "rows": list(rows.values())}
    run = Run.from_dict(content)
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
