"""The CUDA kernel that gathers patches, compiled for every architecture: no spills, wide stores, one load a unit.

Its launcher is called too: what it refuses, it refuses before it asks for a GPU.
"""

from __future__ import annotations

import ctypes
import os
import re
import shutil
import subprocess
from collections import Counter
from pathlib import Path
from typing import NamedTuple

import pytest
import torch

ROOT = Path(__file__).parents[2]
NVCC = next(
    (
        path
        for path in (os.environ.get("CUDA_HOME", "") + "/bin/nvcc", shutil.which("nvcc"))
        if path and Path(path).exists()
    ),
    None,
)
ARCHITECTURES = ("80", "86", "90a", "100")
KERNELS = 3  # sizes of loads

pytestmark = pytest.mark.skipif(NVCC is None, reason="no nvcc")


class Kernel(NamedTuple):
    """What ptxas says of a kernel."""

    architecture: str
    name: str
    stack: int
    stores: int
    loads: int
    registers: int


def compile_cuda(output: Path, *flags: str, headers: Path = ROOT / "csrc") -> list[Kernel]:
    warnings = ["-Xcompiler=-Wall,-Wextra", "-Werror=all-warnings"]
    source = str(headers / "patch_rows_cuda.cu")
    command = [str(NVCC), "-std=c++20", "-O3", "-Xptxas=-v", *warnings, *flags, source, "-o", str(output)]
    built = subprocess.run(command, capture_output=True, text=True, timeout=280)
    assert built.returncode == 0, built.stdout + built.stderr
    report = re.compile(
        r"Compiling entry function '(\w+)' for 'sm_(\w+)'\n.*\n\s*(\d+) bytes stack frame, (\d+) bytes spill stores, "
        r"(\d+) bytes spill loads\n.*Used (\d+) registers"
    )
    found = report.findall(built.stderr)
    return [Kernel(architecture, name, *map(int, counts)) for name, architecture, *counts in found]


def spilling(kernels: list[Kernel]) -> list[Kernel]:
    """The kernels that keep anything in memory of a thread's own."""
    return [kernel for kernel in kernels if kernel.stack or kernel.stores or kernel.loads]


class Built(NamedTuple):
    library: Path
    kernels: list[Kernel]


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Built:
    library = tmp_path_factory.mktemp("cubin") / "patch_rows.so"
    codes = [f"-gencode=arch=compute_{name},code=sm_{name}" for name in ARCHITECTURES]
    newest = f"-gencode=arch=compute_{ARCHITECTURES[-1]},code=compute_{ARCHITECTURES[-1]}"
    kernels = compile_cuda(library, "-shared", "-Xcompiler=-fPIC", "-cudart=static", *codes, newest)
    return Built(library, kernels)


