"""The compile gate: every kernel passes it, planted faults do not, and no kernel can be forgotten."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

triton = pytest.importorskip("triton")

from benchmarks.compile_gate.build import Build, architectures, blocks  # noqa: E402
from benchmarks.compile_gate.cases import production_launches  # noqa: E402
from benchmarks.compile_gate.gate import (  # noqa: E402
    Budget,
    budget_file,
    changes,
    kernels,
    name_of,
    read_budgets,
    violations,
    write_budgets,
)

ROOT = Path(__file__).parents[2]
PERSISTENT = "_linear_quick_gelu_persistent_fwd_kernel"  # of Hopper
BUILD = Build(
    kernel="_some_kernel",
    shape="B/16 8f x8",
    arch=90,
    variant="WIDTH=64 HAS_RESIDUAL, 4 warps, 0a1b2c3d",
    registers=100,
    stack=0,
    spills=0,
    shared=40960,
    blocks=4,
    instructions={"HGMMA.64x64x16.F32": 8, "LDG.E.128": 9, "STG.E": 1, "MUFU.EX2": 2, "IADD3": 80},
    rows=(64, 16),
    exponentials=True,
)
SLOW = {name: count for name, count in BUILD.instructions.items() if name != "MUFU.EX2"}
BUDGETS = {name_of(BUILD): Budget.of(BUILD)}


def run(*command: str) -> subprocess.CompletedProcess[str]:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = str(ROOT)
    return subprocess.run(
        [sys.executable, *command], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=280
    )


@pytest.mark.slow
def test_every_kernel_passes(tmp_path: Path) -> None:
    # one shape and one architecture here, all of them in ``make kernels-report``
    figures = tmp_path / "figures.json"
    part = ("--arch", "90", "--shape", "B/16 8f", "--first")
    done = run("-m", "benchmarks.compile_gate", *part, "--json", str(figures))
    assert done.returncode == 0, done.stdout + done.stderr
    builds = json.loads(figures.read_text())
    assert {build["kernel"] for build in builds} == kernels().keys()
    assert all(16 <= build["registers"] <= 255 and build["instructions"] for build in builds)
    for kernel in kernels():
        assert kernel.strip("_").removesuffix("_kernel") in done.stdout
    assert "…" not in done.stdout, "the table needs more than a hundred columns"


@pytest.fixture(scope="module")
def said(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What the gate says of planted faults."""
    done = run("tests/kernels/compile_gate_controls.py", str(tmp_path_factory.mktemp("budgets")))
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.slow
def test_faults_are_refused(said: dict[str, Any]) -> None:
    found = said["controls"]
    assert found["sound"] == []
    assert found["no tensor cores"] == ["multiplies without tensor cores: no HGMMA"]
    assert [line for line in found["spills"] if line.startswith("spills registers: ")]
    assert [line for line in found["too large"] if line.startswith("does not fit a multiprocessor: ")]


@pytest.mark.slow
def test_command_fails_on_a_budget_and_says_what_an_update_changes(said: dict[str, Any]) -> None:
    (without, laws), (first, new), (refused, excess), (again, looser) = said["commands"]
    assert (without, first, refused, again) == (0, 0, 1, 0)
    assert "laws alone" in laws
    called = "_layer_norm_fwd_kernel, B/16 8f x8 temporal residual, sm_90"
    name = r"_layer_norm_fwd_kernel, WIDTH=512 BLOCK_ROWS=4 BLOCK_WIDTH=512 HAS_RESIDUAL, 4 warps, \w{8}, sm_90"
    assert re.search(rf"^{name}: new$", new, re.MULTILINE)
    assert re.search(rf"^{called}: \d+ registers, budget 8$", excess, re.MULTILINE)
    assert "2 violations" in excess
    assert re.search(rf"^{name}: registers 8 -> \d+ \(looser\)$", looser, re.MULTILINE)


@pytest.fixture(scope="module")
def taken_on() -> dict[str, tuple[int, ...]]:
    """The kernels that are launched, and the architectures of each."""
    return {launch.name: architectures(launch) for _, launch in production_launches("B/16 8f")}


def test_every_kernel_has_a_production_shape(taken_on: dict[str, tuple[int, ...]]) -> None:
    launched = taken_on.keys()
    assert launched == kernels().keys()
    assert len(launched) >= 11


