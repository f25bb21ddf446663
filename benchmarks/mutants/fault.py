"""A planted fault: one text of the sources replaced by another."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path


class FaultError(Exception):
    """A fault no longer fits the sources."""


@dataclass(frozen=True)
class Fault:
    """One fault.

    Attributes:
        name: says what is planted; unique.
        place: the file, or the folder of the sources one of which has ``old``.
        old: occurs exactly once in ``place``.
        new: stands in its place.
        tests: what pytest runs, the likeliest first; the fault is caught where one of them fails.
        equivalent: why no test can tell it from the code as it is; without it a fault that survives is a gap.
    """

    name: str
    place: str
    old: str
    new: str
    tests: tuple[str, ...]
    equivalent: str = ""

    def planted(self, root: Path) -> tuple[Path, str]:
        """The file that the fault is in, relative to the root, and its text with the fault.

        Raises:
            FaultError: ``old`` is not there exactly once, or is what stands in its place.
        """
        place = root / self.place
        # the newest place of what moves: a folder outlives its files
        files = [place] if place.is_file() else sorted(p for p in place.rglob("*") if p.suffix in SOURCES)
        found = [(path, path.read_text().count(self.old)) for path in files]
        found = [(path, count) for path, count in found if count]
        if sum(count for _, count in found) != 1 or self.old == self.new:
            where = ", ".join(f"{path.relative_to(root)}: {count}" for path, count in found) or "nowhere"
            raise FaultError(f"{self.name}: {self.old!r} must be in {self.place} once, found {where}")
        path = found[0][0]
        return path.relative_to(root), path.read_text().replace(self.old, self.new)


SOURCES = (".py", ".cpp", ".h", ".cu")


def in_room(place: str, *tests: str) -> Maker:
    """Makes the faults of one place that the same tests should catch."""
    return Maker(place, tests)


@dataclass(frozen=True)
class Maker:
    """See ``in_room``."""

    place: str
    tests: tuple[str, ...]

    def __call__(self, name: str, old: str, new: str, *first: str, equivalent: str = "") -> Fault:
        """A fault; ``first`` are tests to run before those of the room."""
        return Fault(name, self.place, old, new, (*first, *self.tests), equivalent)
