"""Results: one schema for all of them, files that survive a trip, tables that say what the files say, comparisons."""

from __future__ import annotations

import csv
import io
import itertools
import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import torch

from benchmarks import compare, figures, history, suites, tables, training
from benchmarks.__main__ import main as command
from xclip_fast.bench.machine import RIVALS
from xclip_fast.bench.models import Effort
from xclip_fast.bench.operators import BACKENDS
from xclip_fast.bench.providers import PROVIDERS
from xclip_fast.bench.record import Case, Check, Roof, Row, Run, Timing, to_csv
from xclip_fast.bench.run import Job, make_case, run
from xclip_fast.errors import InputError
from xclip_fast.ops.cases import OPS

ROOT = Path(__file__).parents[2]
SCHEMA = json.loads((ROOT / "benchmarks" / "schema.json").read_text())
RESULTS = sorted((ROOT / "benchmarks" / "results").glob("*.json"))
VALIDATOR = jsonschema.Draft202012Validator(SCHEMA)

CASE = Case("model", "B/32", 8, 1, 5, "float32", "forward", "normalised", "cpu")
CHECK = Check("the definition in float64", 1e-7, 2e-7, 6e-7, True)
TIMING = Timing("wall", "warm", 10.0, 9.0, 11.0, 0.5, "hf-sdpa", 1.5, 1.4, 1.6, 0.05, "faster", 5)
FACTS = {
    "utc": "2026-01-01T00:00:00+00:00",
    "commit": "abc1234",
    "xclip_fast": "0.1.0",
    "python": "3.12",
    "torch": "2.11",
    "processor": "a processor",
    "cores": 2,
    "threads": 2,
    "capability": "AVX2",
    "system": "Linux",
    "gpu": None,
    "triton": None,
    "transformers": None,
    "numpy": "2",
}
RUN = Run(
    FACTS,
    {"float32_tflops": 0.1, "copy_gbs": 10.0},
    [
        Row(CASE, "layers", "timed", None, CHECK, TIMING),
        Row(CASE, "engine", "unavailable", "=cmd|' /C calc'!A0"),
        Row(CASE, "wrong", "wrong", "beyond the allowance", replace(CHECK, error=None, passed=False)),
    ],
)


def test_there_are_results() -> None:
    assert RESULTS


@pytest.mark.parametrize("path", RESULTS, ids=lambda path: path.stem)
def test_every_result_has_the_schema(path: Path) -> None:
    content = json.loads(path.read_text())
    VALIDATOR.validate(content)
    found = Run.load(path)
    assert found.to_dict() == content
    # what a rival gets wrong on some processor is a finding, and has no time
    assert Run(found.facts, found.ceilings, [row for row in found.rows if not row.provider.startswith(RIVALS)]).sound
    # a figure without a gate and its origin is none
    assert all(row.check is not None and row.check.passed for row in found.rows if row.timing is not None)
    assert "/" not in found.facts["commit"]


def test_the_schema_is_a_schema_and_takes_what_is_written() -> None:
    jsonschema.Draft202012Validator.check_schema(SCHEMA)
    VALIDATOR.validate(json.loads(json.dumps(RUN.to_dict())))


def test_a_measured_run_has_the_schema(tmp_path: Path) -> None:
    jobs = [Job(make_case("model", "tiny"), ("layers", "engine")), Job(make_case("layer_norm", "tiny"), ("torch",))]
    found = run(jobs, Effort(1, 0.001, memory=False), lambda row: None)
    path = tmp_path / "results.json"
    found.save(path)
    VALIDATOR.validate(json.loads(path.read_text()))
    assert Run.load(path).rows == found.rows
    assert list(tmp_path.iterdir()) == [path]


def changed(place: str, value: Any) -> dict[str, Any]:
    """The content of a run with another value at a place such as "rows.0.status"."""
    content = json.loads(json.dumps(RUN.to_dict()))
    *way, last = [int(part) if part.isdigit() else part for part in place.split(".")]
    at: Any = content
    for part in way:
        at = at[part]
    if value is None and last in ("commit", "torch_error"):
        del at[last]
    else:
        at[last] = value
    return content


