"""PART=e2e: whole models on the GPU, our engine and layers beside Hugging Face's eager and compiled."""

from __future__ import annotations

import gc
import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.gpu.goals import BYTES, MEMORY, STRONGEST
from benchmarks.gpu.journal import Journal, leave_if_lost
from xclip_fast.bench.machine import ceilings, facts
from xclip_fast.bench.models import Effort, measure_model, roof_of
from xclip_fast.bench.providers import PROVIDERS
from xclip_fast.bench.record import FAILED, SCHEMA, TIMED, UNAVAILABLE, Case, Row, Run
from xclip_fast.bench.setting import inputs_of, prepared, setting_of

Plan = list[tuple[Case, tuple[str, ...]]]

FRAMES = {"L/14-336": 16}
# those first that say most, should the time end: what the numbers to reach speak of, then the rest
PRIMARY = [("B/16", 8), ("B/32", 8), ("L/14", 8), ("L/14", 32), ("B/32", 1), ("B/16", 1), ("L/14", 1)]
LATER = [("B/16", 32), ("B/32", 32), *(("L/14-336", batch) for batch in (8, 1, 32))]
TRAINED = [("B/16", 8), ("B/32", 8), ("L/14", 8), ("L/14-336", 8)]
FIRST = ("hf-sdpa", "engine", "engine-float8")
OURS = ("layers", "optimized")
OTHERS = ("hf-compile", "layers-compile")
EFFORT = Effort(blocks=8, block=0.05, memory=False)
COMPILE_SECONDS = 75.0  # with less time left none is begun
PEAK_TFLOPS = 989.4  # dense bfloat16 of an H100, by its data sheet
CEILINGS = "ceilings"
PARTS = ("train", "e2e")


def plan(direction: str, dry: bool) -> Plan:
    """Cases, and the providers that share truth and baseline; a compiler alone, since each takes minutes."""
    if dry:
        case = Case("model", "tiny", 4, 2, 5, "float32", direction, "normalised", "cpu")
        memory = ((case, (f"layers {MEMORY}",)),) if direction == "train" else ()
        return [(case, ("hf-sdpa", "layers")), *memory]

    def group(
        order: list[tuple[str, int]], providers: tuple[str, ...], *, apart: bool = False, input: str = "normalised"
    ) -> Plan:
        made: Plan = []
        for variant, batch in order:
            frames = FRAMES.get(variant, 8)
            case = Case("model", variant, frames, batch, 400, "bfloat16", direction, input, "cuda")
            made += [(case, (provider,)) for provider in providers] if apart else [(case, providers)]
        return made

    if direction == "train":
        kept = tuple(f"{provider} {MEMORY}" for provider in ("hf-sdpa", *OURS, *STRONGEST))
        return [
            *group(TRAINED, ("hf-sdpa", *OURS)),
            *group(TRAINED[:3], (*STRONGEST, "layers-compile"), apart=True),
            *group(TRAINED, kept[:3], apart=True),
            *group(TRAINED[:3], kept[3:], apart=True),
            *group(TRAINED[3:], (*STRONGEST, "layers-compile", *kept[3:]), apart=True),
            *group(TRAINED, ("hf-compile",), apart=True),
        ]
    return [
        *group(PRIMARY, FIRST),
        *group(PRIMARY, STRONGEST, apart=True),
        *group(BYTES, FIRST, input="uint8"),
        *group(BYTES, STRONGEST, apart=True, input="uint8"),
        *group(PRIMARY, OURS),
        *group(LATER, (*FIRST, *OURS)),
        *group(LATER, STRONGEST, apart=True),
        *group(PRIMARY + LATER, OTHERS, apart=True),
    ]


def name_of(case: Case, provider: str) -> str:
    """Of a case in the journal."""
    return f"{case.variant} x{case.batch}{' uint8' if case.input == 'uint8' else ''} {provider}"


