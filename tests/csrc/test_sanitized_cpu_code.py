"""The C++ for the CPU under the address and undefined-behaviour sanitizers, on buffers of exactly their size."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[2]
COMPILER = next(
    (found for name in (os.environ.get("CXX", ""), "c++", "g++") if name and (found := shutil.which(name))), None
)
FLAGS = ["-std=c++20", "-O1", "-fopenmp-simd", "-fsanitize=address,undefined", "-fno-sanitize-recover=all"]


def largest_error(part: str, folder: Path, lines: int) -> float:
    """The worst of the errors that ``<part>_driver.cpp`` prints, one a line."""
    program = folder / "driver"
    headers = [f"-I{ROOT / 'csrc'}", f"-I{Path(torch.__file__).parent / 'include'}"]
    sources = [ROOT / "csrc" / f"{part}.cpp", ROOT / "tests" / "csrc" / f"{part}_driver.cpp"]
    built = subprocess.run([COMPILER, *FLAGS, *headers, *sources, "-o", program], capture_output=True, text=True)
    if "cannot find -lasan" in built.stderr or "cannot find -lubsan" in built.stderr:
        pytest.skip("this compiler has no sanitizers")
    assert built.returncode == 0, built.stderr
    done = subprocess.run([program], capture_output=True, text=True, timeout=120)
    if done.stdout == "not on this processor\n":
        pytest.skip(done.stdout.strip())
    assert (done.returncode, done.stderr) == (0, "")
    errors = [float(line) for line in done.stdout.split()]
    assert len(errors) == lines
    return max(errors)


# bfloat16 keeps three digits
@pytest.mark.skipif(COMPILER is None, reason="there is no C++ compiler")
@pytest.mark.parametrize(
    ("part", "lines", "limit"),
    [
        ("patch_embed_cpu", 20, 1e-4),
        ("frame_attention_cpu", 24, 4e-3),
        ("int8_rows_cpu", 10, 0.501),
        ("linear_cpu", 48, 1e-6),
    ],
)
def test_no_access_out_of_bounds_and_no_undefined_behaviour(
    part: str, lines: int, limit: float, tmp_path: Path
) -> None:
    assert largest_error(part, tmp_path, lines) < limit
