"""The tables of docs/, made from benchmarks/results: ``make tables`` writes them, a test compares them."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks import training
from benchmarks.gpu.goals import COMPILED, TRAINED
from xclip_fast.bench.figures import milliseconds
from xclip_fast.bench.machine import RIVALS
from xclip_fast.bench.record import UNAVAILABLE, Row, Run
from xclip_fast.engine.budget import BUDGETS
from xclip_fast.flops import headline
from xclip_fast.numerics import TOLERANCES
from xclip_fast.reproduce import paper
from xclip_fast.reproduce.models import TITLES
from xclip_fast.reproduce.plan import SCRATCH, STARTS
from xclip_fast.reproduce.results import WORDS, Summary, percent, shown, summarise

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"
PAGES = sorted((ROOT / "docs").glob("*.md"))
_MARKED = re.compile(r"(<!-- table: (\S+) -->\n).*?(<!-- end of table -->)", re.DOTALL)


def write(page: Path) -> bool:
    """Put the tables between their markers; true when the file was changed."""
    before = page.read_text(encoding="utf-8")
    after = filled(before)
    if after != before:
        page.write_text(after, encoding="utf-8")
    return after != before


def filled(text: str) -> str:
    """The text with a fresh table between each pair of markers.

    Raises:
        KeyError: a marker names no table.
    """
    return _MARKED.sub(lambda found: found[1] + table(found[2]) + "\n" + found[3], text)


def table(name: str) -> str:
    """One table by the name in its marker: of the library's own, "rivals", or a file of results and what of it."""
    if name == "headline":
        return _headline()
    if name == "tolerances":
        return _tolerances()
    if name == "budgets":
        return _budgets()
    if name == "rivals":
        return _rivals({path.stem.partition("-")[2]: Run.load(path) for path in sorted(RESULTS.glob("rivals-*.json"))})
    if name == "host":
        return _host(json.loads((RESULTS / "host" / "standin.json").read_text(encoding="utf-8")))
    if name == "training":
        return training.table(json.loads((RESULTS / "training" / "cpu.json").read_text(encoding="utf-8")))
    if name == "eager":
        return _eager(json.loads((RESULTS / "windows" / "h100-eager-ecf2132.json").read_text(encoding="utf-8")))
    file, _, part = name.partition("/")
    if file == "reproduce":
        return reproduced(json.loads((RESULTS / "reproduce" / "reproduction.json").read_text(encoding="utf-8")), part)
    run = Run.load(RESULTS / f"{file}.json")
    return {"models": _models, "gpu": _gpu, "ops": _ops}[part](run)


def reproduced(found: dict[str, Any], part: str) -> str:
    """A table of the paper in miniature, or where its figures are from."""
    makers = {
        "claims": _claims,
        "ladder": _ladder,
        "few_shot": _few_shot,
        "zero_shot": _zero_shot,
        "origin": lambda summary: _reproduction(found),
    }
    return makers[part](summarise(found["runs"]))


def _claims(summary: Summary) -> str:
    lines = ["| in miniature | | figures |", "|---|---|---|"]
    for claim in summary.claims:
        lines.append(f"| {claim.text} | {'holds' if claim.holds else '**does not hold**'} | {claim.figures} |")
    return "\n".join(lines)


def _ladder(summary: Summary) -> str:
    lines = [f"| model | top-1 | {' | '.join(WORDS)} | paper, Kinetics-400 |", "|---|---:|---:|---:|---:|---:|"]
    for model, one in summary.ladder.items():
        words = " | ".join(percent(summary.words[model][word].mean) for word in WORDS)
        lines.append(f"| {TITLES[model]} | {shown(one)} | {words} | {paper.LADDER.get(model, '')} |")
    return "\n".join(lines)


def _few_shot(summary: Summary) -> str:
    names = " | ".join([*STARTS.values(), *(f"paper, {name}" for name in paper.FEW_SHOT)])
    lines = [f"| K | {names} |", "|---:" * (1 + len(STARTS) + len(paper.FEW_SHOT)) + "|"]
    for k in summary.few_shot[SCRATCH]:
        ours = " | ".join(shown(summary.few_shot[start][k]) for start in STARTS)
        published = " | ".join(str(curve[k]) for curve in paper.FEW_SHOT.values())
        lines.append(f"| {k} | {ours} | {published} |")
    return "\n".join(lines)


def _zero_shot(summary: Summary) -> str:
    titles = {
        "unseen": "unseen classes, among themselves",
        "among_all": "unseen classes, among all",
        "seen": "seen classes, among all",
    }
    lines = ["| X-CLIP, trained on two thirds of the classes | top-1 | chance |", "|---|---:|---:|"]
    for name, one in summary.zero_shot.items():
        lines.append(f"| {titles[name]} | {shown(one)} | {percent(summary.chance[name])} |")
    return "\n".join(lines)


