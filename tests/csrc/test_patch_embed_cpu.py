"""The CPU kernels under the address and undefined-behaviour sanitizers, on buffers of exactly their size."""

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


@pytest.mark.skipif(COMPILER is None, reason="there is no C++ compiler")
def test_no_access_out_of_bounds_and_no_undefined_behaviour(tmp_path: Path) -> None:
    program = tmp_path / "driver"
    headers = [f"-I{ROOT / 'csrc'}", f"-I{Path(torch.__file__).parent / 'include'}"]
    sources = [ROOT / "csrc" / "patch_embed_cpu.cpp", ROOT / "tests" / "csrc" / "patch_embed_cpu_driver.cpp"]
    built = subprocess.run([COMPILER, *FLAGS, *headers, *sources, "-o", program], capture_output=True, text=True)
    if "cannot find -lasan" in built.stderr or "cannot find -lubsan" in built.stderr:
        pytest.skip("this compiler has no sanitizers")
    assert built.returncode == 0, built.stderr
    done = subprocess.run([program], capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stderr) == (0, "")
    errors = [float(line) for line in done.stdout.split()]
    assert len(errors) == 20
    assert max(errors) < 1e-4
