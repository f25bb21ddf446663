"""``python -m benchmarks compare A.json B.json``: what became faster or slower between two runs of one machine."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from xclip_fast.bench.record import Case, Row, Run

THRESHOLD = 0.05  # less is no news between two runs, whatever each run's own noise


@dataclass(frozen=True)
class Change:
    """One provider in one case; ``ratio`` is the first run's time over the second's, ``noise`` the larger of both."""

    case: Case
    provider: str
    first_ms: float
    second_ms: float
    ratio: float
    noise: float

    @property
    def verdict(self) -> str:
        """ "faster", "slower" or "no difference" of the second run."""
        least = max(self.noise, THRESHOLD)
        return "faster" if self.ratio > 1 + least else "slower" if self.ratio < 1 / (1 + least) else "no difference"


def compare(first: Run, second: Run) -> list[Change]:
    """Everything that both runs have timed."""
    before = {_key(row): row for row in first.rows if row.timing is not None}
    found = []
    for row in second.rows:
        old = before.get(_key(row)) if row.timing is not None else None
        if row.timing is None or old is None or old.timing is None:
            continue
        one, two = old.timing, row.timing
        noise = max(one.noise, two.noise)
        ratio = one.median_ms / two.median_ms
        found.append(Change(row.case, row.provider, one.median_ms, two.median_ms, ratio, noise))
    return found


def _key(row: Row) -> tuple[Case, str, str, str]:
    assert row.timing is not None
    return row.case, row.provider, row.timing.method, row.timing.cache


def differences(first: Run, second: Run) -> list[str]:
    """What makes two runs hard to compare: another machine, another torch."""
    names = ("processor", "gpu", "threads", "torch", "triton", "driver")
    return [
        f"{name}: {first.facts.get(name)} and {second.facts.get(name)}"
        for name in names
        if first.facts.get(name) != second.facts.get(name)
    ]


def main(first: Path, second: Path) -> int:
    """Print the comparison; 1 when something became slower."""
    one, two = Run.load(first), Run.load(second)
    for line in differences(one, two):
        print(f"not the same: {line}")
    changes = compare(one, two)
    for change in changes:
        case = change.case
        what = f"{case.name} {case.variant} x{case.batch} {case.dtype} {case.direction} {change.provider}"
        times = f"{change.first_ms:10.3f} ms {change.second_ms:10.3f} ms {change.ratio:7.3f}"
        print(f"{what:60} {times}  noise {change.noise:.3f}  {change.verdict}")
    if not changes:
        print("the two runs have no case in common")
        return 1
    return 1 if any(change.verdict == "slower" for change in changes) else 0
