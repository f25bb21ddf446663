"""Tuning tables: what was measured on a GPU in place of the defaults. One JSON file a GPU, read once; none is needed.

``benchmarks.gpu.tune`` writes them from a sweep. A table names the tiles of a launch by the arguments of the function
that gives them, and the backend of a call by the shapes of its tensors; every other launch keeps the default. A file
that cannot be read breaks no call, and entries that are no tiles are left out, with a line in the debug log.
"""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Callable, Sequence
from functools import update_wrapper
from importlib.resources import files
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

SCHEMA = 1
BACKENDS = ("torch", "triton")  # that run wherever the kernels do
LARGEST = 512  # rows, columns, warps or stages: nothing a launch is cut into is larger
MOST_STAGES = 8
KEPT = 1024  # results of one function: batches of any size come by

_log = logging.getLogger("xclip_fast")
_read: dict[str, Any] | None = None


def slug(gpu: str) -> str:
    """The name of a GPU as a file's."""
    return re.sub(r"[^a-z0-9]+", "-", gpu.lower()).strip("-")


def table() -> dict[str, Any] | None:
    """The table of this machine's GPU, empty without one; nothing before CUDA is in use."""
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
    """A pure function of a launch's shape that gives its tiles, and what a table says instead.

    Args:
        default: takes positional arguments and returns a named tuple or tuple.
        name: in a table.
        fixed: places of the result that are what the kernel needs, not a choice.
        numbers: the result as numbers for a table; by default its own.
        build: the result from the arguments and such numbers.
        optional: places of the numbers that may be 0.
    """

    def __init__(
        self,
        default: Callable[..., Any],
        name: str,
        fixed: Sequence[int],
        numbers: Callable[[Any], list[int]],
        build: Callable[..., Any] | None,
        optional: Sequence[int],
    ) -> None:
        update_wrapper(self, default)
        self.default, self.name, self.fixed, self.numbers, self.build = default, name, fixed, numbers, build
        self.optional = optional
        # by the function's arguments; nothing until the table is read
        self.tuned: dict[tuple[Any, ...], Any] | None = None

    def __call__(self, *shape: Any) -> Any:
        """The tuned tiles of a launch, or the default's."""
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

    def _choose(self, shape: tuple[Any, ...]) -> Any:
        default = self.default(*shape)
        entry = self.entries.get(shape_key(shape)) if isinstance(self.entries, dict) else None
        if entry is None:
            return default
        try:
            return self.made(shape, default, entry)
        except (TypeError, ValueError) as error:
            _log.debug("the tuning table's %s of %s is left out: %s", self.name, shape_key(shape), error)
            return default

    def made(self, shape: tuple[Any, ...], default: Any, entry: Any) -> Any:
        """The result that numbers of a table stand for.

        Raises:
            TypeError, ValueError: they stand for none.
        """
        usual = self.numbers(default)
        if not isinstance(entry, list) or len(entry) != len(usual):
            raise ValueError(f"{len(usual)} numbers are needed, found {entry!r}")
        for place, (number, one) in enumerate(zip(entry, usual, strict=True)):
            least = 0 if place in self.optional else 1
            if type(number) is not int or not least <= number <= max(LARGEST, one):
                raise ValueError(f"no such size: {number!r}")
            # the last is often that of stages
            if number & (number - 1) and not (place == len(usual) - 1 and number <= MOST_STAGES):
                raise ValueError(f"{number} is no power of two")
            if place in self.fixed and number != one:
                raise ValueError(f"number {place} must be {one}, found {number}")
        if self.build is not None:
            return self.build(*shape, *entry)
        return type(default)(*entry) if hasattr(default, "_fields") else type(default)(entry)


def tunable(
    name: str,
    *,
    fixed: Sequence[int] = (),
    numbers: Callable[[Any], list[int]] = list,
    build: Callable[..., Any] | None = None,
    optional: Sequence[int] = (),
) -> Callable[[Callable[..., Any]], Tunable]:
    """Make a function of tiles tunable; see ``Tunable``."""
    return lambda default: Tunable(default, name, fixed, numbers, build, optional)


def tuned_backend(op: str, tensors: Sequence[Tensor | None]) -> str | None:
    """The backend that a table names for a call, or nothing."""
    # a compiler would trace the file into its graph
    found = None if torch.compiler.is_compiling() else table()
    if not found:
        return None
    calls = found["backends"].get(op)
    name = calls.get(call_key(tensors)) if isinstance(calls, dict) else None
    return name if name in BACKENDS else None
