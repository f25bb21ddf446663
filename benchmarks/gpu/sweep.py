"""PART=sweep: the committed candidates of each kernel at the shapes of production, checked and then timed in turn."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch

from benchmarks.gpu.candidates import MOST, TUNABLE, Tunable
from benchmarks.gpu.journal import Journal
from xclip_fast.bench.cases import Load, config_of, find_op
from xclip_fast.bench.inputs import Inputs
from xclip_fast.bench.machine import Sensors
from xclip_fast.bench.operators import inputs_of
from xclip_fast.bench.parity import run_op
from xclip_fast.bench.record import Case
from xclip_fast.bench.timing import alternate, noise_of, sampler, timing_of
from xclip_fast.numerics import TOLERANCES, poisoned_memory, relative_error

SHAPES = [("B/16", 8), ("L/14", 8), ("B/32", 8), ("L/14-336", 1), ("B/32", 1), ("B/16", 1)]
BLOCKS, BLOCK = 5, 0.02


def main(journal: Journal, out: Path, dry: bool) -> bool:
    """Time what is left; true when every candidate that compiles is right."""
    shapes = [("tiny", 1)] if dry else SHAPES
    found = {
        f"{entry.op} {variant} x{batch}": (entry, variant, batch) for variant, batch in shapes for entry in TUNABLE
    }
    for name in journal.todo(found):
        journal.start(name)
        entry, variant, batch = found[name]
        dtype, device = ("float16", "cpu") if dry else ("bfloat16", "cuda")
        config = config_of(variant)
        case = Case(
            entry.op, variant, config.frames, batch, 400 if not dry else 5, dtype, "forward", "activations", device
        )
        journal.add(name, {"candidates": sweep(entry, case, dry)})
        best = min((row for row in journal.cases[name]["candidates"] if "ratio" in row), key=_time, default=None)
        print(f"  {name}: {best['tiles'] if best else 'no candidate'} {best['ratio'] if best else ''}", flush=True)
    complete = journal.finish(found)
    rows = [row for case in journal.cases.values() for row in case.get("candidates", [])]
    return complete and not any(row["status"] == "wrong" for row in rows)


def _time(row: dict[str, Any]) -> float:
    return float(row["median_ms"])


def sweep(entry: Tunable, case: Case, dry: bool) -> list[dict[str, Any]]:
    """A row for the default and for each candidate; ``ratio`` is the default's time over the candidate's."""
    op, arguments = find_op(case.name), inputs_of(case)
    truth = run_op(op, arguments, [], "torch", False)
    limit = 2 * TOLERANCES[getattr(torch, case.dtype)].ceiling
    load = Load(config_of(case.variant, case.frames), case.batch, case.classes)
    default = _call(op, arguments)
    sensors = Sensors(case.device)
    base = sampler(default, case.device, 0.001 if dry else BLOCK, graph=not dry)
    noise = noise_of(alternate(base, base, 1 if dry else BLOCKS, sensors))
    rows = []
    for tiles in entry.candidates(load)[: 1 if dry else MOST]:
        row: dict[str, Any] = {"tiles": str(tiles)}
        rows.append(row)
        # the launcher asks this function for its tiles at every launch
        with patch.object(entry.module, entry.function, lambda *given, tiles=tiles, **named: tiles):
            try:
                with poisoned_memory():
                    result = run_op(op, arguments, [], "triton", False)
                row["error"] = max(relative_error(result[name], exact) for name, exact in truth.items())
                row["status"] = "right" if row["error"] <= limit else "wrong"
                if row["status"] == "wrong":
                    row["error"] = str(row["error"])
                    continue
                sample = sampler(_call(op, arguments), case.device, 0.001 if dry else BLOCK, graph=not dry)
            except Exception as error:
                # too much shared memory, or a shape the compiler refuses
                row |= {"status": "refused", "reason": f"{type(error).__name__}: {error}"[:200]}
                continue
            # a captured graph keeps its tiles; a plain call would take those of the moment
            blocks = alternate(base, sample, 1 if dry else BLOCKS, sensors)
        timing = timing_of(blocks, "default", noise, method="graph")
        row |= {
            "median_ms": timing.median_ms,
            "ratio": round(timing.ratio, 4),
            "ratio_p10": round(timing.ratio_p10, 4),
            "ratio_p90": round(timing.ratio_p90, 4),
            "noise": round(noise, 4),
            "verdict": timing.verdict,
        }
    return rows


def _call(op: Callable[..., object], arguments: Inputs) -> Callable[[], object]:
    def call() -> object:
        with torch.inference_mode():
            return op(**arguments, backend="triton")

    return call
