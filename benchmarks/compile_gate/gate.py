"""Laws that hold for every build, and budgets: what each build took when its figures were last accepted.

A law holds with any version of Triton: no spills, a program fits a multiprocessor, dots run on tensor cores.
Budgets are kept by version of Triton (3.9, not 3.9.1), since each compiles differently; a version without a file of
budgets is held to the laws alone.
"""

from __future__ import annotations

import json
import pkgutil
from collections.abc import Iterable, Iterator
from importlib import import_module
from pathlib import Path
from typing import Any, NamedTuple

import triton

import xclip_fast.kernels
from benchmarks.compile_gate.build import TALL, TENSOR_CORES, Build

BUDGETS = Path(__file__).parent / "budgets"
# registers are given out by eight
REGISTER_STEP = 8
# the code may grow a little, and lose a few wide accesses, before it is another code
GROWTH = 1.15
WIDE_SLACK = 5


class Budget(NamedTuple):
    """What a build may take, and what it must have.

    Attributes:
        registers, shared, size: at most; see ``Build``.
        blocks, wide: at least.
        features: instructions that must be there.
    """

    registers: int
    shared: int
    blocks: int
    size: int
    wide: int
    features: tuple[str, ...]

    @classmethod
    def of(cls, build: Build) -> Budget:
        """The budget that this build just meets."""
        registers = -(-build.registers // REGISTER_STEP) * REGISTER_STEP
        return cls(registers, build.shared, build.blocks, build.size, build.wide, build.features)


Budgets = dict[str, Budget]


def name_of(build: Build) -> str:
    """How a build is called among budgets."""
    return f"{build.kernel}, {build.variant}, sm_{build.arch}"


def broken_laws(build: Build) -> Iterator[str]:
    """What no build may do."""
    if build.stack or build.spills:
        yield f"spills registers: {build.stack} bytes of stack, {build.spills} loads and stores of local memory"
    if not build.blocks:
        yield f"does not fit a multiprocessor: {build.registers} registers, {build.shared} bytes of shared memory"
    if build.rows:
        wanted = TENSOR_CORES[build.arch] if max(build.rows) >= TALL else "HMMA"
        if wanted not in build.features:
            yield f"multiplies without tensor cores: no {wanted}"
    if build.exponentials and "MUFU.EX2" not in build.features:
        yield "has no MUFU.EX2: its exponentials are slow"


def overdrawn(build: Build, budget: Budget) -> Iterator[str]:
    """Where a build exceeds its budget."""
    if build.registers > budget.registers:
        yield f"{build.registers} registers, budget {budget.registers}"
    if build.shared > budget.shared:
        yield f"{build.shared} bytes of shared memory, budget {budget.shared}"
    if build.blocks < budget.blocks:
        yield f"{build.blocks} programs on a multiprocessor, budget {budget.blocks}"
    if build.size > budget.size * GROWTH:
        yield f"{build.size} instructions, budget {budget.size} and {GROWTH - 1:.0%}"
    if build.wide < budget.wide - WIDE_SLACK:
        yield f"{build.wide} % of the accesses are 128 bits wide, budget {budget.wide} % less {WIDE_SLACK}"
    lost = [name for name in budget.features if name not in build.features]
    if lost:
        yield f"lost {', '.join(lost)}"


def violations(builds: Iterable[Build], budgets: Budgets | None) -> list[str]:
    """A line for each law broken and each budget exceeded; no budgets means laws alone."""
    found = []
    for build in builds:
        complaints = list(broken_laws(build))
        if budgets is not None:
            budget = budgets.get(name_of(build))
            complaints += overdrawn(build, budget) if budget else ["has no budget"]
        found += [f"{build.kernel}, {build.shape}, sm_{build.arch}: {complaint}" for complaint in complaints]
    return found


def kernels() -> dict[str, Any]:
    """All kernels of the package by name: the jitted functions whose name ends in ``_kernel``."""
    found = {}
    for module in pkgutil.iter_modules(xclip_fast.kernels.__path__):
        for value in vars(import_module(f"xclip_fast.kernels.{module.name}")).values():
            name = getattr(getattr(value, "fn", None), "__name__", "")
            if name.endswith("_kernel"):
                found[name] = value
    return found


def budget_file(folder: Path = BUDGETS) -> Path:
    """The file of the running version of Triton, which need not exist."""
    return folder / f"triton-{'.'.join(triton.__version__.split('.')[:2])}.json"


def read_budgets(path: Path) -> Budgets | None:
    """Budgets by name of the build, or None where there is no such file."""
    if not path.exists():
        return None
    stored = json.loads(path.read_text())
    return {name: Budget(**fields | {"features": tuple(fields["features"])}) for name, fields in stored.items()}


def write_budgets(path: Path, budgets: Budgets) -> None:
    """One line a build, in order of the names."""
    lines = [f"{json.dumps(name)}: {json.dumps(budgets[name]._asdict())}" for name in sorted(budgets)]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("{\n" + ",\n".join(lines) + "\n}\n")


def changes(before: Budgets, after: Budgets) -> list[str]:
    """A line for each budget that is new, gone or different, and in which direction."""
    found = [f"{name}: new" for name in sorted(after.keys() - before.keys())]
    found += [f"{name}: gone" for name in sorted(before.keys() - after.keys())]
    for name in sorted(before.keys() & after.keys()):
        for field, old, new in zip(Budget._fields, before[name], after[name], strict=True):
            if old != new:
                found.append(f"{name}: {field} {_text(old)} -> {_text(new)} ({_direction(field, old, new)})")
    return found


def _direction(field: str, old: object, new: object) -> str:
    if field == "features":
        return "looser" if set(old) - set(new) else "tighter"  # type: ignore[call-overload]
    grows = new > old  # type: ignore[operator]
    return "tighter" if grows == (field in ("blocks", "wide")) else "looser"


def _text(value: object) -> str:
    return "+".join(value) or "none" if isinstance(value, tuple) else str(value)
