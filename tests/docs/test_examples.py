"""The examples of the documentation run: those in public docstrings, each of which has one, and those of the pages."""

from __future__ import annotations

import doctest
import re
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import xclip_fast
from xclip_fast.demo.clips import make_clip
from xclip_fast.demo.mp4 import write_mp4

DOCS = Path(__file__).parents[2] / "docs"
ROOMS = sorted(path.stem for path in (DOCS / "api").glob("*.md"))
PAGES = sorted(path for path in DOCS.rglob("*.md") if ">>> " in path.read_text(encoding="utf-8"))
OPTIONS = doctest.NORMALIZE_WHITESPACE | doctest.ELLIPSIS
WHOLE = ("checkpoints", "data", "engine", "evaluate", "layers", "ops", "pipeline", "reference", "text", "video")


def shown(room: str) -> list[str]:
    """What a page of the API reference shows."""
    return re.findall(r"^::: (\S+)", (DOCS / "api" / f"{room}.md").read_text(encoding="utf-8"), re.MULTILINE)


def resolved(name: str) -> Any:
    """The object of a dotted name."""
    module, _, attribute = name.rpartition(".")
    return getattr(import_module(module), attribute)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the examples run: with two videos, clip.mp4 of 12 frames of 48 x 64, and one of a shape moving right."""
    pytest.importorskip("av")
    path = tmp_path_factory.mktemp("examples")
    write_mp4(path / "clip.mp4", np.repeat(np.arange(12, dtype=np.uint8), 48 * 64 * 3).reshape(12, 48, 64, 3))
    write_mp4(path / "moving_right.mp4", make_clip(0, seed=0))
    return path


@pytest.fixture
def run(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[doctest.DocTestRunner]:
    monkeypatch.chdir(folder)
    # an example is not about its backend, and the interpreter is slow
    with xclip_fast.ops.backend("torch"):
        yield doctest.DocTestRunner(optionflags=OPTIONS)


@pytest.mark.parametrize("room", ROOMS)
def test_each_public_docstring_has_an_example(room: str) -> None:
    without = [name for name in shown(room) if ">>> " not in (resolved(name).__doc__ or "")]
    assert not without, f"no Example: {', '.join(without)}"


@pytest.mark.parametrize("room", ROOMS)
def test_the_examples_of_the_docstrings_run(room: str, run: doctest.DocTestRunner) -> None:
    tried = 0
    for name in shown(room):
        for example in doctest.DocTestFinder(recurse=True).find(resolved(name), name):
            tried += run.run(example, clear_globs=True).attempted
    assert run.summarize(verbose=False).failed == 0
    assert tried or not shown(room)


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.stem)
def test_the_examples_of_the_pages_run(path: Path, run: doctest.DocTestRunner) -> None:
    # fences end an example as a blank line does
    text = re.sub(r"^```.*$", "", path.read_text(encoding="utf-8"), flags=re.MULTILINE)
    example = doctest.DocTestParser().get_doctest(text, {}, path.stem, str(path), 0)
    assert run.run(example).failed == 0


@pytest.mark.parametrize("room", WHOLE)
def test_the_reference_shows_every_public_name(room: str) -> None:
    module = import_module(f"xclip_fast.{room}")
    public = {name for name in module.__all__ if callable(getattr(module, name))}
    assert public <= {name.rpartition(".")[2] for name in shown(room)}


def test_the_reference_shows_the_package() -> None:
    every = {name.rpartition(".")[2] for room in ROOMS for name in shown(room)}
    assert {name for name in xclip_fast.__all__ if callable(getattr(xclip_fast, name))} <= every
