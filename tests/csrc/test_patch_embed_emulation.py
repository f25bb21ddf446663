"""The CUDA patch embedding, replayed lane by lane on the host: right against a convolution in double precision."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import pytest
import torch

from xclip_fast.ops._patch_contract import affine, channels_last
from xclip_fast.ops._patch_extension import pack_rows, pack_stages
from xclip_fast.ops.patch_embed import patch_embed_ref

ROOT = Path(__file__).parents[2]
EMULATOR = Path(__file__).with_name("patch_embed_emulator.cpp")
COMPILER = shutil.which(os.environ.get("CXX", "g++"))
SANITIZERS = ["-fsanitize=address,undefined", "-fno-sanitize-recover=all"]
KILOBYTE = 1024

pytestmark = pytest.mark.skipif(COMPILER is None, reason="no C++ compiler")


class Figures(NamedTuple):
    """What the emulator says of a case: its rules held, or there would be no line.

    ``pixel_conflicts`` and ``weight_conflicts`` count how often the worst bank of shared memory is read at once.
    """

    path: str
    error: float
    pixel_conflicts: int
    weight_conflicts: int
    shared: int


def compile_emulator(program: Path, flags: Sequence[str], headers: Path = ROOT / "csrc") -> None:
    assert COMPILER is not None
    # of the kernel's unrolling, and its wide stores, a C++ compiler knows nothing
    usual = ["-std=c++20", "-Wall", "-Wextra", "-Werror", "-Wno-unknown-pragmas", "-fno-strict-aliasing"]
    command = [COMPILER, *usual, *flags, f"-I{headers}", str(EMULATOR), "-o", str(program)]
    built = subprocess.run(command, capture_output=True, text=True, timeout=200)
    assert built.returncode == 0, built.stderr


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    program = tmp_path_factory.mktemp("emulator") / "patch_embed_emulator"
    compile_emulator(program, flags=("-O1", "-g1", *SANITIZERS))
    return program


@pytest.fixture(scope="module")
def emulated(program: Path) -> dict[tuple[str, str], Figures]:
    done = subprocess.run([str(program)], capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stdout + done.stderr
    figures = {}
    for line in done.stdout.splitlines():
        name, tile, path, error, *counts = line.split()
        figures[name, tile] = Figures(path, float(error), *map(int, counts))
    return figures


@pytest.mark.parametrize("tile", ["large", "small"])
@pytest.mark.parametrize(
    ("name", "path"),
    [
        ("b32-224", "aligned"),
        ("b16-224", "aligned"),
        ("l14-224", "skewed"),
        ("l14-336", "skewed"),
        ("b32-320", "aligned"),
        ("b16-336", "aligned"),
        ("wide", "skewed"),
        ("narrow", "aligned"),
        ("odd-width", "aligned"),
        ("one-patch-frames", "skewed"),
        ("patch-8", "skewed"),
        ("patch-7", "skewed"),
        ("patch-1", "skewed"),
        ("patch-48", "aligned"),
        ("patch-20", "skewed"),
        ("tall", "aligned"),
        ("flat", "skewed"),
        ("crop", "skewed"),
        ("aligned-crop", "aligned"),
        ("odd-crop", "skewed"),
        ("planar", "scattered"),
        ("planar-crop", "scattered"),
        ("far", "aligned"),
        ("exact-odd-width", "aligned"),
        ("exact-aligned", "aligned"),
        ("exact-skewed", "skewed"),
        ("exact-scattered", "scattered"),
    ],
)
def test_tokens_are_those_of_a_convolution(
    emulated: dict[tuple[str, str], Figures], name: str, path: str, tile: str
) -> None:
    figures = emulated[name, tile]
    assert figures.path == path
    # weights are rounded to float16, and nothing else: weights that it holds leave the rounding of sums
    assert figures.error <= (1e-6 if name.startswith("exact") else 5e-4)
    # pixels at any alignment share words with their neighbours: two rows a bank at the worst
    assert figures.pixel_conflicts <= (2 if path == "skewed" else 1)
    assert figures.weight_conflicts == 1


@pytest.mark.parametrize(
    ("names", "unit"),
    [
        (
            [
                "b32-224",
                "b16-224",
                "b32-320",
                "wide",
                "odd-width",
                "patch-8",
                "patch-48",
                "tall",
                "aligned-crop",
                "far",
            ],
            8,
        ),
        (["l14-224", "l14-336", "flat", "patch-20"], 2),
        (["patch-7", "patch-1", "crop", "odd-crop", "planar", "planar-crop", "exact-skewed", "exact-scattered"], 1),
    ],
)
def test_rows_are_the_pixels_of_patches(emulated: dict[tuple[str, str], Figures], names: list[str], unit: int) -> None:
    assert {name: emulated[name, "rows"].path for name in names} == dict.fromkeys(names, str(unit))


def test_shared_memory_fits_every_architecture(emulated: dict[tuple[str, str], Figures]) -> None:
    for (_, tile), figures in emulated.items():
        if tile == "rows":
            continue
        # sm_86 has 99 KiB for a block; sm_80 has 164 KiB for all blocks, of which each takes one more
        assert figures.shared <= 99 * KILOBYTE
        blocks = {"large": 2, "small": 3}[tile]
        assert blocks * (figures.shared + KILOBYTE) <= 164 * KILOBYTE


@pytest.mark.parametrize(
    ("header", "was", "becomes", "case", "complaint"),
    [
        # how a group of copies is waited for, threads for each other, and a stage for its readers
        ("kernel", "wait_for_copies<SomeTile::kDepth - 2>", "wait_for_copies<SomeTile::kDepth - 1>", "exact-aligned",
         "a word that is read was written, and its copy waited for"),
        ("kernel", "    __syncthreads();\n    load();", "    load();", "exact-aligned",
         "a barrier stands between a write and others' reads"),
        ("kernel", "    __syncthreads();\n    load();", "    load();\n    __syncthreads();", "exact-scattered",
         "a word is not written while others may read it"),
        # bytes, fragments, rows and columns
        ("kernel", "centred_pair<0x4342>", "centred_pair<0x4340>", "exact-aligned",
         "tokens are those of the convolution"),
        ("kernel", "if (i < count)", "if (i <= count)", "exact-odd-width", "heap-buffer-overflow"),
        ("index", "stage.row_offset) & 15", "stage.row_offset) & 7", "exact-skewed", "copies are 16-byte aligned"),
        ("index", "whole ? 16 : left > 0 ? left : 0", "whole || left > 0 ? 16 : 0", "exact-skewed",
         "heap-buffer-overflow"),
        # rows: what fills them up, where a pixel row ends, and how much is read at once
        ("rows", "257 * kPixelCentre", "256 * kPixelCentre", "l14-224", "rows hold the pixels of their patches"),
        ("rows", "byte == row_bytes", "byte >= row_bytes + kUnit", "exact-skewed", "rows hold the pixels"),
        ("rows", "y < patch ?", "y <= patch ?", "l14-224", "rows hold the pixels"),
        ("index", "steps % 2 == 0 ? 2", "steps % 1 == 0 ? 2", "patch-7", "misaligned address"),
    ],
)  # fmt: skip
def test_planted_faults_are_found(
    tmp_path: Path, header: str, was: str, becomes: str, case: str, complaint: str
) -> None:
    headers = tmp_path / "csrc"
    shutil.copytree(ROOT / "csrc", headers)
    source = headers / f"patch_{'rows_kernel' if header == 'rows' else f'embed_{header}'}.h"
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
def test_op_packs_what_the_kernel_takes(program: Path, tmp_path: Path, size: tuple[int, ...], patch: int) -> None:
    frames = torch.randint(0, 256, size, dtype=torch.uint8)
    pixels = channels_last(frames)
    count, height, width, _ = pixels.shape
    weight = (torch.randn(40, 3, patch, patch) / 50).half()
    class_embedding, positions = torch.randn(40).half(), torch.randn(1 + height // patch * (width // patch), 40).half()
    mean, std = (0.48, 0.46, 0.41), (0.27, 0.26, 0.28)
    packed, table = pack_stages(weight, class_embedding, positions, affine(mean, std))
    for name, tensor in (("pixels", frames), ("weight", packed), ("table", table)):
        (tmp_path / name).write_bytes(tensor.numpy().tobytes())
    numbers = [0, *pixels.stride(), count, height, width, patch, 40]
    done = subprocess.run(
        [str(program), "--run", str(tmp_path), *map(str, numbers)], capture_output=True, text=True, timeout=100
    )
    assert done.returncode == 0, done.stdout + done.stderr
    tokens = torch.frombuffer(bytearray((tmp_path / "tokens").read_bytes()), dtype=torch.float32).double()
    exact = (tensor.double() for tensor in (weight, class_embedding, positions))
    expected = patch_embed_ref(frames, *exact, None, None, 1e-5, mean, std, torch.float64)
    torch.testing.assert_close(tokens.view_as(expected)[:, 0], expected[:, 0], rtol=1e-6, atol=1e-6)
    assert (tokens.view_as(expected) - expected).norm() <= 5e-4 * expected.norm()
    # and what is packed for a product with rows, by those of the other kernel
    rows_of, scale, table = pack_rows(weight, class_embedding, positions, affine(mean, std))
    rows = torch.frombuffer(bytearray((tmp_path / "rows").read_bytes()), dtype=torch.float16).view(-1, rows_of.shape[1])
    patches = (rows.double() @ rows_of.double().T * scale).view_as(expected[:, 1:]) + table[1:]
    assert (patches - expected[:, 1:]).norm() <= 5e-4 * expected.norm()
