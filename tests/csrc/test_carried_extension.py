"""A library that was built elsewhere: used where it is of these sources and for this GPU, built anew with a reason."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.gpu import prepare

LOADER = "import json, pathlib\nfound = json.loads(pathlib.Path('found.json').read_text())\n"
LOADER += "def refusal(): return found[0]\ndef architectures(): return found[1]\n"
# one that makes empty files, and none of NVIDIA's
COMPILER = """#!/bin/sh
while [ $# -gt 0 ]; do [ "$1" = -o ] && : > "$2"; shift; done
"""
WITHOUT_NVCC = """
import os, runpy, sys
access = os.access
os.access = lambda path, mode: not str(path).endswith("nvcc") and access(path, mode)
sys.argv = sys.argv[1:]
runpy.run_path("setup.py", run_name="__main__")
"""


@pytest.fixture
def carried(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., dict[str, Any]]:
    """Sources, a library of them as ``setup.py`` leaves it, and what its loader says; builds are only named."""
    for folder in ("csrc", "xclip_fast"):
        (tmp_path / folder).mkdir()
    (tmp_path / "csrc" / "a.cpp").write_text("int a;\n")
    (tmp_path / "setup.py").write_text("import sys; print('built', sys.argv[1:])\n")
    (tmp_path / "xclip_fast" / "__init__.py").touch()
    (tmp_path / "xclip_fast" / "_extension.py").write_text(LOADER)
    sums = subprocess.run(["sha256sum", "csrc/a.cpp", "setup.py"], cwd=tmp_path, capture_output=True, text=True)
    sources = tmp_path / "xclip_fast" / "_native.so.sources"
    sources.write_text(sums.stdout)
    inner = prepare.run
    monkeypatch.setattr(prepare, "SOURCES", sources)
    monkeypatch.setattr(prepare, "run", lambda *arguments: inner(*arguments, cwd=tmp_path))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))

    def build(refusal: str | None = None, architectures: tuple[str, ...] = ("8.0", "9.0a")) -> dict[str, Any]:
        (tmp_path / "found.json").write_text(json.dumps([refusal, architectures]))
        return prepare.build_extension("9.0")

    return build


def test_a_library_of_these_sources_for_this_gpu_is_used(carried: Callable[..., dict[str, Any]]) -> None:
    found = carried()
    assert (found["code"], found["output"]) == (0, "carried: it is of these sources, for 9.0a")
    assert "built" not in found
    assert "built" not in carried(architectures=("9.0a+PTX",))


@pytest.mark.parametrize(
    ("answer", "reason"),
    [
        ({"refusal": "it has interface 3"}, "it has interface 3"),
        ({"architectures": ("8.0", "9.0")}, "it is for 8.0, 9.0, and this one is 9.0a"),
        ({"architectures": ()}, "it is for no GPU, and this one is 9.0a"),
    ],
)
def test_one_that_does_not_load_or_is_for_others_is_built_anew(
    carried: Callable[..., dict[str, Any]], answer: dict[str, Any], reason: str
) -> None:
    found = carried(**answer)
    assert found["built"] == reason
    assert found["output"] == "built ['--quiet', 'build_ext', '--inplace', '--force']\n"


@pytest.mark.parametrize("change", ["csrc/a.cpp", "setup.py", "no list", "an empty list", "no loader"])
def test_one_of_other_sources_is_built_anew(
    change: str, carried: Callable[..., dict[str, Any]], tmp_path: Path
) -> None:
    if change == "no list":
        prepare.SOURCES.unlink()
    elif change == "an empty list":
        prepare.SOURCES.write_text("")
    elif change == "no loader":
        (tmp_path / "xclip_fast" / "_extension.py").write_text("raise OSError")
    else:
        with (tmp_path / change).open("a") as file:
            file.write("\n")
    assert {"csrc/a.cpp": "csrc/a.cpp: FAILED", "setup.py": "setup.py: FAILED"}.get(change, "") in carried()["built"]


def test_whoever_builds_says_of_what(tmp_path: Path) -> None:
    pytest.importorskip("setuptools", minversion="77")
    pytest.importorskip("pybind11")
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE", "csrc"):
        (tmp_path / name).symlink_to(prepare.ROOT / name)
    (tmp_path / "xclip_fast").mkdir()
    (tmp_path / "xclip_fast" / "__init__.py").write_text('__version__ = "0"\n')
    compiler = tmp_path / "c++"
    compiler.write_text(COMPILER)
    compiler.chmod(0o755)
    environment = os.environ | {"XCLIP_FAST_BUILD_EXT": "1", "CXX": str(compiler)}
    command = [sys.executable, "-c", WITHOUT_NVCC, "setup.py", "--quiet", "build_ext", "--inplace"]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    listed = (tmp_path / "xclip_fast" / "_native.so.sources").read_text()
    assert listed.count("\n") == 1 + len(list((prepare.ROOT / "csrc").iterdir()))
    checked = ["sha256sum", "--check", "--strict", "--quiet", "xclip_fast/_native.so.sources"]
    assert subprocess.run(checked, cwd=tmp_path).returncode == 0