def cuobjdump(library: Path, what: str) -> str:
    triton = pytest.importorskip("triton")
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    done = subprocess.run([str(tool), what, str(library)], capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_no_kernel_spills(built: Built) -> None:
    assert Counter(kernel.architecture for kernel in built.kernels) == dict.fromkeys(ARCHITECTURES, KERNELS)
    assert spilling(built.kernels) == []
    for kernel in built.kernels:
        # the registers of a multiprocessor hold six blocks of 256 threads, which wait for memory alone
        assert kernel.registers <= 40, kernel


def test_gate_refuses_a_kernel_that_spills(tmp_path: Path) -> None:
    headers = tmp_path / "csrc"
    shutil.copytree(ROOT / "csrc", headers)
    kernel = headers / "patch_rows_kernel.h"
    text = kernel.read_text()
    in_registers = "bytes |= unit << (8 * i);"
    assert text.count(in_registers) == 1
    # registers have no index
    in_memory = "uint64_t kept[8] = {}; kept[byte % 8] = unit; bytes |= kept[y % 8] << (8 * i);"
    kernel.write_text(text.replace(in_registers, in_memory))
    kernels = compile_cuda(tmp_path / "spills.cubin", "-cubin", "-arch=sm_90a", headers=headers)
    assert len(kernels) == KERNELS
    assert spilling(kernels)


def test_machine_code_has_what_makes_it_fast(built: Built) -> None:
    instruction = re.compile(r"^\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_.]*)", re.MULTILINE)
    checked = Counter[str]()
    for part in re.split(r"^\s*code for sm_", cuobjdump(built.library, "-sass"), flags=re.MULTILINE)[1:]:
        # older tools leave out the letter of 90a
        architecture = part.split("\n", 1)[0].strip().rstrip("a")
        for function in part.split("Function : ")[1:]:
            counts = Counter(instruction.findall(function))
            names = Counter(name.split(".")[0] for name in counts.elements())
            checked[architecture] += 1
            assert names["LDL"] == names["STL"] == 0, architecture
            assert counts["STG.E.128"] == 1, architecture
            loads = {kind: counts[f"LDG.E.{kind}"] for kind in ("64", "U16", "U8")}
            assert sorted(loads.values()) in ([0, 0, 1], [0, 0, 4], [0, 0, 8]), (architecture, loads)
            # two bytes become float16 with one instruction that places and one that centres them
            assert min(names["PRMT"], names["HADD2"]) >= 4, architecture
    assert checked == {name.rstrip("a"): KERNELS for name in ARCHITECTURES}


def test_newer_gpus_find_intermediate_code(built: Built) -> None:
    assert re.findall(r"\.sm_(\w+)\.ptx", cuobjdump(built.library, "-lptx")) == [ARCHITECTURES[-1]]


class Arguments(ctypes.Structure):
    """PatchRowsArguments of csrc/patch_rows_cuda.h."""

    _fields_ = (
        ("pixels", ctypes.c_void_p),
        *((name, ctypes.c_int64) for name in ("frame_stride", "row_stride", "column_stride", "channel_stride")),
        *((name, ctypes.c_int64) for name in ("frames", "height", "width", "patch")),
        ("rows", ctypes.c_void_p),
    )


def launch(built: Built, **changes: int) -> bytes | None:
    # addresses are never followed: nothing is launched
    sizes = {"frames": 2, "height": 32, "width": 48, "patch": 16}
    strides = {"frame_stride": 4608, "row_stride": 144, "column_stride": 3, "channel_stride": 1}
    given = sizes | strides | {"pixels": 4096, "rows": 4096} | changes
    function = ctypes.CDLL(str(built.library))._ZN10xclip_fast17patch_rows_launchERKNS_18PatchRowsArgumentsEPv
    function.restype = ctypes.c_char_p
    function.argtypes = [ctypes.POINTER(Arguments), ctypes.c_void_p]
    return function(ctypes.byref(Arguments(**given)), None)


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"patch": 0}, b"patch_embed: patch must be positive"),
        ({"frames": -1}, b"patch_embed: frames must not be negative"),
        ({"height": 40}, b"patch_embed: height must be a multiple of patch"),
        ({"height": 0}, b"patch_embed: height must be a multiple of patch"),
        ({"width": 50}, b"patch_embed: width must be a multiple of patch"),
        ({"width": 32768 + 16}, b"patch_embed: frames are too large"),
        ({"frames": 1 << 40}, b"patch_embed: more blocks than a grid holds"),
        ({"rows": 4104}, b"patch_embed: rows must be 16-byte aligned"),
    ],
)
def test_launcher_refuses(built: Built, changes: dict[str, int], complaint: bytes) -> None:
    assert launch(built, **changes) == complaint


def test_no_frames_are_no_work(built: Built) -> None:
    assert launch(built, frames=0) is None


@pytest.mark.skipif(torch.cuda.is_available(), reason="addresses here are not those of a GPU")
@pytest.mark.parametrize(
    "layout",
    [{}, {"row_stride": 150}, {"column_stride": 1, "channel_stride": 1536}],
    ids=["words", "pairs", "planar"],
)
def test_without_a_gpu_the_reason_is_cudas(built: Built, layout: dict[str, int]) -> None:
    reason = launch(built, **layout)
    assert reason is not None
    assert b"CUDA" in reason or b"driver" in reason
