"""``python -m benchmarks.gpu.tune SWEEP.json``: the tuning table of a GPU, from what a sweep or one op's has found.

Tiles enter it that are faster than the default by more than the noise, at their whole p10 to p90. A backend does where
the kernel with the best tiles does not beat PyTorch's operators by 3 %, or where a call of the compiled extension,
which would be chosen, is slower than the kernel.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.gpu.journal import write_json
from xclip_fast.tuning import SCHEMA, path_of, read

WORTH = 1.03  # a kernel that gains less is not used
FACTS = ("gpu", "commit", "torch", "triton", "cuda")


def table_of(journal: dict[str, Any]) -> dict[str, Any]:
    """The table of a sweep's journal; cases missing from an interrupted run keep their defaults."""
    tiles: dict[str, dict[str, dict[str, int]]] = {}
    backends: dict[str, dict[str, str]] = {}
    gains: dict[tuple[str, str], float] = {}
    cases = journal["cases"]
    for name, case in cases.items():
        if "function" not in case:
            continue
        best = max(filter(_faster, case["rows"]), key=lambda row: float(row["ratio"]), default=None)
        if best is not None and not best["default"]:
            chosen = tiles.setdefault(case["function"], {})
            for shape in case["shapes"]:
                # what one function gives to several models is measured on the first, the largest load
                chosen.setdefault(shape, best["tile"])
            if not case["backward"]:
                gains[case["of"], _shape(name)] = best["ratio"]
    for name, case in cases.items():
        if "op" not in case or case["call"] is None:
            continue
        times = {row["what"]: row["ratio"] for row in case["rows"] if "ratio" in row}
        gain = gains.get((case["op"], _shape(name)), 1.0)
        # a ratio is the kernel's time, by its default tiles, over that of the other
        if times.get("torch", 0.0) > gain / WORTH:
            backends.setdefault(case["op"], {})[case["call"]] = "torch"
        elif "extension" in times and times["extension"] < gain:
            backends.setdefault(case["op"], {})[case["call"]] = "triton"
    facts = {name: journal["facts"].get(name) for name in FACTS}
    return {"schema": SCHEMA, **facts, "tiles": tiles, "backends": backends}


def _faster(row: dict[str, Any]) -> bool:
    return row["status"] == "right" and bool(row["ratio_p10"] > 1 + row["noise"])


def _shape(name: str) -> str:
    # variant and batch stand last in the name of a case
    return " ".join(name.split()[-2:])


def main(arguments: Sequence[str] | None = None) -> int:
    """Write the table where the library reads it, or where it is asked to; 1 where the sweep ran on no GPU."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu.tune", description=__doc__)
    parser.add_argument("sweep", type=Path)
    parser.add_argument("--add", action="store_true", help="to what the table has: other launches keep their tiles")
    parser.add_argument("--out", type=Path, help="by default xclip_fast/kernels/tuning and the GPU's name")
    options = parser.parse_args(arguments)
    try:
        journal = json.loads(options.sweep.read_text(encoding="utf-8"))
        table = table_of(journal)
    except (OSError, ValueError, KeyError, TypeError) as error:
        print(f"error: {options.sweep} is no sweep: {type(error).__name__}: {error}", file=sys.stderr)
        return 1
    if not table["gpu"] and options.out is None:
        print("error: this sweep ran on no GPU: name a file with --out", file=sys.stderr)
        return 1
    path = options.out or path_of(table["gpu"])
    if options.add:
        before = read(path)
        for part in ("tiles", "backends"):
            for name, entries in before.get(part, {}).items():
                table[part][name] = entries | table[part].get(name, {})
    path.parent.mkdir(parents=True, exist_ok=True)
    write_json(path, table)
    counts = (sum(map(len, table[part].values())) for part in ("tiles", "backends"))
    print("{}: {} launches tuned, {} calls by another backend".format(path, *counts))
    return 0


if __name__ == "__main__":
    sys.exit(main())