@pytest.mark.parametrize(
    ("place", "value"),
    [
        ("schema", 2),
        ("facts.commit", None),
        ("facts.gpu", ["a list"]),
        ("rows.0.status", "excellent"),
        ("rows.0.timing", None),
        ("rows.0.check", None),
        ("rows.0.check.passed", False),
        ("rows.0.check.torch_error", None),
        ("rows.0.timing.median_ms", 0),
        ("rows.0.timing.median_ms", "fast"),
        ("rows.0.timing.verdict", "much faster"),
        ("rows.0.case.dtype", "float8"),
        ("rows.0.case.batch", 0),
        ("rows.0.extra", 1),
        ("rows.1.reason", None),
        ("rows.1.timing", {"median_ms": 1.0}),
        ("ceilings.copy_gbs", -1),
    ],
)
def test_the_schema_refuses_what_is_no_result(place: str, value: Any) -> None:
    with pytest.raises(jsonschema.ValidationError):
        VALIDATOR.validate(changed(place, value))


def test_numbers_that_are_not_finite_are_not_written(tmp_path: Path) -> None:
    bad = Run(FACTS, {}, [replace(RUN.rows[0], check=replace(CHECK, error=float("nan")))])
    with pytest.raises(ValueError, match="Out of range float values"):
        bad.save(tmp_path / "results.json")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("", "is not JSON"),
        ("{", "is not JSON"),
        ("[]", "no results of a benchmark"),
        ("{}", "no results of a benchmark"),
        ('{"schema": 7}', "results of schema 7, this version reads 1"),
        ('{"schema": 1, "facts": {}, "ceilings": {}, "rows": [{}]}', "no results of a benchmark"),
    ],
)
def test_other_files_are_refused_in_a_line(content: str, words: str, tmp_path: Path) -> None:
    path = tmp_path / "x.json"
    path.write_text(content)
    with pytest.raises(InputError, match=words):
        Run.load(path)
    with pytest.raises(InputError, match="cannot read"):
        Run.load(tmp_path / "missing.json")


def test_csv_has_a_line_a_row_and_no_formula() -> None:
    rows = list(csv.DictReader(io.StringIO(to_csv(RUN.rows))))
    assert [row["provider"] for row in rows] == ["layers", "engine", "wrong"]
    assert rows[0]["timing.median_ms"] == "10.0"
    assert rows[1]["reason"] == "'=cmd|' /C calc'!A0"
    assert rows[1]["timing.median_ms"] == ""


def test_the_tables_of_the_pages_are_those_of_the_results() -> None:
    texts = [page.read_text(encoding="utf-8") for page in tables.PAGES]
    assert [tables.filled(text) for text in texts] == texts, "run: make tables"
    marked = re.findall(r"<!-- table: (\S+) -->", "".join(texts))
    assert marked == [
        "budgets",
        "host",
        "tolerances",
        "reproduce/claims",
        "reproduce/origin",
        "reproduce/ladder",
        "reproduce/few_shot",
        "reproduce/zero_shot",
        "h200/gpu",
        "eager",
        "cpu/models",
        "training",
        "rivals",
        "cpu-ops/ops",
        "headline",
    ]


def test_the_figure_of_the_contest_says_what_the_results_say() -> None:
    models = figures.contested(Run.load(tables.RESULTS / "h200.json"))
    captions = [figures.caption(row) for rows in models.values() for row in rows.values()]
    assert len(captions) == 27
    assert captions[0] == "1.20 (1.76 ms)"  # B/16, batch 1, compiled
    drawn = (figures.FOLDER / "h200.svg").read_text(encoding="utf-8")
    assert re.findall(r">(\d\.\d\d \(\d+\.\d\d ms\))<", drawn) == captions, "run: make tables"
    assert all(f">{model}<" in drawn for model in models)


