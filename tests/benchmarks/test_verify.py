"""``xclip-fast verify``: right where all is right, and a fault is seen, named and an exit code."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from xml.etree import ElementTree

import pytest
import torch
from torch import Tensor

from xclip_fast.bench.verify import Result, check, verify
from xclip_fast.cli import main
from xclip_fast.cli.verify import to_junit
from xclip_fast.ops import cases, layer_norm

CASE = Result("layer_norm", "odd width", "torch", "cpu", "float32", 0, "failed")


def faulty(where: str) -> object:
    """A layer norm that is wrong on the torch backend alone."""

    def op(*args: Tensor, backend: str, **inputs: Tensor) -> tuple[Tensor, Tensor]:
        normed, stream = layer_norm(*args, backend=backend, **inputs)  # type: ignore[arg-type]
        if backend != "torch":
            return normed, stream
        if where == "output":
            return normed * 1.001, stream
        if where == "gradient":
            return normed.detach() + (normed - normed.detach()) * 1.001, stream
        if where == "unwritten":
            out = torch.empty_like(normed)
            out[1:] = normed[1:]
            return out, stream
        if where == "dtype":
            return normed.double(), stream
        raise RuntimeError("\x1b[2Jout of luck")

    return op


def test_a_right_op_passes() -> None:
    found = check(CASE, gradients=True)
    assert found.status == "passed"
    assert found.error is not None
    assert found.allowance is not None
    assert 0 < found.error <= found.allowance


@pytest.mark.parametrize(
    ("where", "reason"),
    [
        ("output", "beyond the allowance: output 0"),
        ("gradient", "d x"),
        ("unwritten", "output 0"),
        ("dtype", "output 0"),
        ("crash", "RuntimeError: \x1b[2Jout of luck"),
    ],
)
def test_a_fault_is_seen_and_named(where: str, reason: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cases, "find_op", lambda name: faulty(where))
    found = check(CASE, gradients=where != "unwritten")
    assert found.status == "failed"
    assert reason in (found.reason or "")
    if where == "unwritten":
        assert found.error is None


def test_a_gradient_is_not_looked_at_when_not_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cases, "find_op", lambda name: faulty("gradient"))
    assert check(CASE, gradients=False).status == "passed"


@pytest.fixture
def in_place_of_python(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """A shell script that runs instead of Python in the processes of ``verify``."""

    def use(script: str) -> None:
        path = tmp_path / "python"
        path.write_text(f"#!/bin/sh\n{script}\n")
        path.chmod(0o700)
        monkeypatch.setattr(sys, "executable", str(path))

    return use


def test_a_process_that_dies_is_its_cases_failed_and_the_next_op_follows(
    in_place_of_python: Callable[[str], None],
) -> None:
    in_place_of_python("kill -9 $$")
    found = list(verify(["clip_logits", "layer_norm"], dtypes=["float32"]))
    assert {result.op for result in found} == {"clip_logits", "layer_norm"}
    assert {result.status for result in found} == {"failed"}
    assert {result.reason for result in found} == {"the process ended with code -9"}


def test_a_process_that_hangs_is_ended(in_place_of_python: Callable[[str], None]) -> None:
    in_place_of_python("exec sleep 60")
    found = list(verify(["clip_logits"], dtypes=["float32"], backends=["torch"], deadline=0.2))
    assert {(result.status, result.reason) for result in found} == {("failed", "no answer within 0.2 s")}


def test_a_process_that_ends_badly_fails_although_all_numbers_are_right(
    in_place_of_python: Callable[[str], None],
) -> None:
    # as a library that finds its memory damaged when the process ends
    in_place_of_python(f'echo "before"\n"{sys.executable}" "$@"\necho "free(): invalid pointer"\nexit 9')
    found = list(verify(["clip_logits"], dtypes=["float32"], backends=["torch"]))
    assert [result.status for result in found[:-1]] == ["passed"] * len(cases.OPS["clip_logits"].small)
    assert (found[-1].status, found[-1].case) == ("failed", "whole process")
    assert "code 9" in (found[-1].reason or "")
    assert "free(): invalid pointer" in (found[-1].reason or "")


def test_kernels_run_in_the_interpreter_and_bfloat16_is_left_to_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    found = list(verify(["clip_logits"], backends=["triton"], gradients=False))
    assert {(result.dtype, result.status) for result in found} == {
        ("float32", "passed"),
        ("float16", "passed"),
        ("bfloat16", "skipped"),
    }


def test_the_command_says_yes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    junit = tmp_path / "verify.xml"
    arguments = ["verify", "--op", "clip_logits", "--dtype", "float32", "--seed", "5", "--junit", str(junit), "--json"]
    assert main(arguments) == 0
    out, err = capsys.readouterr()
    assert not err
    answer = json.loads(out)
    assert answer["passed"] is True
    assert {result["seed"] for result in answer["results"]} == {5}
    assert {"error", "allowance", "torch_error"} <= answer["results"][0].keys()
    root = ElementTree.fromstring(junit.read_text())
    assert [suite.get("name") for suite in root] == ["clip_logits"]
    assert root[0].get("failures") == "0"


def test_the_command_says_no(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    bad = [
        Result("layer_norm", "odd", "triton", "cpu", "float32", 7, "failed", "d x", 0.5, 1e-7, 1e-6, reason="beyond")
    ]
    monkeypatch.setattr("xclip_fast.bench.verify.verify", lambda *arguments: iter(bad))
    assert main(["verify"]) == 1
    out = capsys.readouterr().out
    assert "failed: layer_norm, odd, triton, float32, d x: error 5.0e-01, beyond" in out
    assert "0 passed, 1 failed, 0 skipped; seed 7 on cpu: not all right" in out


def test_nothing_checked_is_no_yes(monkeypatch: pytest.MonkeyPatch) -> None:
    skipped = [Result("layer_norm", "odd", "triton", "cpu", "float32", 0, "skipped", reason="no triton")]
    monkeypatch.setattr("xclip_fast.bench.verify.verify", lambda *arguments: iter(skipped))
    assert main(["verify"]) == 1


def test_junit_survives_hostile_text() -> None:
    text = to_junit([Result("op", 'a "case" <&>', "triton", "cpu", "float32", 0, "failed", reason="\x1b[2J\x00 & <b>")])
    case = ElementTree.fromstring(text).find("testsuite/testcase")
    assert case is not None
    assert case.get("name") == 'a "case" <&>, triton, float32, seed 0'
    assert "<b>" in (case[0].get("message") or "")


def test_it_needs_none_of_the_test_libraries() -> None:
    code = (
        "import sys; sys.modules.update(dict.fromkeys(['pytest', 'transformers', 'matplotlib'])); "
        "from xclip_fast.bench.verify import Result, check; "
        "print(check(Result('clip_logits', 'odd sizes', 'torch', 'cpu', 'float32', 0, 'failed'), True).status)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, cwd="/")
    assert done.stdout == "passed\n", done.stderr
