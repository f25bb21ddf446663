"""The CUDA kernel that gathers patches, replayed thread by thread on the host: every pixel in its place, no other."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch

from xclip_fast.ops._patch_contract import affine, channels_last
from xclip_fast.ops._patch_extension import pack_for_cuda
from xclip_fast.ops.patch_embed import patch_embed_ref

ROOT = Path(__file__).parents[2]
EMULATOR = Path(__file__).with_name("patch_rows_emulator.cpp")
COMPILER = shutil.which(os.environ.get("CXX", "g++"))
SANITIZERS = ["-fsanitize=address,undefined", "-fno-sanitize-recover=all"]

pytestmark = pytest.mark.skipif(COMPILER is None, reason="no C++ compiler")


def compile_emulator(program: Path, flags: Sequence[str], headers: Path = ROOT / "csrc") -> None:
    assert COMPILER is not None
    # of the kernel's unrolling a C++ compiler knows nothing
    usual = ["-std=c++20", "-Wall", "-Wextra", "-Werror", "-Wno-unknown-pragmas", "-fno-strict-aliasing"]
    command = [COMPILER, *usual, *flags, f"-I{headers}", str(EMULATOR), "-o", str(program)]
    built = subprocess.run(command, capture_output=True, text=True, timeout=200)
    assert built.returncode == 0, built.stderr


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    program = tmp_path_factory.mktemp("emulator") / "patch_rows_emulator"
    compile_emulator(program, flags=("-O1", "-g1", *SANITIZERS))
    return program


@pytest.fixture(scope="module")
def emulated(program: Path) -> dict[str, int]:
    """The bytes that each case reads at once: its rows were right, or there would be no line."""
    done = subprocess.run([str(program)], capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stdout + done.stderr
    return {name: int(unit) for name, unit in map(str.split, done.stdout.splitlines())}


def test_rows_are_the_pixels_of_patches(emulated: dict[str, int]) -> None:
    assert emulated == {
        **dict.fromkeys(("far", "b32-224", "b16-224", "b32-320", "one-patch-frames", "patch-8", "patch-48", "tall"), 8),
        "aligned-crop": 8,
        **dict.fromkeys(("l14-224", "l14-336", "patch-20", "flat", "even-crop"), 2),
        **dict.fromkeys(("patch-7", "patch-1", "crop", "odd-crop", "planar", "planar-crop"), 1),
    }


@pytest.mark.parametrize(
    ("header", "was", "becomes", "case", "complaint"),
    [
        # bytes, and where a patch lies
        ("kernel", "centred_pair<0x4342>(low)", "centred_pair<0x4340>(low)", "b16-224", "rows hold the pixels"),
        ("kernel", "grid.across) return", "grid.across + 1) return", "tall", "heap-buffer-overflow"),
        ("index", "byte % 3 * grid", "byte / 3 * grid", "planar", "heap-buffer-overflow"),
        # what fills rows up, where a pixel row ends, and how much is read at once
        ("kernel", "257 * kPixelCentre", "256 * kPixelCentre", "l14-224", "rows hold the pixels of their patches"),
        ("kernel", "byte == row_bytes", "byte >= row_bytes + kUnit", "patch-7", "rows hold the pixels"),
        ("kernel", "y < patch ?", "y <= patch ?", "l14-224", "rows hold the pixels"),
        ("index", "steps % 2 == 0 ? 2", "steps % 1 == 0 ? 2", "patch-7", "misaligned address"),
    ],
)  # fmt: skip
def test_planted_faults_are_found(
    tmp_path: Path, header: str, was: str, becomes: str, case: str, complaint: str
) -> None:
    headers = tmp_path / "csrc"
    shutil.copytree(ROOT / "csrc", headers)
    source = headers / f"patch_rows_{header}.h"
    text = source.read_text()
    assert text.count(was) == 1
    source.write_text(text.replace(was, becomes))
    flags = ("-O0", *(SANITIZERS if complaint in ("heap-buffer-overflow", "misaligned address") else []))
    compile_emulator(tmp_path / "emulator", flags, headers)
    done = subprocess.run([str(tmp_path / "emulator"), case], capture_output=True, text=True, timeout=200)
    assert done.returncode == 1, done.stdout + done.stderr
    assert complaint in done.stdout + done.stderr


@pytest.mark.parametrize(
    ("size", "patch"), [((2, 48, 64, 3), 16), ((2, 28, 70, 3), 14), ((1, 32, 64, 3), 32), ((2, 3, 27, 18), 9)]
)
def test_op_packs_what_the_rows_are_multiplied_by(
    program: Path, tmp_path: Path, size: tuple[int, ...], patch: int
) -> None:
    frames = torch.randint(0, 256, size, dtype=torch.uint8)
    pixels = channels_last(frames)
    count, height, width, _ = pixels.shape
    weight = (torch.randn(40, 3, patch, patch) / 50).half()
    class_embedding, positions = torch.randn(40).half(), torch.randn(1 + height // patch * (width // patch), 40).half()
    mean, std = (0.48, 0.46, 0.41), (0.27, 0.26, 0.28)
    (tmp_path / "pixels").write_bytes(frames.numpy().tobytes())
    numbers = [*pixels.stride(), count, height, width, patch]
    done = subprocess.run(
        [str(program), "--run", str(tmp_path), *map(str, numbers)], capture_output=True, text=True, timeout=100
    )
    assert done.returncode == 0, done.stdout + done.stderr
    exact = (tensor.double() for tensor in (weight, class_embedding, positions))
    expected = patch_embed_ref(frames, *exact, None, None, 1e-5, mean, std, torch.float64)
    packed, scale, table = pack_for_cuda(weight, class_embedding, positions, affine(mean, std))
    torch.testing.assert_close(table[0].double().expand(count, -1), expected[:, 0], rtol=1e-6, atol=1e-6)
    rows = torch.frombuffer(bytearray((tmp_path / "rows").read_bytes()), dtype=torch.float16).view(-1, packed.shape[1])
    patches = (rows.double() @ packed.double().T * scale).view_as(expected[:, 1:]) + table[1:]
    assert (patches - expected[:, 1:]).norm() <= 5e-4 * expected.norm()