def _reproduction(found: dict[str, Any]) -> str:
    facts, seconds = found["facts"], sum(run["cpu_seconds"] for run in found["runs"])
    machine = f"{facts['processor']}, torch {facts['torch']}, commit {facts['commit']}"
    return f"{len(found['runs'])} runs, {seconds:,.0f} CPU seconds on {machine}."


def _host(found: dict[str, Any]) -> str:
    times, machine = found["microseconds"], found["machine"]
    norm, ops = times["norm"], times["ops"]
    pairs = [
        ("one launch", norm["a launch"], "Triton's own", norm["a launch by Triton"]),
        (
            "`layer_norm`, forward with gradient",
            norm["layer_norm, forward"],
            "`F.layer_norm`",
            norm["F.layer_norm, forward"],
        ),
        (
            "`layer_norm`, forward and backward",
            norm["layer_norm, forward + backward"],
            "`F.layer_norm`",
            norm["F.layer_norm, forward + backward"],
        ),
        (
            "a block of B/16, forward and backward",
            times["block"]["ours"],
            "the reference",
            times["block"]["the reference"],
        ),
    ]
    for direction, what in (("forward", "B/32, batch 1, forward"), ("train", "B/32, batch 1, training step")):
        theirs = times[direction]["hf-sdpa"]
        pairs.append((f"{what}: layers", times[direction]["layers"], "Hugging Face", theirs))
        pairs.append((f"{what}: `optimize`", times[direction]["optimized"], "Hugging Face", theirs))
    lines = ["| host time | µs | beside | µs | ratio |", "|---|---:|---|---:|---:|"]
    lines += [
        f"| {what} | {ours:,.0f} | {whose} | {theirs:,.0f} | {ours / theirs:.2f} |"
        for what, ours, whose, theirs in pairs
    ]
    one = norm["a launch by Triton"]
    lines += [
        "",
        "| op at B/32, batch 1, inference | launches | µs | over as many launches by Triton |",
        "|---|---:|---:|---:|",
    ]
    for name, microseconds in ops.items():
        if not name.endswith(": launches"):
            count = int(ops[f"{name}: launches"])
            lines.append(f"| `{name}` | {count} | {microseconds:.0f} | {microseconds - count * one:+.0f} |")
    versions = f"torch {machine['torch']}, Triton {machine['triton']}, {machine['commit'][:7]}"
    lines += ["", f"CPU time on {machine['processor']}, {versions}."]
    return "\n".join(lines)


def _eager(found: dict[str, Any]) -> str:
    """Calls in eager mode on a GPU: by kernels, by plain modules, and Hugging Face's."""
    steps = {"forward": "forward", "train": "training step"}
    lines = [
        "| model | batch | | kernels, ms | plain modules, ms | Hugging Face, ms |",
        "|---|---:|---|---:|---:|---:|",
    ]
    for row in found["rows"]:
        times = " | ".join(f"{row[how]:.1f}" for how in ("kernels", "modules", "hf"))
        lines.append(f"| {row['variant']} | {row['batch']} | {steps[row['direction']]} | {times} |")
    facts = found["facts"]
    origin = f"Wall clock on {facts['gpu']}, torch {facts['torch']}, Triton {facts['triton']}, {facts['commit']}."
    return "\n".join([*lines, "", origin])


def _headline() -> str:
    lines = ["| | published | official code | after exact rewrites | the difference |", "|---|---:|---:|---:|---|"]
    for row in headline():
        lines.append(f"| {row.what} | {row.published:g} | {row.official:.2f} | {row.fused:.2f} | {row.why} |")
    return "\n".join(lines)


