"""PART=e2e: whole models in bfloat16 on the GPU, our layers and engine beside Hugging Face's eager and compiled."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

from benchmarks.gpu.journal import Journal
from xclip_fast.bench.machine import ceilings, facts
from xclip_fast.bench.models import Effort, measure_model
from xclip_fast.bench.record import FAILED, SCHEMA, TIMED, UNAVAILABLE, Case, Row, Run

FRAMES = {"L/14-336": 16}
# those first that say most, should the time end
ORDER = [
    *((variant, 8) for variant in ("B/16", "B/32", "L/14")),
    *((variant, 1) for variant in ("B/32", "B/16", "L/14")),
    *((variant, 32) for variant in ("B/32", "B/16", "L/14")),
    *(("L/14-336", batch) for batch in (1, 8, 32)),
]
EAGER = ("hf-sdpa", "layers", "optimized", "engine", "engine-float8")
COMPILED = ("hf-compile-max-cudnn", "hf-compile-max-flash", "hf-compile", "layers-compile")
EFFORT = Effort(blocks=8, block=0.05, memory=False)
CEILINGS = "ceilings"
PARTS = ("train", "e2e")


def cases(direction: str, dry: bool) -> Iterator[tuple[Case, str]]:
    """Case and provider, one compiler after the eager ones of all cases: compiling takes minutes."""
    if dry:
        case = Case("model", "tiny", 4, 2, 5, "float32", direction, "normalised", "cpu")
        yield from ((case, provider) for provider in ("hf-sdpa", "layers"))
        return
    order = [pair for pair in ORDER if direction == "forward" or pair[1] == 8]
    for group in (EAGER, *((provider,) for provider in COMPILED)):
        for variant, batch in order:
            case = Case(
                "model", variant, FRAMES.get(variant, 8), batch, 400, "bfloat16", direction, "normalised", "cuda"
            )
            yield from ((case, provider) for provider in group)


def name_of(case: Case, provider: str) -> str:
    """Of a case in the journal."""
    return f"{case.variant} x{case.batch} {provider}"


def main(journal: Journal, out: Path, dry: bool, direction: str = "forward") -> bool:
    """Measure what is left; true when everything was measured, and nothing was wrong."""
    found = list(cases(direction, dry))
    device = "cpu" if dry else "cuda"
    if CEILINGS not in journal.cases:
        rates = {} if dry else ceilings(device, ("bfloat16",))
        journal.add(CEILINGS, {"rates": rates, "machine": facts(device)})
    rates = journal.cases[CEILINGS]["rates"]
    names = {name_of(case, provider): (case, provider) for case, provider in found}
    for name in journal.todo(names):
        case, provider = names[name]
        journal.start(name)
        # neighbours in the list share truth and baseline
        shared = [other for other in _together(provider) if name_of(case, other) in names]
        left = [other for other in shared if name_of(case, other) not in journal.cases]
        try:
            _measure(journal, case, left, rates, dry)
        except Exception as error:
            for other in left:
                if name_of(case, other) not in journal.cases:
                    journal.add(name_of(case, other), {"status": FAILED, "reason": f"{type(error).__name__}: {error}"})
    save(out)
    complete = journal.finish(names)
    return complete and all(found.get("status", TIMED) in (TIMED, UNAVAILABLE) for found in journal.cases.values())


def save(out: Path) -> None:
    """The rows of both parts in the form of all results, in one file: ``results.json``."""
    journals = [
        json.loads(path.read_text(encoding="utf-8")) for part in PARTS if (path := out / f"{part}.json").exists()
    ]
    cases = [found for journal in journals for found in journal["cases"].values()]
    head = journals[-1]["cases"][CEILINGS]
    rows = [row for found in cases for row in found.get("rows", [])]
    content = {"schema": SCHEMA, "facts": head["machine"], "ceilings": head["rates"], "rows": rows}
    Run.from_dict(content).save(out / "results.json")


def _together(provider: str) -> tuple[str, ...]:
    return EAGER if provider in EAGER else (provider,)


def _measure(journal: Journal, case: Case, providers: list[str], rates: dict[str, float], dry: bool) -> None:
    effort = Effort(blocks=1, block=0.01, memory=False) if dry else EFFORT
    rows: dict[str, list[dict[str, Any]]] = {}
    for row in measure_model(case, providers, effort, rates):
        rows.setdefault(row.provider, []).append(asdict(row))
        journal.add(name_of(case, row.provider), {"status": row.status, "rows": rows[row.provider]})
        print(f"  {describe(row)}", flush=True)
        following = providers[providers.index(row.provider) + 1 :]
        if following:
            journal.start(name_of(case, following[0]))


def describe(row: Row) -> str:
    """A line of a log."""
    case = row.case
    head = f"{case.name} {case.variant} x{case.batch} {case.dtype} {case.direction} {row.provider}"
    if row.timing is None:
        return f"{head}: {row.status}: {row.reason}"
    found = row.timing
    spread = f"{found.ratio_p10:.3f} to {found.ratio_p90:.3f}, noise {found.noise:.3f}"
    return f"{head}: {found.median_ms:.3f} ms by {found.method}, {found.ratio:.3f} of {found.baseline} ({spread})"
