"""The report as a table of a hundred columns."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import groupby

from rich import box
from rich.table import Table

from benchmarks.compile_gate.build import KILOBYTE, Build

COLUMNS = ("sm", "regs", "spill", "KB", "CTAs", "128b", "code")


def table(builds: Iterable[Build], *, every: bool) -> Table:
    """A row for each kernel and architecture with the worst figures of its builds, or a row for each build."""
    found = Table(
        box=box.SIMPLE_HEAD,
        padding=0,
        pad_edge=False,
        caption="n: builds; regs: of a thread; spill: bytes of stack + loads and stores of it; KB: shared; "
        "CTAs: on a multiprocessor; 128b: wide accesses to memory; code: instructions; (has): some builds",
        caption_justify="left",
    )
    found.add_column("kernel", no_wrap=True)
    found.add_column("shape" if every else "n", no_wrap=True, justify="left" if every else "right")
    for name in COLUMNS:
        found.add_column(name, justify="right", no_wrap=True)
    found.add_column("has", no_wrap=True)
    for group in _groups(builds, every):
        first = group[0]
        found.add_row(
            first.kernel.strip("_").removesuffix("_kernel"),
            first.shape if every else str(len(group)),
            str(first.arch),
            _range([build.registers for build in group]),
            _spill(group),
            str(-(-max(build.shared for build in group) // KILOBYTE)),
            _range([build.blocks for build in group]),
            f"{min(build.wide for build in group)}%",
            str(max(build.size for build in group)),
            " ".join(_features(group)),
        )
    return found


def _groups(builds: Iterable[Build], every: bool) -> list[list[Build]]:
    def key(build: Build) -> tuple[str, str, int]:
        return build.kernel, build.shape if every else "", build.arch

    return [list(group) for _, group in groupby(sorted(builds, key=key), key=key)]


def _range(numbers: Sequence[int]) -> str:
    return f"{min(numbers)}-{max(numbers)}" if min(numbers) < max(numbers) else str(numbers[0])


def _spill(group: Sequence[Build]) -> str:
    stack, spills = max(build.stack for build in group), max(build.spills for build in group)
    return f"{stack}+{spills}" if stack or spills else "0"


def _features(group: Sequence[Build]) -> list[str]:
    names = dict.fromkeys(name for build in group for name in build.features)
    short = {name: name.removeprefix("MUFU.") for name in names}
    return [short[name] if all(name in build.features for build in group) else f"({short[name]})" for name in names]
