"""The CUDA patch embedding, replayed lane by lane on the host: right against a convolution in double precision."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path
from typing import NamedTuple

import pytest
import torch

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


def compile_and_run(
    source: Path, program: Path, *arguments: str, headers: Path = ROOT / "csrc", flags: tuple[str, ...] = ()
) -> subprocess.CompletedProcess[str]:
    assert COMPILER is not None
    # of the kernel's unrolling, and its wide stores, a C++ compiler knows nothing
    usual = ["-std=c++20", "-Wall", "-Wextra", "-Werror", "-Wno-unknown-pragmas", "-fno-strict-aliasing"]
    command = [COMPILER, *usual, *flags, f"-I{headers}", str(source), "-o", str(program)]
    built = subprocess.run(command, capture_output=True, text=True, timeout=200)
    assert built.returncode == 0, built.stderr
    return subprocess.run([str(program), *arguments], capture_output=True, text=True, timeout=200)


@pytest.fixture(scope="module")
def emulated(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, str], Figures]:
    program = tmp_path_factory.mktemp("emulator") / "patch_embed_emulator"
    done = compile_and_run(EMULATOR, program, flags=("-O1", "-g1", *SANITIZERS))
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


def test_shared_memory_fits_every_architecture(emulated: dict[tuple[str, str], Figures]) -> None:
    for (_, tile), figures in emulated.items():
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
    ],
)  # fmt: skip
def test_planted_faults_are_found(
    tmp_path: Path, header: str, was: str, becomes: str, case: str, complaint: str
) -> None:
    headers = tmp_path / "csrc"
    shutil.copytree(ROOT / "csrc", headers)
    source = headers / f"patch_embed_{header}.h"
    text = source.read_text()
    assert text.count(was) == 1
    source.write_text(text.replace(was, becomes))
    flags = ("-O0", *(SANITIZERS if complaint == "heap-buffer-overflow" else []))
    done = compile_and_run(EMULATOR, tmp_path / "emulator", case, headers=headers, flags=flags)
    assert done.returncode == 1, done.stdout + done.stderr
    assert complaint in done.stdout + done.stderr


PACKING = r"""
#include <cstdio>
#include "patch_embed_index.h"
int main() {
  constexpr int kPatch = 22, kWidth = 3;
  std::printf("%lld\n", static_cast<long long>(xclip_fast::packed_weight_elements(kPatch, kWidth)));
  for (int column = 0; column < kWidth; ++column)
    for (int channel = 0; channel < 3; ++channel)
      for (int y = 0; y < kPatch; ++y)
        for (int x = 0; x < kPatch; ++x)
          std::printf("%lld\n", static_cast<long long>(
              xclip_fast::packed_weight_index(kPatch, kWidth, column, channel, y, x)));
}
"""


def test_packing_in_torch_is_that_of_the_header(tmp_path: Path) -> None:
    source = tmp_path / "packing.cpp"
    source.write_text(PACKING)
    done = compile_and_run(source, tmp_path / "packing")
    elements, *places = map(int, done.stdout.split())
    weight = torch.arange(1, 3 * 3 * 22 * 22 + 1).reshape(3, 3, 22, 22)
    rows = torch.zeros(22, 3, 96, dtype=torch.int64)
    rows[..., :66] = weight.permute(2, 0, 3, 1).flatten(2)
    packed = rows.unflatten(-1, (-1, 3, 4, 2, 2)).transpose(-3, -2).flatten(-4).transpose(1, 2).flatten()
    assert packed.numel() == elements
    assert torch.equal(packed[places], weight.flatten())
    assert packed.count_nonzero() == weight.numel()
