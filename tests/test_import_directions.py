"""The rooms of the package import each other as docs/design.md allows it, and no circle is allowed."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cache
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = "xclip_fast"
LINE = re.compile(r"^(\w+):((?: \w+,?)*)(?:; lazily((?: \w+,?)+))?$")


@dataclass
class Allowed:
    """What a room may import: when it is imported itself, and what only when its functions run."""

    eager: set[str] = field(default_factory=set)
    lazy: set[str] = field(default_factory=set)


def read(page: str) -> dict[str, Allowed]:
    """The list of docs/design.md.

    Raises:
        ValueError: a line of it says nothing.
    """
    block = page.partition("## Allowed imports")[2].partition("```text\n")[2].partition("```")[0]
    rooms = {}
    for line in block.splitlines():
        found = LINE.match(line)
        if found is None:
            raise ValueError(f"not `room: a, b; lazily c`: {line!r}")
        eager, lazy = (set(re.findall(r"\w+", part or "")) for part in found.groups()[1:])
        rooms[found[1]] = Allowed(eager, lazy)
    return rooms


def files() -> Iterator[tuple[str, Path]]:
    """Each source file with its room."""
    for path in sorted((ROOT / PACKAGE).rglob("*.py")):
        inner = path.relative_to(ROOT / PACKAGE).with_suffix("").parts
        # a checkout may have a link to the other folder in this one
        if inner[0] != "kernels":
            yield PACKAGE if inner == ("__init__",) else inner[0], path
    yield from (("kernels", path) for path in sorted((ROOT / "kernels").rglob("*.py")))


def imported(source: str, rooms: set[str]) -> Iterator[tuple[str, bool]]:
    """The rooms that a file imports, and whether only later than itself."""

    def walk(node: ast.AST, lazy: bool) -> Iterator[tuple[str, bool]]:
        for child in ast.iter_child_nodes(node):
            yield from ((room, lazy) for room in _named(child, rooms))
            types = isinstance(child, ast.If) and "TYPE_CHECKING" in ast.unparse(child.test)
            yield from walk(child, lazy or types or isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef))

    yield from walk(ast.parse(source), False)


def _named(node: ast.AST, rooms: set[str]) -> Iterator[str]:
    names = []
    if isinstance(node, ast.Import):
        names = [alias.name for alias in node.names]
    elif isinstance(node, ast.ImportFrom):
        assert node.level == 0, f"line {node.lineno}: a relative import"
        names = [node.module or ""]
        if node.module == PACKAGE:
            names = [f"{PACKAGE}.{alias.name}" for alias in node.names]
    for name in names:
        first, _, rest = name.partition(".")
        if first == PACKAGE:
            room = rest.partition(".")[0]
            yield room if room in rooms else PACKAGE


@cache
def used() -> dict[str, Allowed]:
    """What the rooms import."""
    found = {room: Allowed() for room in ROOMS}
    for room, path in files():
        for other, lazy in imported(path.read_text(encoding="utf-8"), ROOMS):
            if other != room:
                (found[room].lazy if lazy else found[room].eager).add(other)
    for one in found.values():
        one.lazy -= one.eager
    return found


def circle(graph: Mapping[str, Allowed]) -> list[str] | None:
    """A circle of imports that happen at once. Returns its rooms, or None."""
    try:
        TopologicalSorter({room: allowed.eager for room, allowed in graph.items()}).prepare()
    except CycleError as error:
        return list(error.args[1])
    return None


ALLOWED = read((ROOT / "docs" / "design.md").read_text(encoding="utf-8"))
ROOMS = {room for room, _ in files()}


def test_the_page_names_every_room_and_no_other() -> None:
    assert set(ALLOWED) == ROOMS
    assert {name for one in ALLOWED.values() for name in one.eager | one.lazy} <= ROOMS


@pytest.mark.parametrize("room", sorted(ROOMS))
def test_a_room_imports_what_the_page_allows_and_no_less(room: str) -> None:
    # a permission that nobody needs any more is taken from the page
    found, allowed = used()[room], ALLOWED.get(room, Allowed())
    assert (sorted(found.eager), sorted(found.lazy)) == (sorted(allowed.eager), sorted(allowed.lazy))


def test_no_circle() -> None:
    assert circle(ALLOWED) is None
    assert circle(used()) is None


def test_a_circle_is_seen() -> None:
    assert set(circle(read("## Allowed imports\n```text\na: b\nb: c\nc: a\n```")) or ()) == {"a", "b", "c"}
    assert circle(read("## Allowed imports\n```text\na: b\nb: c; lazily a\nc:\n```")) is None


def test_a_line_that_says_nothing_is_an_error() -> None:
    with pytest.raises(ValueError, match="a -> b"):
        read("## Allowed imports\n```text\na -> b\n```")


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("import xclip_fast.ops.layer_norm", ("ops", False)),
        ("from xclip_fast import ops", ("ops", False)),
        ("from xclip_fast import __version__", ("xclip_fast", False)),
        ("import xclip_fast", ("xclip_fast", False)),
        ("class A:\n    from xclip_fast.ops import layer_norm", ("ops", False)),
        ("def f():\n    from xclip_fast.ops import layer_norm", ("ops", True)),
        ("if TYPE_CHECKING:\n    from xclip_fast.ops import layer_norm", ("ops", True)),
        ("try:\n    from xclip_fast.ops import layer_norm\nexcept ImportError:\n    pass", ("ops", False)),
    ],
)
def test_an_import_is_found_wherever_it_stands(line: str, expected: tuple[str, bool]) -> None:
    assert list(imported(line, {"ops"})) == [expected]
    assert list(imported("import torch\nfrom pathlib import Path", {"ops"})) == []
