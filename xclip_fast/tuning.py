"""Tiles of the kernels: what a kernel is cut into, what else to try, and what was measured on a GPU.

Each kernel's tile comes from a pure function of its launch's shape, made tunable beside the kernel. In its place steps
what ``override`` asks for, else what a GPU's table names: one JSON file a GPU, read once; none is needed. A table also
names backends of calls, by the shapes of their tensors. A file that cannot be read breaks no call, and entries that are
no tiles are left out, with a line in the debug log. ``python -m benchmarks tune`` measures; docs/tuning.md tells how.
"""

from __future__ import annotations

import json
import logging
import pkgutil
import re
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from functools import update_wrapper
from importlib import import_module
from importlib.resources import files
from itertools import product
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import torch
from torch import Tensor

SCHEMA = 2
BACKENDS = ("torch", "triton")  # that run wherever the kernels do
LARGEST = 512  # a side of a tile, or twice the default's where that is more
MOST_WARPS = 32
MOST_STAGES = 8
MOST_CANDIDATES = 8
KEPT = 1024  # results of one function: batches of any size come by

Sizes = Mapping[str, int]

_log = logging.getLogger("xclip_fast")
_read: dict[str, Any] | None = None


class Tile(NamedTuple):
    """What one program of a kernel computes at a time, and how Triton compiles it.

    Attributes:
        rows, columns: sides of the block of results; of attention, queries and keys.
        depth: terms that one step of a sum takes.
        num_warps, num_stages: the launch options of Triton of that name, and its defaults.

    A kernel without such a side has 0 there.
    """

    rows: int = 0
    columns: int = 0
    depth: int = 0
    num_warps: int = 4
    num_stages: int = 3


# by name of the kernel, in this thread or asyncio task
_overrides: ContextVar[Mapping[str, Sizes]] = ContextVar("xclip_fast.tuning.override", default=MappingProxyType({}))
_tunables: dict[str, Tunable] = {}


def slug(gpu: str) -> str:
    """The name of a GPU as a file's."""
    return re.sub(r"[^a-z0-9]+", "-", gpu.lower()).strip("-")


def table() -> dict[str, Any] | None:
    """The table of this machine's GPU, empty without one; None before CUDA is in use."""
    global _read
    if _read is None and torch.cuda.is_initialized():
        _read = read(path_of(torch.cuda.get_device_name()))
    return _read


def path_of(gpu: str) -> Path:
    """Where the table of a GPU is, or would be."""
    return Path(str(files("xclip_fast.kernels"))) / "tuning" / f"{slug(gpu)}.json"


