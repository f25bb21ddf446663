"""One stem per op in every room: what is named in one folder is found in all."""

from __future__ import annotations

import ast
from importlib import import_module
from pathlib import Path

import pytest
import torch

import xclip_fast.ops

pytest.importorskip("triton")

from xclip_fast.ops._backends import BACKENDS

ROOT = Path(__file__).parents[2]
EXAMPLES = {"cases", "inputs"}  # of all ops
STEMS = sorted({path.stem for path in (ROOT / "xclip_fast" / "ops").glob("[!_]*.py")} - EXAMPLES)


def test_there_are_ops() -> None:
    assert len(STEMS) >= 5


@pytest.mark.parametrize("stem", STEMS)
def test_stem_has_all_its_rooms(stem: str) -> None:
    assert callable(getattr(xclip_fast.ops, stem)), "ops/__init__.py exports it"
    assert stem in xclip_fast.ops.__all__
    assert hasattr(import_module(f"xclip_fast.ops.{stem}"), f"{stem}_ref"), "the definition"
    assert callable(getattr(import_module(f"xclip_fast.kernels.{stem}"), f"{stem}_fwd")), "the launcher"
    assert hasattr(torch.ops.xclip_fast, stem), "the registered op"
    assert (ROOT / "tests" / "ops" / f"test_{stem}.py").exists()
    # an unknown op is an error, a known one only lacks its arguments
    with pytest.raises(TypeError):
        xclip_fast.ops.explain(stem)


def test_every_backend_is_named() -> None:
    assert set(BACKENDS) == {"reference", "torch", "triton", "extension"}


@pytest.mark.parametrize("path", sorted((ROOT / "kernels").glob("*.py")), ids=lambda path: path.stem)
def test_what_is_launched_is_named_a_kernel(path: Path) -> None:
    # by that name the compile gate and the tests of memory find it
    calls = [node.func for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Call)]
    launched = [call.value for call in calls if isinstance(call, ast.Subscript)]
    for kernel in launched:
        assert isinstance(kernel, ast.Name), f"line {kernel.lineno}: launched under another name"
        assert kernel.id.endswith("_kernel"), kernel.id