def test_figures_are_drawn_anew_where_they_differ(tmp_path: Path) -> None:
    assert figures.write(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["cpu.svg", "h200.svg"]
    assert not figures.write(tmp_path)


def test_a_table_is_written_between_its_markers_and_nowhere_else(tmp_path: Path) -> None:
    path = tmp_path / "results.md"
    path.write_text("before\n<!-- table: headline -->\nold | table\n<!-- end of table -->\nafter\n")
    assert tables.write(path)
    text = path.read_text()
    assert text.startswith("before\n<!-- table: headline -->\n| |")
    assert text.endswith("<!-- end of table -->\nafter\n")
    assert "old | table" not in text
    assert "| X-CLIP-B/16, 8 frames | 145 | 144.91 |" in text
    assert not tables.write(path)


def test_the_table_of_models_has_speed_error_floor_and_memory_in_a_row() -> None:
    bytes_in = replace(CASE, input="uint8")
    rows = [
        Row(CASE, "engine", "timed", None, CHECK, TIMING, Roof(1, 1, 8.5, 0.85), memory_mb=412.3),
        Row(bytes_in, "engine-int8", "timed", None, CHECK, TIMING),
    ]
    first, second, *_ = tables._models(Run(FACTS, RUN.ceilings, rows)).splitlines()[2:]
    assert first == (
        "| B/32, 8 frames, batch 1 | float32 | engine | 1.0e-07 | 10.0 (9.0 to 11.0) | **1.50 (1.40 to 1.60)** | 0.050 "
        "| 85% | 412 |"
    )
    # bytes are not under the rate of float32, and were not weighed
    assert second.startswith("| B/32, 8 frames, batch 1, from bytes | float32 | engine-int8 |")
    assert second.endswith("| 0.050 |  |  |")


def test_the_table_of_training_steps_has_time_error_and_memory_in_a_row() -> None:
    times = {"cpu_ms": 80.0, "wall_ms": 90.0, "times_as_fast": 1.25, "slowest": 1.2, "fastest": 1.3}
    rows = [
        {"by": "hf-sdpa", "dtype": "float32", "error": 1e-6, "passed": True, "kept_mb": 600.0} | times,
        {"by": "layers", "dtype": "float32", "error": 2e-6, "passed": True, "kept_mb": 300.0} | times,
        {"by": "optimized", "dtype": "float32", "error": 1.0, "passed": False, "kept_mb": 300.0},
    ]
    lines = training.table({"facts": FACTS, "variant": "B/32", "batch": 2, "turns": 5, "rows": rows}).splitlines()
    assert lines[2:5] == [
        "| float32 | hf-sdpa | 1.0e-06 | 80 | baseline | 600 | 1.00 |",
        "| float32 | layers | 2.0e-06 | 80 | 1.25 (1.20 to 1.30) | 300 | 0.50 |",
        "| float32 | optimized | 1.0e+00 |  | wrong | 300 | 0.50 |",
    ]
    assert lines[-1].endswith("on a processor, one thread, torch 2.11, commit abc1234, 2026-01-01.")


@pytest.mark.slow
def test_training_steps_are_measured_and_written(tmp_path: Path) -> None:
    path = tmp_path / "training.json"
    threads = torch.get_num_threads()
    try:
        assert training.measure(path, ["reference"], "tiny", 1) == 0
    finally:
        torch.set_num_threads(threads)
    found = json.loads(path.read_text())
    assert [(row["dtype"], row["by"]) for row in found["rows"]] == list(
        itertools.product(training.DTYPES, (*training.CONTENDERS, "reference"))
    )
    assert all(row["passed"] and row["cpu_ms"] > 0 and row["kept_mb"] > 0 for row in found["rows"])
    with pytest.raises(InputError, match="unknown provider 'fastest'"):
        training.measure(None, ["fastest"])


def test_a_marker_of_no_table_is_an_error() -> None:
    with pytest.raises((KeyError, InputError)):
        tables.filled("<!-- table: nothing/models -->\n<!-- end of table -->")
    with pytest.raises(KeyError):
        tables.filled("<!-- table: reproduce/nothing -->\n<!-- end of table -->")


@pytest.mark.parametrize(
    ("second", "noise", "verdict"),
    [(8.0, 0.01, "faster"), (12.0, 0.01, "slower"), (10.3, 0.01, "no difference"), (8.0, 0.5, "no difference")],
)
def test_two_runs_are_compared_row_by_row(second: float, noise: float, verdict: str) -> None:
    later = replace(TIMING, median_ms=second, noise=noise)
    other = Run(FACTS, {}, [replace(RUN.rows[0], timing=later), Row(CASE, "new", "timed", None, CHECK, TIMING)])
    (change,) = compare.compare(RUN, other)
    assert (change.provider, change.verdict) == ("layers", verdict)


@pytest.mark.parametrize(("second", "code"), [(8.0, 0), (12.0, 1)])
def test_the_comparison_of_files_ends_with_a_code(
    second: float, code: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    paths = [tmp_path / "a.json", tmp_path / "b.json"]
    RUN.save(paths[0])
    slower = replace(RUN.rows[0], timing=replace(TIMING, median_ms=second))
    Run({**FACTS, "torch": "2.12"}, {}, [slower]).save(paths[1])
    assert compare.main(*paths) == code
    out = capsys.readouterr().out
    assert "not the same: torch: 2.11 and 2.12" in out
    assert "layers" in out


def test_the_fastest_round_of_each_row_is_kept() -> None:
    slow = replace(RUN.rows[0], timing=replace(TIMING, median_ms=20.0))
    best = history._best([Run(FACTS, {}, [slow, RUN.rows[1]]), Run(FACTS, {}, [RUN.rows[0], RUN.rows[1]])])
    assert best.rows == [RUN.rows[0], RUN.rows[1]]


@pytest.mark.parametrize("suite", suites.SUITES)
def test_every_suite_names_cases_and_providers_that_exist(suite: str) -> None:
    found = suites.jobs(suite)
    names = {job.case.name for job in found}
    assert "model" in names
    assert suite in ("cpu", "rivals") or OPS.keys() <= names
    assert all(name in (PROVIDERS if job.case.name == "model" else BACKENDS) for job in found for name in job.providers)
    assert all(job.providers for job in found)
    # nothing is measured twice
    assert len(set(found)) == len(found)


def test_the_suite_of_models_has_what_the_engine_is_held_to() -> None:
    found = {(job.case.variant, job.case.batch, job.case.dtype): job for job in suites.jobs("cpu")[:-1]}
    assert set(found) == set(itertools.product(("B/32", "B/16"), (1, 4), ("float32", "bfloat16")))
    for (_, _, dtype), job in found.items():
        assert {"hf-sdpa", "layers", "engine"} <= set(job.providers)
        assert ("engine-int8" in job.providers) == (dtype == "bfloat16")
        assert (job.case.frames, job.case.input, job.case.direction) == (8, "normalised", "forward")
    assert {"reference", "optimized"} <= set(found["B/32", 1, "float32"].providers)
    assert suites.jobs("cpu")[-1].case.direction == "train"


def test_a_suite_from_bytes_trains_on_numbers() -> None:
    found = [job.case for job in suites.jobs("cpu", "uint8")]
    assert {case.input for case in found[:-1]} == {"uint8"}
    assert (found[-1].direction, found[-1].input) == ("train", "normalised")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--suite", "gpu"], "unknown suite 'gpu': choose one of cpu, ops, rivals, tiny"),
        (["--suite", "tiny", "--cache", "hot"], "unknown cache 'hot': choose one of warm, cold"),
        (["--suite", "tiny", "--input", "mp4"], "unknown input 'mp4': choose one of normalised, uint8"),
        (["--case", "layer_norm", "--input", "uint8"], "layer_norm has its own"),
        (["--suite", "tiny", "--json", "/no/such/folder/a.json"], "there is no folder '/no/such/folder'"),
    ],
)
def test_bad_options_are_a_line(arguments: list[str], words: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert command(["run", *arguments]) == 2
    out, err = capsys.readouterr()
    assert err.startswith("error: ")
    assert words in err
    assert (out, err.count("\n")) == ("", 1)


def test_the_command_keeps_its_rows_and_says_how_long_it_took(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("xclip_fast.bench.run.ceilings", lambda *arguments, **named: RUN.ceilings)
    monkeypatch.setattr("xclip_fast.bench.run.QUICK", Effort(blocks=1, block=0.001, memory=False))
    path = tmp_path / "results.json"
    arguments = ["run", "--case", "clip_logits", "--variant", "tiny", "--cache", "cold", "--json", str(path)]
    assert command(arguments) == 0
    rows = Run.load(path).rows
    assert (
        capsys.readouterr().out.splitlines()[-1]
        == f"{len(rows)} rows in 0 min {round(Run.load(path).facts['seconds'])} s"
    )
    assert {row.timing.cache for row in rows if row.timing} == {"cold"}
    VALIDATOR.validate(json.loads(path.read_text()))