def _tolerances() -> str:
    lines = ["| dtype | rounding of a result | ceiling of an op | a whole model |", "|---|---:|---:|---:|"]
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        cells = (f"{number:.1e}" for number in TOLERANCES[dtype])
        lines.append(f"| {str(dtype).removeprefix('torch.')} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _budgets() -> str:
    lines = [f"| | {' | '.join(BUDGETS)} |", "|---" + "|---:" * len(BUDGETS) + "|"]
    return "\n".join([*lines, f"| budget of a GEMM | {' | '.join(f'{budget:g}' for budget in BUDGETS.values())} |"])


def _models(run: Run) -> str:
    lines = [
        "| model | dtype | by | error | ms (p10 to p90) | times as fast | noise | of the floor | MB |",
        "|---|---|---|---:|---:|---:|---:|---:|---:|",
    ]
    for row in run.rows:
        if row.case.name == "model" and row.timing is not None and row.check is not None:
            cells = _model(row), row.case.dtype, row.provider, _error(row), _times(row), _floor(row), _memory(row)
            lines.append(f"| {' | '.join(cells)} |")
    return "\n".join([*lines, "", _origin(run)])


def _gpu(run: Run) -> str:
    """A line for each case and way of timing it: Hugging Face's model eager and compiled, and ours beside both."""
    lines = [
        "| model | timed | eager, ms | compiled, ms | ours, ms | over eager | over compiled "
        "| float8, ms | over compiled |",
        "|---|---|---:|---:|---:|---:|---:|---:|---:|",
    ]
    timed: dict[tuple[str, str], list[Row]] = {}
    for row in run.rows:
        if row.timing is not None:
            method = "as used" if row.timing.method == "wall" else "as a graph"
            timed.setdefault((_model(row), method), []).append(row)
    for (model, method), rows in timed.items():
        eager, compiled, ours, float8 = (
            fastest(rows, names) for names in (("hf-sdpa",), COMPILED, ("engine", *TRAINED), ("engine-float8",))
        )
        cells = [model, method, *(_milliseconds(row) for row in (eager, compiled, ours)), _ratio(ours) if ours else ""]
        cells += [_over(ours, compiled), _milliseconds(float8), _over(float8, compiled)]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join([*lines, "", _origin(run)])


def fastest(rows: Sequence[Row], providers: Sequence[str]) -> Row | None:
    """The row of these providers with the largest ratio, or None."""
    return max((row for row in rows if row.provider in providers), key=_gain, default=None)


def _gain(row: Row) -> float:
    return row.timing.ratio if row.timing else 0.0


def _milliseconds(row: Row | None) -> str:
    return f"{row.timing.median_ms:.3f}" if row and row.timing else ""


def _over(row: Row | None, other: Row | None) -> str:
    # both were timed with one baseline, in one run
    return f"{_gain(row) / _gain(other):.2f}" if row and other else ""


def _rivals(runs: dict[str, Run]) -> str:
    """The runs of several processors by their names, and under the table what each of them is."""
    lines = [
        "| processor | model | dtype | by | error | ms (p10 to p90) | times as fast as Hugging Face | MB |",
        "|---|---|---|---|---:|---:|---:|---:|",
    ]
    for name, run in runs.items():
        for row in run.rows:
            if row.timing is not None:
                what = name, _model(row), row.case.dtype, row.provider
                cells = *what, _error(row), milliseconds(row.timing), _ratio(row), _memory(row)
                lines.append(f"| {' | '.join(cells)} |")
            elif row.status != UNAVAILABLE:
                cells = name, _model(row), row.case.dtype, row.provider, _error(row), row.status, "", ""
                lines.append(f"| {' | '.join(cells)} |")
    origins = [f"{name}: {_features(run)}. {_origin(run)}" for name, run in runs.items()]
    return "\n".join([*lines, *(line for origin in origins for line in ("", origin))])


def _model(row: Row) -> str:
    case = row.case
    what = f"{case.variant}, {case.frames} frames, batch {case.batch}"
    what += ", training step" if case.direction == "train" else ""
    return what + (", from bytes" if case.input == "uint8" else "")


def _memory(row: Row) -> str:
    return "" if row.memory_mb is None else f"{row.memory_mb:.0f}"


def _features(run: Run) -> str:
    libraries = [f"{name} {run.facts[name]}" for name in RIVALS if run.facts.get(name)]
    return ", ".join([*(run.facts.get("features") or [run.facts["capability"]]), *libraries])


def _ops(run: Run) -> str:
    lines = [
        "| op | by | error | ms (p10 to p90) | times as fast | noise | of the floor | share of the model |",
        "|---|---|---:|---:|---:|---:|---:|---:|",
    ]
    for row in run.rows:
        if row.case.name != "model" and row.timing is not None:
            share = f"{row.amdahl.share:.1%}" if row.amdahl else ""
            lines.append(
                f"| `{row.case.name}` | {row.provider} | {_error(row)} | {_times(row)} | {_floor(row)} | {share} |"
            )
    return "\n".join([*lines, "", _origin(run)])


def _error(row: Row) -> str:
    return "" if row.check is None or row.check.error is None else f"{row.check.error:.1e}"


def _floor(row: Row) -> str:
    return f"{row.roof.achieved:.0%}" if row.roof else ""


def _times(row: Row) -> str:
    found = row.timing
    assert found is not None
    return f"{milliseconds(found)} | {_ratio(row)} | {found.noise:.3f}"


def _ratio(row: Row) -> str:
    found = row.timing
    assert found is not None
    if row.provider == found.baseline:
        return "baseline"
    ratio = f"{found.ratio:.2f} ({found.ratio_p10:.2f} to {found.ratio_p90:.2f})"
    # what does not leave the noise is no gain and no loss
    return f"**{ratio}**" if found.verdict == "faster" else ratio


def _origin(run: Run) -> str:
    facts = run.facts
    where = facts["gpu"] or f"{facts['processor']}, {facts['threads']} threads"
    if facts.get("hidden"):
        where += f" (a mask hid {facts['hidden'].replace(',', ', ')} from the programs)"
    rates = ", ".join(
        f"{name.replace('_tflops', '')} {rate:.2f} TFLOP/s" for name, rate in run.ceilings.items() if "tflops" in name
    )
    return (
        f"Measured on {where}, torch {facts['torch']}, commit {facts['commit']}, {facts['utc'][:10]}. "
        f"The machine's own GEMMs in the same run: {rates}; copies {run.ceilings['copy_gbs']:.1f} GB/s."
    )
