"""The build switch: what it builds, what it leaves out in one line, when it fails; what distributions hold."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
WITHOUT_TORCH = "import sys, runpy; sys.modules['torch'] = None; sys.argv = sys.argv[1:]; runpy.run_path('setup.py')"

pytest.importorskip("setuptools", minversion="77")


@pytest.fixture
def sources(tmp_path: Path) -> Path:
    """What setup.py reads, in a folder of its own."""
    for name in ("setup.py", "pyproject.toml", "MANIFEST.in", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, tmp_path)
    for folder in ("csrc", "kernels"):
        shutil.copytree(ROOT / folder, tmp_path / folder, ignore=shutil.ignore_patterns("__pycache__"))
    (tmp_path / "xclip_fast").mkdir()
    for name in ("__init__.py", "py.typed"):
        shutil.copy(ROOT / "xclip_fast" / name, tmp_path / "xclip_fast")
    return tmp_path


def setup(
    sources: Path, *arguments: str, mode: str, python: tuple[str, ...] = ("setup.py",), **changes: str
) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "XCLIP_FAST_BUILD_EXT": mode, **changes}
    command = [sys.executable, *python, *arguments]
    return subprocess.run(command, cwd=sources, env=environment, capture_output=True, text=True, timeout=250)


def libraries(sources: Path) -> list[str]:
    return sorted(path.name.split(".")[0] for path in sources.glob("**/*.so"))


def test_nothing_is_built_where_it_is_not_wanted(sources: Path) -> None:
    done = setup(sources, "--quiet", "build_ext", "--inplace", mode="0")
    assert done.returncode == 0, done.stderr
    assert libraries(sources) == []


def test_a_wrong_switch_is_an_error(sources: Path) -> None:
    done = setup(sources, "build_ext", mode="yes")
    assert done.returncode == 1
    assert done.stderr.strip() == "XCLIP_FAST_BUILD_EXT must be auto, 0 or 1, found 'yes'"


@pytest.mark.parametrize("missing", ["compiler", "torch"])
def test_what_is_missing_is_a_line_or_an_error(missing: str, sources: Path, tmp_path: Path) -> None:
    changes = {"PATH": str(tmp_path), "CXX": ""} if missing == "compiler" else {}
    python = ("setup.py",) if missing == "compiler" else ("-c", WITHOUT_TORCH, "setup.py")
    done = setup(sources, "--quiet", "build_ext", "--inplace", mode="auto", python=python, **changes)
    assert done.returncode == 0, done.stderr
    reason = "there is no C++ compiler" if missing == "compiler" else "No module named 'torch"
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("xclip_fast: ")]
    assert line.startswith(f"xclip_fast: a package without compiled extension: {reason}")
    assert libraries(sources) == []
    done = setup(sources, "--quiet", "build_ext", "--inplace", mode="1", python=python, **changes)
    assert done.returncode == 1
    assert f"xclip_fast: the extension cannot be built: {reason}" in done.stderr


def test_a_compiler_that_fails_is_a_line_or_an_error(sources: Path) -> None:
    pytest.importorskip("pybind11")
    for path in (sources / "csrc").glob("*.c*"):
        path.write_text("this is not C++")
    if shutil.which(os.environ.get("CXX", "c++")) is None:
        pytest.skip("there is no C++ compiler")
    done = setup(sources, "--quiet", "build_ext", "--inplace", mode="auto")
    assert done.returncode == 0, done.stderr
    assert libraries(sources) == []
    assert setup(sources, "--quiet", "build_ext", "--inplace", mode="1").returncode == 1


def test_a_source_distribution_holds_all_that_is_compiled(sources: Path) -> None:
    (sources / "xclip_fast" / "_native.so").write_bytes(b"of another machine")
    done = setup(sources, "--quiet", "sdist", mode="auto")
    assert done.returncode == 0, done.stderr
    (archive,) = (sources / "dist").glob("*.tar.gz")
    with tarfile.open(archive) as tar:
        names = {name.split("/", 1)[1] for name in tar.getnames() if "/" in name}
    assert {f"csrc/{path.name}" for path in (ROOT / "csrc").iterdir()} <= names
    assert {f"kernels/{path.name}" for path in (ROOT / "kernels").glob("*.py")} <= names
    assert {"setup.py", "pyproject.toml", "LICENSE"} <= names
    assert not [name for name in names if name.endswith(".so")]


def test_a_wheel_says_that_the_package_is_typed_and_holds_the_kernels(sources: Path) -> None:
    done = setup(sources, "--quiet", "bdist_wheel", mode="0")
    assert done.returncode == 0, done.stderr
    (wheel,) = (sources / "dist").iterdir()
    names = set(zipfile.ZipFile(wheel).namelist())
    assert {"xclip_fast/py.typed", "xclip_fast/kernels/layer_norm.py"} <= names
    assert not any(name.startswith("kernels/") for name in names)
