"""``python -m benchmarks tune OP``: the tiles that an op's kernels could have, tried at the shapes of models.

Each candidate is checked before it is timed, in turn with the default. ``python -m benchmarks.gpu.tune`` makes a tuning
table of what ``--json`` writes; docs/tuning.md walks through it.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.gpu.journal import write_json
from benchmarks.gpu.prepare import facts
from benchmarks.gpu.sweep import Sweep, tiles_of
from xclip_fast.errors import InputError
from xclip_fast.ops.cases import config_of
from xclip_fast.tuning import tunables

SHAPE = "B/16x8"
TINY = "tinyx1"  # of a rehearsal


def main(op: str, shapes: Sequence[str], json: Path | None, dry: bool) -> int:
    """Try them, print a table for each kernel and shape, and return 1 where a candidate is wrong.

    Raises:
        InputError: an op without tunable kernels, a shape that is none, or no GPU here.
    """
    kernels = [kernel for kernel in tunables().values() if kernel.op == op]
    if not kernels:
        known = sorted({kernel.op for kernel in tunables().values()})
        raise InputError(f"no kernel of {op!r} can be tuned: choose one of {', '.join(known)}")
    sizes = [shape_of(shape) for shape in shapes or [TINY if dry else SHAPE]]
    if not dry and not torch.cuda.is_available():
        raise InputError("torch finds no GPU here: --dry-run tries two tiles of each kernel in the interpreter")
    cases: dict[str, dict[str, Any]] = {}
    for variant, batch in sizes:
        for kernel in kernels:
            sweep = Sweep(op, kernel, variant, batch, dry)
            cases[sweep.name] = found = tiles_of(sweep)
            print(sweep.name, *(f"  {line}" for line in lines(found)), sep="\n", flush=True)
    if json is not None:
        write_json(json, {"facts": facts(), "cases": cases})
    return 1 if any(row["status"] == "wrong" for case in cases.values() for row in case["rows"]) else 0


def shape_of(text: str) -> tuple[str, int]:
    """Variant and batch of a shape such as B/16x8.

    Raises:
        InputError: it is none.
    """
    variant, _, batch = text.rpartition("x")
    if not batch.isdecimal() or not int(batch):
        raise InputError(f"a shape is a variant and a batch such as {SHAPE}, found {text!r}")
    config_of(variant)
    return variant, int(batch)


def lines(found: dict[str, Any]) -> list[str]:
    """The rows of a kernel at a shape, the fastest first."""
    if not found["rows"]:
        return [found["reason"]]
    rows = sorted(found["rows"], key=lambda row: -row.get("ratio", 0.0))
    return [f"launched at {'; '.join(found['shapes'])}", *map(line, rows)]


def line(row: dict[str, Any]) -> str:
    """One candidate: its time and how many times as fast as the default it is, or why it has none."""
    what = f"{row['what']}{' (default)' * row['default']}"
    if row["status"] == "wrong":
        return f"{what:48} WRONG: error {row['error']}"
    if "ratio" not in row:
        return f"{what:48} {row['status']}: {row['reason'].splitlines()[0]}"
    spread = f"{row['ratio_p10']:.3f} to {row['ratio_p90']:.3f}"
    return f"{what:48} {row['median_ms'] * 1e3:9.1f} us  x {row['ratio']:.3f} ({spread}), error {row['error']:.1e}"
