"""``python -m benchmarks.gpu.goals FOLDER``: the numbers to reach, and what the records of a run say of each."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

Cases = dict[str, Any]
BYTES = [("B/16", 8), ("B/32", 1)]  # from uint8 frames too, which the compiled extension embeds
STRONGEST = ("hf-compile-max-flash", "hf-compile-max-cudnn")
MEMORY = "memory"  # a provider's name with this after it: what its training step keeps
COMPILED = (*STRONGEST, "hf-compile-max-cublas", "hf-compile")
TRAINED = ("layers", "layers-compile")  # what a user of ours can choose from


class Goal(NamedTuple):
    """A number to reach; ``found`` is None where a run has not measured it."""

    name: str
    goal: float
    found: float | None
    at_most: bool = False

    def __str__(self) -> str:
        sign = "<=" if self.at_most else ">="
        if self.found is None:
            return f"{self.name}: not measured ({sign} {self.goal:g})"
        reached = self.found <= self.goal if self.at_most else self.found >= self.goal
        return f"{self.name}: {self.found:.3f} ({sign} {self.goal:g}) {'reached' if reached else 'MISSED'}"


def goals(folder: Path) -> list[Goal]:
    """All of them, from ``e2e.json``, ``train.json``, ``questions.json`` and ``sweep.json``, those that are there."""
    forward, train, questions, sweep = (
        _cases(folder / f"{part}.json") for part in ("e2e", "train", "questions", "sweep")
    )
    return [*_forward(forward), *_train(train), *_kernels(questions, sweep)]


def goals_of(cases: Cases) -> list[Goal]:
    """All of them, from the cases of a window, those of whole models by provider."""
    train = {name.replace(" train ", " "): case for name, case in cases.items() if " train " in name}
    return [*_forward(cases), *_train(train), *_kernels(cases, {})]


def _forward(cases: Cases) -> Iterator[Goal]:
    for batch in (8, 32):
        for variant in ("B/32", "B/16", "L/14", "L/14-336"):
            for provider, goal in (("engine", 1.25), ("engine-float8", 1.55)):
                found = _against(cases, f"{variant} x{batch}", (provider,), COMPILED)
                yield Goal(f"{variant} x{batch} {provider} over the best compiled", goal, found)
            found = _against(cases, f"{variant} x{batch}", ("engine",), ("hf-sdpa",), "wall")
            yield Goal(f"{variant} x{batch} engine over eager, as a user sees it", 1.8, found)
    for variant, goal in (("B/32", 1.8), ("B/16", 1.8), ("L/14", 1.4)):
        found = _against(cases, f"{variant} x1", ("engine",), COMPILED)
        yield Goal(f"{variant} x1 engine over the best compiled", goal, found)
        if variant != "L/14":
            found = _against(cases, f"{variant} x1", ("engine",), ("hf-sdpa",), "wall")
            yield Goal(f"{variant} x1 engine over eager, as a user sees it", 5.0, found)
    for variant, batch in BYTES:
        found = _against(cases, f"{variant} x{batch} uint8", ("engine",), COMPILED)
        yield Goal(f"{variant} x{batch} engine from bytes over the best compiled", 1.25 if batch > 1 else 1.8, found)
    used = cases.get("L/14 x32 engine", {}).get("mfu", {})
    yield Goal("L/14 x32 engine, share of 989 TFLOP/s", 0.5, used.get("graph"))


def _train(cases: Cases) -> Iterator[Goal]:
    for variant in ("B/32", "B/16", "L/14", "L/14-336"):
        for method, how in (("graph", "captured"), ("wall", "as a user sees it")):
            found = _against(cases, f"{variant} x8", TRAINED, COMPILED, method)
            yield Goal(f"{variant} x8 training step over the best compiled, {how}", 1.15, found)
        ours, theirs = (_kept(cases, variant, providers) for providers in (("layers",), COMPILED))
        share = ours / theirs if ours and theirs else None
        yield Goal(f"{variant} x8 activations kept, of the compiled one's", 0.6, share, at_most=True)


def _kernels(questions: Cases, sweep: Cases) -> Iterator[Goal]:
    for variant, batch, goal in (("B/16", 8, 1.3), ("L/14", 8, 1.3), ("L/14-336", 1, 1.0)):
        rows = questions.get(f"ifa {variant} x{batch}", {}).get("rows", [])
        times = {row["contender"]: row["median_ms"] for row in rows if "median_ms" in row}
        ours = times.pop("triton", None)
        found = min(times.values()) / ours if ours and times else None
        yield Goal(f"{variant} x{batch} attention over SDPA on joined keys", goal, found)
    for variant in ("B/32", "B/16", "L/14"):
        rows = sweep.get(f"patch_embed backends {variant} x8", {}).get("rows", [])
        ratios = {row["what"]: row["ratio"] for row in rows if "ratio" in row}
        chain = ratios.get("reference")
        # a ratio is the Triton kernel's time over that of the other
        found = ratios.get("extension", 1.0) / chain if chain else None
        rows = questions.get(f"patch {variant} x8", {}).get("rows", [])
        times = {row["contender"]: row["median_ms"] for row in rows if "median_ms" in row}
        if "eager" in times and len(times) > 1:
            found = times.pop("eager") / min(times.values())
        yield Goal(f"{variant} x8 patch embedding over the eager chain", 3.0, found)


def _against(
    cases: Cases, case: str, providers: Iterable[str], others: Iterable[str], method: str = "graph"
) -> float | None:
    """The time of the fastest of the others over that of the fastest provider; all were timed with one baseline."""
    ours, theirs = (
        [ratio for name in names if (ratio := _ratio(cases, f"{case} {name}", method)) is not None]
        for names in (providers, others)
    )
    return max(ours) / max(theirs) if ours and theirs else None


def _ratio(cases: Cases, name: str, method: str) -> float | None:
    for row in cases.get(name, {}).get("rows", []):
        timing = row["timing"]
        if timing is not None and (timing["method"] == "wall") == (method == "wall"):
            return float(timing["ratio"])
    return None


def _kept(cases: Cases, variant: str, providers: Iterable[str]) -> float | None:
    """The least that any of them keeps."""
    found = [cases.get(f"{variant} x8 {provider} {MEMORY}", {}).get(MEMORY) for provider in providers]
    return min((one["kept_mb"] for one in found if one), default=None)


def _cases(path: Path) -> Cases:
    try:
        found: Cases = json.loads(path.read_text(encoding="utf-8"))["cases"]
    except (OSError, ValueError, KeyError):
        return {}
    return found


if __name__ == "__main__":
    for goal in goals(Path(sys.argv[1])):
        print(goal)