@pytest.mark.parametrize("arch", [80, 90, 100])
def test_every_kernel_has_budgets(arch: int, taken_on: dict[str, tuple[int, ...]]) -> None:
    compiled = {name for name, architectures in taken_on.items() if arch in architectures}
    # nothing before sm_89 writes float8, nor before sm_90 has products that read keys where they are kept
    newer = {"_quantize_rows_fwd_kernel", "_frame_attention_head_kernel"}
    elsewhere = {80: newer | {PERSISTENT}, 90: set(), 100: {PERSISTENT}}
    assert kernels().keys() - compiled == elsewhere[arch]
    for path in budget_file().parent.glob("*.json"):
        budgets = read_budgets(path)
        with_budget = {name.split(",")[0] for name in budgets if name.endswith(f"sm_{arch}")}
        assert with_budget == compiled, path.name


def test_build_within_its_budget_passes() -> None:
    assert violations([BUILD], BUDGETS) == []
    assert violations([BUILD], None) == []


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"registers": 105}, "105 registers, budget 104"),
        ({"shared": 40961}, "40961 bytes of shared memory, budget 40960"),
        ({"blocks": 3}, "3 programs on a multiprocessor, budget 4"),
        ({"instructions": BUILD.instructions | {"IADD3": 100}}, "120 instructions, budget 100 and 15%"),
        ({"instructions": BUILD.instructions | {"LDG.E": 2}}, "75 % of the accesses are 128 bits wide, "),
        ({"stack": 8, "spills": 2}, "spills registers: 8 bytes of stack, 2 loads and stores of local memory"),
        ({"blocks": 0}, "does not fit a multiprocessor: 100 registers, 40960 bytes of shared memory"),
        ({"variant": "WIDTH=65 HAS_RESIDUAL, 4 warps, 0a1b2c3d"}, "has no budget"),
        # a tile of 64 rows is one for the warpgroup's instruction, one of 16 for the warp's
        ({"instructions": {"HMMA.16816.F32.BF16": 8, "MUFU.EX2": 1}}, "without tensor cores: no HGMMA"),
        ({"arch": 100}, "without tensor cores: no UTCHMMA"),
        ({"rows": (16, 16)}, "without tensor cores: no HMMA"),
        ({"instructions": SLOW}, "has no MUFU.EX2"),
        ({"instructions": SLOW}, "lost MUFU.EX2"),
    ],
)
def test_each_excess_is_a_violation(change: dict[str, object], complaint: str) -> None:
    found = violations([replace(BUILD, **change)], BUDGETS)
    assert any(complaint in line and line.startswith("_some_kernel, B/16 8f x") for line in found), found


def test_changes_are_named_with_their_direction() -> None:
    before = Budget.of(BUILD)
    assert changes(BUDGETS, BUDGETS) == []
    assert changes({}, BUDGETS) == [f"{name_of(BUILD)}: new"]
    assert changes(BUDGETS, {}) == [f"{name_of(BUILD)}: gone"]
    looser = before._replace(registers=112, blocks=3, wide=80, features=("HGMMA",))
    assert [line.split(": ")[1] for line in changes(BUDGETS, {name_of(BUILD): looser})] == [
        "registers 104 -> 112 (looser)",
        "blocks 4 -> 3 (looser)",
        "wide 90 -> 80 (looser)",
        "features HGMMA+MUFU.EX2 -> HGMMA (looser)",
    ]
    tighter = changes({name_of(BUILD): looser}, BUDGETS)
    assert len(tighter) == 4
    assert all(line.endswith("(tighter)") for line in tighter)


def test_budgets_survive_their_file(tmp_path: Path) -> None:
    path = tmp_path / "triton-1.2.json"
    assert read_budgets(path) is None
    write_budgets(path, BUDGETS)
    assert read_budgets(path) == BUDGETS


@pytest.mark.parametrize(
    ("arch", "registers", "warps", "shared", "columns", "expected"),
    [
        # figures of NVIDIA's occupancy tables
        (80, 32, 4, 0, 0, 16),
        (90, 32, 4, 0, 0, 16),
        (90, 106, 8, 53248, 0, 2),
        (90, 128, 4, 0, 0, 4),
        (90, 129, 4, 0, 0, 3),
        (90, 255, 8, 0, 0, 1),
        (90, 16, 1, 0, 0, 32),
        # 227 KB are the most that one program may have, 163 KB on sm_80
        (90, 32, 4, 227 * 1024, 0, 1),
        (90, 32, 4, 227 * 1024 + 1, 0, 0),
        (80, 32, 4, 163 * 1024, 0, 1),
        (80, 32, 4, 164 * 1024, 0, 0),
        (100, 32, 4, 0, 256, 2),
        (100, 32, 4, 0, 512, 1),
    ],
)
def test_programs_of_a_multiprocessor(
    arch: int, registers: int, warps: int, shared: int, columns: int, expected: int
) -> None:
    assert blocks(arch, registers, warps, shared, columns) == expected
