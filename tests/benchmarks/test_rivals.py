"""Rivals: right within their gates, on as many threads as torch, quiet, and a clear row where a package is missing."""

from __future__ import annotations

import itertools
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks import suites, tables
from benchmarks.__main__ import main as command
from xclip_fast.bench import memory
from xclip_fast.bench.models import Effort, measure_model
from xclip_fast.bench.providers import PROVIDERS, QUANTISED
from xclip_fast.bench.record import Case, Check, Row, Run, Timing
from xclip_fast.bench.run import Job, make_case, run
from xclip_fast.bench.setting import UnavailableError, inputs_of, setting_of
from xclip_fast.errors import InputError
from xclip_fast.processor import multiplies

EXPORTED = {"onnx", "onnxscript", "transformers"}
PACKAGES = {
    "onnxruntime": EXPORTED | {"onnxruntime"},
    "onnxruntime-int8": EXPORTED | {"onnxruntime"},
    "openvino": EXPORTED | {"openvino"},
    "openvino-bf16": EXPORTED | {"openvino"},
    "openvino-int8": EXPORTED | {"openvino", "nncf"},
}
DTYPES = {"openvino-bf16": "bfloat16", "onnxruntime": "float32", "openvino": "float32"}
EFFORT = Effort(blocks=1, block=0.001, memory=False)
CEILINGS = {"float32_tflops": 0.1, "bfloat16_tflops": 0.1, "copy_gbs": 10.0}


def needs(provider: str) -> None:
    if lacking := sorted(name for name in PACKAGES[provider] if find_spec(name) is None):
        pytest.skip(f"{', '.join(lacking)} is not installed: pip install 'xclip-fast[rivals]'")
    if provider == "openvino-bf16" and not multiplies(torch.bfloat16):
        pytest.skip("OpenVINO has bfloat16 where the processor has")


def case_of(provider: str, input: str = "normalised") -> Case:
    return make_case("model", "tiny", batch=2, dtype=DTYPES.get(provider, "bfloat16"), input=input)


@pytest.mark.parametrize("input", ["normalised", "uint8"])
@pytest.mark.parametrize("provider", PACKAGES)
def test_each_is_right_within_its_gate(provider: str, input: str, capfd: pytest.CaptureFixture[str]) -> None:
    needs(provider)
    (row,) = measure_model(case_of(provider, input), (provider,), EFFORT, CEILINGS)
    assert (row.status, row.reason) == ("timed", None)
    assert row.check is not None
    assert row.check.bit_repeat
    assert ("int8" in provider) == (row.check.allowance == QUANTISED)
    # rounded once to a byte a number shows: more than a float32 errs
    assert row.check.error is not None
    assert (row.check.error > 1e-4) == (case_of(provider).dtype == "bfloat16")
    assert capfd.readouterr().out == ""