def main(journal: Journal, out: Path, dry: bool, direction: str = "forward") -> bool:
    """Measure what is left; true when everything was measured, and nothing was wrong."""
    found = {name_of(case, one): (case, group) for case, group in plan(direction, dry) for one in group}
    device = "cpu" if dry else "cuda"
    if CEILINGS not in journal.cases:
        rates = {} if dry else ceilings(device, ("bfloat16",))
        # a borrowed machine has no git history
        machine = facts(device) | {"commit": journal.content["facts"]["commit"]}
        journal.add(CEILINGS, {"rates": rates, "machine": machine})
    rates = journal.cases[CEILINGS]["rates"]
    for name in journal.todo(found):
        case, group = found[name]
        if not dry and "compile" in name and journal.left < COMPILE_SECONDS:
            break
        journal.start(name)
        left = [other for other in group if name_of(case, other) not in journal.cases]
        try:
            if name.endswith(MEMORY):
                provider = left[0].removesuffix(f" {MEMORY}")
                journal.add(name, {"status": TIMED, MEMORY: kept_memory(case, provider)})
                print(f"  {name}: {journal.cases[name][MEMORY]}", flush=True)
            else:
                _measure(journal, case, left, rates, dry)
        except Exception as error:
            reason = f"{type(error).__name__}: {error}"[:400]
            for other in left:
                if name_of(case, other) not in journal.cases:
                    journal.add(name_of(case, other), {"status": FAILED, "reason": reason})
                    print(f"  {name_of(case, other)}: {reason[:200]}", flush=True)
                    leave_if_lost()
        save(out)
    save(out)
    complete = journal.finish(found)
    return complete and all(case.get("status", TIMED) in (TIMED, UNAVAILABLE) for case in journal.cases.values())


def save(out: Path) -> None:
    """The rows of both parts in the form of all results, in one file: ``results.json``."""
    journals = [
        json.loads(path.read_text(encoding="utf-8")) for part in PARTS if (path := out / f"{part}.json").exists()
    ]
    cases = [found for journal in journals for found in journal["cases"].values()]
    head = next(journal["cases"][CEILINGS] for journal in journals[::-1] if CEILINGS in journal["cases"])
    rows = [row for found in cases for row in found.get("rows", [])]
    content = {"schema": SCHEMA, "facts": head["machine"], "ceilings": head["rates"], "rows": rows}
    Run.from_dict(content).save(out / "results.json")


def _measure(journal: Journal, case: Case, providers: list[str], rates: dict[str, float], dry: bool) -> None:
    effort = Effort(blocks=1, block=0.01, memory=False) if dry else EFFORT
    rows: dict[str, list[dict[str, Any]]] = {}
    used: dict[str, dict[str, float]] = {}
    for row in measure_model(case, providers, effort, rates):
        rows.setdefault(row.provider, []).append(asdict(row))
        found: dict[str, Any] = {"status": row.status, "rows": rows[row.provider]}
        if (share := peak_share(row, rates)) is not None:
            assert row.timing is not None
            found["mfu"] = used.setdefault(row.provider, {})
            found["mfu"][row.timing.method] = share
        journal.add(name_of(case, row.provider), found)
        print(f"  {describe(row)}{f', {share:.1%} of {PEAK_TFLOPS:g} TFLOP/s' if share else ''}", flush=True)
        if row.status == FAILED:
            leave_if_lost()
        following = providers[providers.index(row.provider) + 1 :]
        if following:
            journal.start(name_of(case, following[0]))


def peak_share(row: Row, rates: dict[str, float]) -> float | None:
    """Operations that are left after exact rewrites, over what the data sheet says of bfloat16: a utilisation."""
    if row.timing is None or not PROVIDERS[row.provider].same:
        return None
    roof = roof_of(row.case, row.timing, rates)
    return None if roof is None else roof.flops / (row.timing.median_ms * 1e-3) / (PEAK_TFLOPS * 1e12)


def kept_memory(case: Case, provider: str) -> dict[str, float]:
    """MB of a training step above the weights: what the forward pass keeps for the backward one, and the peak.

    On a CPU the step runs, and nothing is said of it.
    """
    setting = setting_of(case)
    return memory_of_step(prepared(PROVIDERS[provider].build(setting), case), inputs_of(setting), case)


def memory_of_step(module: Any, inputs: tuple[Tensor, Tensor], case: Case) -> dict[str, float]:
    """As ``kept_memory``, of a module that is there."""
    video, text = inputs
    # the first step compiles, and makes what every later one finds
    module(video, text).float().square().mean().backward()
    module.zero_grad(set_to_none=True)
    gc.collect()
    if case.device == "cpu":
        return {}
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    loss = module(video, text).float().square().mean()
    kept = torch.cuda.memory_allocated() - before
    loss.backward()
    peak = torch.cuda.max_memory_allocated() - before
    return {"kept_mb": round(kept / 1e6, 1), "peak_mb": round(peak / 1e6, 1)}


def describe(row: Row) -> str:
    """A line of a log."""
    case = row.case
    head = f"{case.name} {case.variant} x{case.batch} {case.dtype} {case.direction} {case.input} {row.provider}"
    if row.timing is None:
        return f"{head}: {row.status}: {row.reason}"
    found = row.timing
    spread = f"{found.ratio_p10:.3f} to {found.ratio_p90:.3f}, noise {found.noise:.3f}"
    return f"{head}: {found.median_ms:.3f} ms by {found.method}, {found.ratio:.3f} of {found.baseline} ({spread})"
