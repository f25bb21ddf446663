"""A training step on the CPU beside Hugging Face's: its time, and what it keeps for the backward pass.

``python -m benchmarks training``. Every contender is compared with float64 first, as everywhere; then all take turns,
step by step. It is CPU time in one thread: others may use the machine meanwhile.
"""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

from xclip_fast.bench.machine import facts
from xclip_fast.bench.memory import saved_bytes
from xclip_fast.bench.models import baseline_of, check_of, truth_of
from xclip_fast.bench.providers import PROVIDERS, check_names
from xclip_fast.bench.run import make_case
from xclip_fast.bench.setting import inputs_of, prepared, setting_of, step
from xclip_fast.files import replacing
from xclip_fast.numerics import exact_float32

VARIANT, BATCH = "B/32", 2
DTYPES = ("float32", "bfloat16")
BASELINE = "hf-sdpa"
CONTENDERS = (BASELINE, "layers", "optimized")
TURNS = 5


def measure(out: Path | None, others: Sequence[str] = (), variant: str = VARIANT, turns: int = TURNS) -> int:
    """Measure each dtype; print the rows, and write them as JSON. Returns 1 where a contender is wrong.

    Args:
        out: the file.
        others: contenders beside ``CONTENDERS``; compilers take minutes.
        variant: of the model.
        turns: steps of each contender that are timed.

    Raises:
        InputError: a contender is no provider.
    """
    # several would wait for each other, and spin meanwhile, which counts as CPU time
    torch.set_num_threads(1)
    contenders = tuple(dict.fromkeys((*CONTENDERS, *others)))
    check_names(list(contenders))
    found: dict[str, Any] = {"facts": facts("cpu"), "variant": variant, "batch": BATCH, "turns": turns, "rows": []}
    with exact_float32():
        for dtype in DTYPES:
            found["rows"] += _rows(variant, dtype, turns, contenders)
    if out is not None:
        with replacing(out) as unfinished:
            unfinished.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    return 0 if all(row["passed"] for row in found["rows"]) else 1


def _rows(variant: str, dtype: str, turns: int, contenders: tuple[str, ...]) -> list[dict[str, Any]]:
    case = make_case("model", variant, batch=BATCH, dtype=dtype, direction="train")
    with TemporaryDirectory() as folder:
        setting = setting_of(case, Path(folder))
        inputs = inputs_of(setting)
        truth = truth_of(setting, inputs)
        name, baseline, torch_error = baseline_of(setting, inputs, truth)
        assert name == BASELINE
        steps: dict[str, Callable[[], object]] = {}
        rows: dict[str, dict[str, Any]] = {}
        for name in contenders:
            built: Any = baseline if name == BASELINE else prepared(PROVIDERS[name].build(setting), case)
            check = check_of(name, built, setting, inputs, truth, torch_error)
            kept = saved_bytes(lambda built=built: built(*inputs), built)
            row = {"by": name, "dtype": dtype, "error": check.error, "passed": check.passed, "kept_mb": kept / 1e6}
            rows[name] = row
            print(json.dumps(row), flush=True)
            if check.passed:
                steps[name] = step(built, inputs, True)
        _time(steps, rows, turns)
    return list(rows.values())


def _time(steps: dict[str, Callable[[], object]], rows: dict[str, dict[str, Any]], turns: int) -> None:
    cpu: dict[str, list[float]] = {name: [] for name in steps}
    wall: dict[str, list[float]] = {name: [] for name in steps}
    for turn in range(turns + 1):
        # there and back, so that nobody is always the first
        for name in list(steps)[:: 1 if turn % 2 else -1]:
            began, spent = time.perf_counter(), time.process_time()
            steps[name]()
            if turn:
                cpu[name].append((time.process_time() - spent) * 1e3)
                wall[name].append((time.perf_counter() - began) * 1e3)
    for name, times in cpu.items():
        ratios = sorted(base / own for base, own in zip(cpu[BASELINE], times, strict=True))
        rows[name] |= {
            "cpu_ms": statistics.median(times),
            "wall_ms": statistics.median(wall[name]),
            "times_as_fast": statistics.median(ratios),
            "slowest": ratios[0],
            "fastest": ratios[-1],
        }
        print(json.dumps(rows[name]), flush=True)


def table(found: dict[str, Any]) -> str:
    """The rows as docs/ shows them."""
    lines = [
        "| dtype | by | error | CPU time, ms | times as fast (least to most) | kept, MB | of Hugging Face's |",
        "|---|---|---:|---:|---:|---:|---:|",
    ]
    kept = {row["dtype"]: row["kept_mb"] for row in found["rows"] if row["by"] == BASELINE}
    for row in found["rows"]:
        ratio = "wrong"
        if row["passed"]:
            ratio = f"{row['times_as_fast']:.2f} ({row['slowest']:.2f} to {row['fastest']:.2f})"
        error = "not finite" if row["error"] is None else f"{row['error']:.1e}"
        cells = [row["dtype"], row["by"], error, f"{row['cpu_ms']:.0f}" if row["passed"] else ""]
        cells.append("baseline" if row["by"] == BASELINE else ratio)
        cells += [f"{row['kept_mb']:.0f}", f"{row['kept_mb'] / kept[row['dtype']]:.2f}"]
        lines.append(f"| {' | '.join(cells)} |")
    origin = found["facts"]
    where = f"{origin['processor']}, one thread, torch {origin['torch']}, commit {origin['commit']}"
    what = f"{found['variant']}, 8 frames, batch {found['batch']}, {found['turns']} steps each in turn"
    return "\n".join([*lines, "", f"{what}, on {where}, {origin['utc'][:10]}."])