def test_all_compute_on_the_threads_of_torch(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    needs("onnxruntime")
    needs("openvino")
    import onnxruntime
    import openvino

    asked: list[int] = []

    def session(path: Path, options: Any, providers: list[str]) -> SimpleNamespace:
        asked.append(options.intra_op_num_threads)
        return SimpleNamespace(run=None)

    compile_model = openvino.Core.compile_model

    def compiled(self: Any, path: Path, device: str, options: dict[str, Any]) -> Any:
        found = compile_model(self, path, device, options)
        asked.append(found.get_property("INFERENCE_NUM_THREADS"))
        return found

    monkeypatch.setattr(onnxruntime, "InferenceSession", session)
    monkeypatch.setattr(openvino.Core, "compile_model", compiled)
    before = torch.get_num_threads()
    # one is on every machine, and the default of none with several cores
    torch.set_num_threads(1)
    try:
        for provider in ("onnxruntime", "openvino"):
            PROVIDERS[provider].build(setting_of(case_of(provider), tmp_path))
    finally:
        torch.set_num_threads(before)
    assert asked == [1, 1]


@pytest.mark.parametrize("provider", PACKAGES)
def test_a_missing_package_is_a_row_that_names_it(provider: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for package in PACKAGES[provider]:
        monkeypatch.setitem(sys.modules, package, None)
    rows = {row.provider: row for row in measure_model(case_of(provider), (provider, "layers"), EFFORT, CEILINGS)}
    assert rows["layers"].status == "timed"
    assert rows[provider].status == "unavailable"
    first = provider.partition("-")[0]
    assert rows[provider].reason == f"{first} is not installed: pip install 'xclip-fast[rivals]'"


@pytest.mark.parametrize("package", ["onnx", "onnxscript", "nncf"])
def test_a_missing_tool_is_named_too(package: str, monkeypatch: pytest.MonkeyPatch) -> None:
    needs("openvino-int8")
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(UnavailableError, match=f"^{package} is not installed: pip install 'xclip-fast"):
        PROVIDERS["openvino-int8"].build(setting_of(case_of("openvino-int8")))


@pytest.mark.parametrize(
    ("provider", "change", "words"),
    [
        ("openvino", {"direction": "train"}, "it is for inference on the CPU"),
        ("onnxruntime-int8", {"device": "cuda"}, "it is for inference on the CPU"),
        ("openvino", {"dtype": "bfloat16"}, "it computes in float32"),
        ("onnxruntime", {"dtype": "float16"}, "it computes in float32"),
        ("openvino-bf16", {"dtype": "float32"}, "it computes in bfloat16"),
    ],
)
def test_cases_of_others_are_refused(provider: str, change: dict[str, str], words: str) -> None:
    setting = setting_of(replace(case_of("layers"), dtype="float32"))
    with pytest.raises(UnavailableError, match=words):
        PROVIDERS[provider].build(replace(setting, case=replace(setting.case, **change)))


def test_openvino_without_bfloat16_here_says_so(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    needs("openvino")
    import openvino

    compile_model = openvino.Core.compile_model
    monkeypatch.setattr(
        openvino.Core,
        "compile_model",
        lambda self, path, device, options: compile_model(
            self, path, device, options | {"INFERENCE_PRECISION_HINT": "f32"}
        ),
    )
    with pytest.raises(UnavailableError, match="OpenVINO has no bfloat16 on this processor"):
        PROVIDERS["openvino-bf16"].build(setting_of(case_of("openvino-bf16"), tmp_path))


@pytest.mark.parametrize("provider", ["onnxruntime-int8", "openvino-int8"])
def test_files_of_a_case_are_made_once(provider: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    needs(provider)
    setting = setting_of(case_of(provider), tmp_path)
    with torch.inference_mode():
        first = PROVIDERS[provider].build(setting)(*inputs_of(setting))
        monkeypatch.setattr(torch.onnx, "export", lambda *arguments, **named: pytest.fail("it was exported again"))
        again = PROVIDERS[provider].build(setting)(*inputs_of(setting))
    assert torch.equal(first, again)
    assert (tmp_path / "float32.onnx").exists()


def test_files_without_a_folder_are_gone(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    needs("onnxruntime")
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    PROVIDERS["onnxruntime"].build(setting_of(case_of("onnxruntime")))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(sys.platform != "linux", reason="memory is counted as Linux does")
@pytest.mark.parametrize("provider", ["onnxruntime", "openvino"])
def test_memory_is_that_of_a_model_and_no_library(provider: str, tmp_path: Path) -> None:
    needs(provider)
    PROVIDERS[provider].build(setting_of(case_of(provider), tmp_path))
    found = memory.peak_memory(case_of(provider), provider, tmp_path)
    assert found is not None
    # the tiny model has less than one, either library more than a hundred
    assert 0 < found < 50


SENDS_NOTHING = """
import sys
from xclip_fast.bench.providers import PROVIDERS
from xclip_fast.bench.setting import setting_of
from xclip_fast.bench.run import make_case
assert not {"nncf", "onnx", "onnxruntime", "openvino"} & set(sys.modules)
PROVIDERS["openvino-int8"].build(setting_of(make_case("model", "tiny", dtype="bfloat16")))
assert "nncf" in sys.modules
assert "openvino_telemetry" not in sys.modules
"""


def test_no_telemetry_is_imported_and_no_rival_with_the_package(tmp_path: Path) -> None:
    needs("openvino-int8")
    command = [sys.executable, "-c", SENDS_NOTHING]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"HOME": str(tmp_path)})
    assert (done.returncode, done.stdout) == (0, ""), done.stderr
    # it would keep an identity in the home of its user
    assert not (tmp_path / "intel").exists()


def test_clips_to_calibrate_with_are_none_that_is_measured() -> None:
    setting = setting_of(case_of("openvino-int8", "uint8"))
    video, _ = inputs_of(setting)
    assert torch.equal(inputs_of(setting, 1)[0], video)
    assert not any(torch.equal(inputs_of(setting, seed)[0], video) for seed in (0, 2, 3))


def test_gemms_with_constants_are_tuned_on_a_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    from torch._inductor import config

    seen: list[tuple[bool, bool]] = []

    def compiled(inner: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def call(*inputs: Tensor) -> Tensor:
            seen.append((config.max_autotune, config.freezing))
            return inner(*inputs)

        return call

    monkeypatch.setattr(torch, "compile", compiled)
    before = config.max_autotune, config.freezing
    for provider, direction in (
        ("torch-compile-max", "forward"),
        ("torch-compile-max", "train"),
        ("hf-compile", "forward"),
    ):
        setting = setting_of(replace(case_of("onnxruntime"), direction=direction))
        PROVIDERS[provider].build(setting)(*inputs_of(setting))
    assert seen == [(True, True), (True, False), before]
    assert (config.max_autotune, config.freezing) == before


def test_the_suite_has_the_rivals_of_each_dtype() -> None:
    *forward, training = suites.jobs("rivals")
    found = {(job.case.variant, job.case.batch, job.case.dtype): job for job in forward}
    assert set(found) == set(itertools.product(("B/32", "B/16"), (1, 4), ("float32", "bfloat16")))
    for (variant, batch, dtype), job in found.items():
        assert job.providers[0] == "hf-sdpa"
        assert {"layers", "engine"} <= set(job.providers)
        rivals = set(job.providers) & PACKAGES.keys()
        wanted = {name for name in PACKAGES if ("int8" in name or "bf16" in name) == (dtype == "bfloat16")}
        assert rivals == wanted
        assert ("torch-compile-max" in job.providers) == ((variant, batch, dtype) == ("B/32", 1, "float32"))
    assert (training.case.variant, training.case.batch, training.case.direction) == ("B/32", 1, "train")
    assert training.providers == ("hf-sdpa", "layers")
    assert suites.effort("rivals", True, "warm").spent < suites.effort("cpu", True, "warm").spent


def job(dtype: str, *providers: str) -> Job:
    return Job(make_case("model", "tiny", dtype=dtype), providers)


@pytest.fixture
def tiny_suite(monkeypatch: pytest.MonkeyPatch) -> None:
    """The suite with two tiny cases, at once."""
    monkeypatch.setattr("xclip_fast.bench.run.ceilings", lambda *arguments, **named: CEILINGS)
    monkeypatch.setattr("xclip_fast.bench.run.QUICK", EFFORT)
    found = [job("float32", "hf-sdpa", "layers"), job("bfloat16", "hf-sdpa", "openvino-int8")]
    monkeypatch.setattr(suites, "jobs", lambda suite, input: found)


@pytest.mark.usefixtures("tiny_suite")
def test_a_suite_is_run_by_parts_into_one_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "rivals.json"
    start = ["run", "--suite", "rivals", "--json", str(path), "--add"]
    assert command([*start, "--dtype", "bfloat16"]) == 0
    first = Run.load(path)
    assert [row.provider for row in first.rows] == ["hf-sdpa", "openvino-int8"]
    assert command([*start, "--variant", "tiny", "--batch", "1", "--dtype", "float32"]) == 0
    second = Run.load(path)
    assert second.rows[:2] == first.rows
    assert [(row.case.dtype, row.provider) for row in second.rows[2:]] == [
        ("float32", "hf-sdpa"),
        ("float32", "layers"),
    ]
    assert second.facts["seconds"] >= first.facts["seconds"]
    # what is measured again takes the place of what was
    assert command([*start, "--dtype", "float32"]) == 0
    third = Run.load(path)
    assert third.rows[:2] == first.rows
    assert [(row.case, row.provider) for row in third.rows] == [(row.case, row.provider) for row in second.rows]
    capsys.readouterr()
    assert command(["run", "--suite", "rivals", "--variant", "L/14"]) == 2
    assert command(["run", "--suite", "rivals", "--add"]) == 2
    assert capsys.readouterr().err == (
        "error: the suite 'rivals' has no such case\nerror: rows can be added to a file: name it with --json\n"
    )


def test_parts_are_of_one_machine_and_version() -> None:
    jobs = [job("float32", "layers")]
    before = run(jobs, EFFORT, lambda row: None)
    before.facts["torch"] = "1.0"
    with pytest.raises(InputError, match=r"no parts of one run: torch was 1\.0, and is"):
        run(jobs, EFFORT, lambda row: pytest.fail("it began"), before=before)


TIMING = Timing("wall", "warm", 500.0, 490.0, 512.0, 1.0, "hf-sdpa", 1.39, 1.30, 1.52, 0.05, "faster", 4)


def test_the_table_sets_processors_under_each_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    case = Case("model", "B/16", 8, 4, 5, "bfloat16", "forward", "normalised", "cpu")
    check = Check("the definition in float64", 1.9e-2, 2e-3, 0.05, True)
    rows = [
        Row(
            case, "hf-sdpa", "timed", None, check, replace(TIMING, ratio=1.0, verdict="no difference"), memory_mb=901.2
        ),
        Row(case, "onnxruntime-int8", "timed", None, check, TIMING),
        Row(case, "openvino-int8", "wrong", "beyond the allowance", replace(check, error=0.08, passed=False)),
        Row(case, "openvino-bf16", "unavailable", "OpenVINO has no bfloat16 on this processor"),
    ]
    facts = {"processor": "AMD EPYC", "threads": 2, "torch": "2.14", "commit": "abc1234", "utc": "2026-01-01T00:00:00"}
    facts |= {"gpu": None, "capability": "AVX2", "onnxruntime": "1.32", "openvino": None}
    monkeypatch.setattr(tables, "RESULTS", tmp_path)
    Run(facts, CEILINGS, rows).save(tmp_path / "rivals-zen3.json")
    Run(facts | {"features": ["avx2", "avx512"]}, CEILINGS, rows[:1]).save(tmp_path / "rivals-sapphire.json")
    table = tables.table("rivals").splitlines()
    what = "B/16, 8 frames, batch 4 | bfloat16"
    times = "500.0 (490.0 to 512.0)"
    assert table[2:6] == [
        f"| sapphire | {what} | hf-sdpa | 1.9e-02 | {times} | baseline | 901 |",
        f"| zen3 | {what} | hf-sdpa | 1.9e-02 | {times} | baseline | 901 |",
        f"| zen3 | {what} | onnxruntime-int8 | 1.9e-02 | {times} | **1.39 (1.30 to 1.52)** |  |",
        f"| zen3 | {what} | openvino-int8 | 8.0e-02 | wrong |  |  |",
    ]
    assert table[7].startswith("sapphire: avx2, avx512, onnxruntime 1.32. Measured on AMD EPYC, 2 threads, torch 2.14")
    assert table[9].startswith("zen3: AVX2, onnxruntime 1.32. Measured on AMD EPYC")