def read(path: Path) -> dict[str, Any]:
    """A table from its file; empty where there is none, or one of another schema."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        if found["schema"] == SCHEMA and isinstance(found["tiles"], dict) and isinstance(found["backends"], dict):
            _log.debug("tuned by %s", path.name)
            return found
        reason = "another schema"
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        reason = f"{type(error).__name__}: {error}"
    _log.debug("the tuning table %s is left out: %s", path.name, reason)
    return {}


def shape_key(shape: Sequence[object]) -> str:
    """The arguments of a function of tiles as a table names them."""
    return " ".join(map(str, shape))


def call_key(tensors: Sequence[Tensor | None]) -> str:
    """The tensors of a call as a table names them."""
    return " ".join("-" if x is None else f"{x.dtype}:{'x'.join(map(str, x.shape))}" for x in tensors)


class Tunable:
    """A pure function of a launch's shape that gives its tile, and what an override or a table says instead.

    Args:
        default: takes positional arguments and returns a ``Tile``.
        name: in a table, and in ``override``.
        op: the op whose call launches the kernel.
        backward: the launch is one of its backward pass.
        fixed: fields that are what the kernel needs, not a choice.
        optional: sides that may be 0.
        cut: what a tile comes to, from the tile and the shape; raises ValueError where that launch is impossible.
        sizes: what else to try, as changes of the default.
    """

    def __init__(
        self,
        default: Callable[..., Tile],
        name: str,
        op: str,
        backward: bool = False,
        fixed: Sequence[str] = (),
        optional: Sequence[str] = (),
        cut: Callable[..., Hashable] | None = None,
        sizes: Sequence[Sizes] = (),
    ) -> None:
        update_wrapper(self, default)
        self.default, self.name, self.op, self.backward = default, name, op, backward
        self.fixed, self.optional, self.cut, self.sizes = fixed, optional, cut, sizes
        # by the function's arguments; None until the table is read
        self.tuned: dict[tuple[Any, ...], Tile] | None = None

    def __call__(self, *shape: Any) -> Tile:
        """The tile of a launch: the override's, the table's or the default.

        Raises:
            ValueError: the override does not fit this launch.
        """
        overrides = _overrides.get()
        if overrides and (sizes := overrides.get(self.name)) is not None:
            return self.made(shape, sizes)
        tuned = self.tuned
        if tuned is None:
            found = table()
            if found is None:
                return self.default(*shape)
            # another thread may look at any time: what it finds is whole
            self.entries = found.get("tiles", {}).get(self.name, {})
            self.tuned = tuned = {}
        if (result := tuned.get(shape)) is None:
            if len(tuned) >= KEPT:
                tuned.clear()
            result = tuned[shape] = self._choose(shape)
        return result

    def _choose(self, shape: tuple[Any, ...]) -> Tile:
        entry = self.entries.get(shape_key(shape)) if isinstance(self.entries, dict) else None
        if entry is None:
            return self.default(*shape)
        try:
            return self.made(shape, entry)
        except ValueError as error:
            _log.debug("the tuning table's %s is left out: %s", self.name, error)
            return self.default(*shape)

    def made(self, shape: tuple[Any, ...], sizes: Sizes) -> Tile:
        """The default of a launch with the sizes given in its place.

        Raises:
            ValueError: that is no tile of this kernel, or none for this shape.
        """
        default = self.default(*shape)
        check_sizes(self.name, sizes)
        for field, number in sizes.items():
            usual = getattr(default, field)
            if number == usual:
                continue
            if field in self.fixed or (usual == 0 and field not in self.optional):
                raise ValueError(f"{self.name} at {shape_key(shape)}: {field} must be {usual}, found {number}")
            if number == 0 and field not in self.optional:
                raise ValueError(f"{self.name} at {shape_key(shape)}: {field} cannot be 0")
            if field not in ("num_warps", "num_stages") and number > max(LARGEST, 2 * usual):
                raise ValueError(f"{self.name} at {shape_key(shape)}: {field} is too large, found {number}")
        tile = default._replace(**sizes)
        if self.cut is not None:
            self.cut(tile, *shape)
        return tile

    def sizes_of(self, tile: Tile) -> dict[str, int]:
        """A tile as a table has it: the fields that this kernel has."""
        return {field: number for field, number in tile._asdict().items() if number or field in self.optional}

    def candidates(self, *shape: Any) -> list[Tile]:
        """The default of a launch and what else to try, at most ``MOST_CANDIDATES``, no two of which come to the same.

        Sizes that do not fit the shape are left out.
        """
        found: dict[Hashable, Tile] = {}
        for sizes in ({}, *self.sizes):
            try:
                tile = self.made(shape, sizes)
            except ValueError:
                continue
            what = tile if self.cut is None else (self.cut(tile, *shape), tile.num_warps, tile.num_stages)
            found.setdefault(what, tile)
        return list(found.values())[:MOST_CANDIDATES]


def tunable(
    name: str,
    *,
    op: str | None = None,
    backward: bool = False,
    fixed: Sequence[str] = (),
    optional: Sequence[str] = (),
    cut: Callable[..., Hashable] | None = None,
    candidates: Sequence[Sizes],
) -> Callable[[Callable[..., Tile]], Tunable]:
    """Make a function of tiles tunable; see ``Tunable``. Without ``op`` that is the name."""

    def register(default: Callable[..., Tile]) -> Tunable:
        made = Tunable(default, name, op or name, backward, fixed, optional, cut, candidates)
        _tunables[name] = made
        return made

    return register


def every(**sizes: Sequence[int]) -> list[Sizes]:
    """Every combination of the sizes named, the last one varied first."""
    return [dict(zip(sizes, chosen, strict=True)) for chosen in product(*sizes.values())]


def listed(fields: str, *sizes: Sequence[int]) -> list[Sizes]:
    """A line each of the fields named."""
    return [dict(zip(fields.split(), line, strict=True)) for line in sizes]


def tunables() -> dict[str, Tunable]:
    """Every tunable function of the kernels by name.

    Raises:
        ImportError: Triton is not installed.
    """
    kernels = import_module("xclip_fast.kernels")
    for module in pkgutil.iter_modules(kernels.__path__):
        import_module(f"xclip_fast.kernels.{module.name}")
    return _tunables


def check_sizes(name: str, sizes: object) -> None:
    """Refuse what is no tile of any launch.

    Raises:
        ValueError: what and why.
    """
    if not isinstance(sizes, Mapping):
        raise ValueError(f"{name}: a tile is sizes by name, found {sizes!r}")
    for field, number in sizes.items():
        if field not in Tile._fields:
            raise ValueError(f"{name}: a tile has {', '.join(Tile._fields)}, found {field!r}")
        if type(number) is not int or number < (field in ("num_warps", "num_stages")):
            raise ValueError(f"{name}: {field} must be a size, found {number!r}")
        most = {"num_warps": MOST_WARPS, "num_stages": MOST_STAGES}.get(field)
        if most is not None and number > most:
            raise ValueError(f"{name}: {field} is at most {most}, found {number}")
        if field != "num_stages" and number & (number - 1):
            raise ValueError(f"{name}: {field} must be a power of two, found {number}")


@contextmanager
def override(name: str, **sizes: int) -> Iterator[None]:
    """Launch a kernel with other tiles than its default's or a table's inside the context.

    It holds for the launches of this thread, or of this asyncio task, and for the backward passes that they call, which
    do not go on in threads of their own meanwhile. Contexts nest: inside of two of one kernel, the inner one holds.

    Args:
        name: of the kernel, as in a table; ``tunables()`` has all.
        sizes: fields of ``Tile``; those not given stay the default's.

    Raises:
        ValueError: there is no such kernel, or the sizes are no tile. Where they do not fit the shape of a launch, that
            launch raises it.

    Example:
        >>> from xclip_fast import tuning
        >>> with tuning.override("layer_norm", rows=1, num_warps=8):  # doctest: +SKIP
        ...     model.encode_video(video)
    """
    known = tunables()
    if name not in known:
        raise ValueError(f"unknown kernel {name!r}: choose one of {', '.join(sorted(known))}")
    check_sizes(name, sizes)
    token = _overrides.set({**_overrides.get(), name: sizes})
    try:
        # a thread of autograd's would not see the context
        with torch.autograd.set_multithreading_enabled(False):
            yield
    finally:
        _overrides.reset(token)


def tuned_backend(op: str, tensors: Sequence[Tensor | None]) -> str | None:
    """The backend that a table names for a call, or None."""
    # a compiler would trace the file into its graph
    found = None if torch.compiler.is_compiling() else table()
    if not found:
        return None
    calls = found["backends"].get(op)
    name = calls.get(call_key(tensors)) if isinstance(calls, dict) else None
    return name if name in BACKENDS else None
