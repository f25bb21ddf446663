"""Processors that are not at hand: what a mask hides from a program and its children, and leaves of a crash."""

from __future__ import annotations

import subprocess
import sys

import pytest

from benchmarks.processors import MASKS, can_mask, run
from xclip_fast.errors import InputError
from xclip_fast.processor import features

needs_faults = pytest.mark.skipif(not can_mask(), reason="this machine does not let CPUID fault")

ASK = "from xclip_fast.processor import features; print(*features())"
ASK_A_CHILD = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {ASK!r}], check=True)"
LEFT = {
    "avx2": {"avx2"},
    "avx2-amd": {"avx2"},
    "avx2-vnni": {"avx2", "avx_vnni"},
    "avx512": {"avx2", "avx512"},
    "avx512-vnni": {"avx2", "avx512", "avx512_vnni"},
    "avx512-bf16": {"avx2", "avx512", "avx512_vnni", "avx512_bf16"},
}


@needs_faults
@pytest.mark.parametrize("program", [ASK, ASK_A_CHILD], ids=["program", "child"])
@pytest.mark.parametrize("mask", MASKS)
def test_features_that_are_left(mask: str, program: str, capfd: pytest.CaptureFixture[str]) -> None:
    assert run(mask, [sys.executable, "-c", program]) == 0
    assert set(capfd.readouterr().out.split()) == LEFT[mask] & set(features())


@needs_faults
@pytest.mark.parametrize("options", [(), ("-X", "faulthandler")], ids=["plain", "handled"])
def test_a_crash_stays_a_crash(options: tuple[str, ...], capfd: pytest.CaptureFixture[str]) -> None:
    assert run("avx2", [sys.executable, *options, "-c", "import ctypes; ctypes.string_at(0)"]) == 128 + 11
    assert ("Segmentation fault" in capfd.readouterr().err) == bool(options)


@needs_faults
def test_the_code_of_the_command_is_handed_on() -> None:
    command = [sys.executable, "-m", "benchmarks.processors", "avx2", sys.executable, "-c", "raise SystemExit(7)"]
    assert subprocess.run(command, check=False).returncode == 7


def test_an_unknown_mask_is_refused() -> None:
    with pytest.raises(InputError, match="unknown mask 'avx3': choose one of avx2, avx2-amd"):
        run("avx3", ["true"])
