"""The CUDA patch embedding compiled for every architecture: no spills, tensor cores, asynchronous copies, wide stores.

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
KERNELS = 6 + 3  # three paths of the pixels, two tiles; rows, with three sizes of loads

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
    source = str(headers / "patch_embed_cuda.cu")
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
    library = tmp_path_factory.mktemp("cubin") / "patch_embed.so"
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
        # the registers of a multiprocessor hold two blocks of 256 threads and four of 128
        assert kernel.registers <= 128, kernel
        # and six of 256 that gather rows, which wait for memory alone
        assert kernel.registers <= 40 or "patch_rows" not in kernel.name, kernel


def test_gate_refuses_a_kernel_that_spills(tmp_path: Path) -> None:
    headers = tmp_path / "csrc"
    shutil.copytree(ROOT / "csrc", headers)
    maths = headers / "patch_embed_index.h"
    text = maths.read_text()
    two_blocks, four_blocks = "Tile<128, 128, 32, 64, 3, 2>", "Tile<128, 128, 32, 64, 3, 4>"
    assert text.count(two_blocks) == 1
    maths.write_text(text.replace(two_blocks, four_blocks))
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
            if "patch_rows_kernel" in function.split("\n", 1)[0]:
                assert counts["STG.E.128"] == 1, architecture
                loads = {kind: counts[f"LDG.E.{kind}"] for kind in ("64", "U16", "U8")}
                assert sorted(loads.values()) in ([0, 0, 1], [0, 0, 4], [0, 0, 8]), (architecture, loads)
                continue
            assert names["HMMA"] >= 24, architecture
            assert names["LDSM"] >= 6, architecture
            assert names["LDGSTS"] >= 3, architecture
            assert names["LDL"] == names["STL"] == 0, architecture
            assert counts["STG.E.128"] >= 5, architecture
            # two bytes become float16 with one instruction that places and one that centres them
            assert min(names["PRMT"], names["HADD2"]) >= 24, architecture
    assert checked == {name.rstrip("a"): KERNELS for name in ARCHITECTURES}


def test_newer_gpus_find_intermediate_code(built: Built) -> None:
    assert re.findall(r"\.sm_(\w+)\.ptx", cuobjdump(built.library, "-lptx")) == [ARCHITECTURES[-1]]


class Arguments(ctypes.Structure):
    """PatchEmbedArguments of csrc/patch_embed_cuda.h."""

    _fields_ = (
        ("pixels", ctypes.c_void_p),
        *((name, ctypes.c_int64) for name in ("frame_stride", "row_stride", "column_stride", "channel_stride")),
        *((name, ctypes.c_int64) for name in ("frames", "height", "width", "patch", "token_width")),
        *((name, ctypes.c_void_p) for name in ("weight", "table", "tokens")),
        ("token_type", ctypes.c_int32),
    )


class RowsArguments(ctypes.Structure):
    """PatchRowsArguments of csrc/patch_embed_cuda.h."""

    _fields_ = (*Arguments._fields_[:9], ("rows", ctypes.c_void_p))


def launch(built: Built, **changes: int) -> bytes | None:
    # addresses are never followed: nothing is launched
    sizes = {"frames": 2, "height": 32, "width": 48, "patch": 16, "token_width": 64}
    strides = {"frame_stride": 4608, "row_stride": 144, "column_stride": 3, "channel_stride": 1}
    pointers = {"pixels": 4096, "weight": 4096, "table": 4096, "tokens": 4096}
    library = ctypes.CDLL(str(built.library))
    function, kind = library._ZN10xclip_fast18patch_embed_launchERKNS_19PatchEmbedArgumentsEPv, Arguments
    if "rows" in changes:
        function, kind = library._ZN10xclip_fast17patch_rows_launchERKNS_18PatchRowsArgumentsEPv, RowsArguments
    given = sizes | strides | pointers | changes
    function.restype = ctypes.c_char_p
    function.argtypes = [ctypes.POINTER(kind), ctypes.c_void_p]
    return function(ctypes.byref(kind(**{name: given[name] for name, _ in kind._fields_ if name in given})), None)


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"patch": 0}, b"patch_embed: patch must be positive"),
        ({"token_width": 0}, b"patch_embed: token_width must be positive"),
        ({"frames": -1}, b"patch_embed: frames must not be negative"),
        ({"height": 40}, b"patch_embed: height must be a multiple of patch"),
        ({"height": 0}, b"patch_embed: height must be a multiple of patch"),
        ({"width": 50}, b"patch_embed: width must be a multiple of patch"),
        ({"width": 32768 + 16}, b"patch_embed: frames are too large"),
        ({"weight": 4098}, b"patch_embed: weight must be 16-byte aligned"),
        ({"frames": 1 << 40}, b"patch_embed: more blocks than a grid holds"),
        ({"token_type": 3}, b"patch_embed: no such token_type"),
        ({"rows": 4096, "patch": 0}, b"patch_embed: patch must be positive"),
        ({"rows": 4096, "width": 50}, b"patch_embed: width must be a multiple of patch"),
        ({"rows": 4104}, b"patch_embed: rows must be 16-byte aligned"),
        ({"rows": 4096, "frames": 1 << 40}, b"patch_embed: more blocks than a grid holds"),
    ],
)
def test_launcher_refuses(built: Built, changes: dict[str, int], complaint: bytes) -> None:
    assert launch(built, **changes) == complaint


def test_no_frames_are_no_work(built: Built) -> None:
    assert launch(built, frames=0) is None
    assert launch(built, rows=4096, frames=0) is None


@pytest.mark.skipif(torch.cuda.is_available(), reason="addresses here are not those of a GPU")
@pytest.mark.parametrize(
    "layout",
    [{}, {"row_stride": 150}, {"column_stride": 1, "channel_stride": 1536}, {"rows": 4096}],
    ids=["aligned", "skewed", "planar", "rows"],
)
@pytest.mark.parametrize("frames", [1, 10000], ids=["small", "large"])
def test_without_a_gpu_the_reason_is_cudas(built: Built, layout: dict[str, int], frames: int) -> None:
    reason = launch(built, frames=frames, **layout)
    assert reason is not None
    assert b"CUDA" in reason or b"driver" in reason
