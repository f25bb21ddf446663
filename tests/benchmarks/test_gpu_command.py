"""``make gpu`` without a GPU: the dry run of every part, and a record that survives crashes and deadlines."""

from __future__ import annotations

import ast
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.gpu import __main__ as command
from benchmarks.gpu import e2e, goals, journal, launches, parity, sanitize, sweep, tune
from benchmarks.gpu.journal import Journal
from benchmarks.gpu.prepare import run as run_command
from xclip_fast import tuning
from xclip_fast.bench import models
from xclip_fast.bench.providers import PROVIDERS
from xclip_fast.bench.record import Case, Row, Run, Timing
from xclip_fast.ops.cases import OPS

ROOT = Path(__file__).parents[2]
FACTS = {"commit": "abc"}


def gpu(*arguments: str) -> subprocess.CompletedProcess[str]:
    program = [sys.executable, "-m", "benchmarks.gpu", *arguments]
    return subprocess.run(program, cwd=ROOT, capture_output=True, text=True, timeout=280)


# a part a test: all of them in one command take minutes on a busy machine
@pytest.mark.parametrize("part", command.PARTS)
def test_a_dry_run_of_a_part(part: str, tmp_path: Path) -> None:
    done = gpu("--dry-run", "--out", str(tmp_path), part)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "all parts are complete" in done.stdout
    found = json.loads((tmp_path / f"{part}.json").read_text())
    assert found["complete"] is True
    cases = found["cases"]
    assert cases
    # what comes back from a borrowed machine is eight files at most: these two, and one a part
    assert {path.name for path in tmp_path.iterdir()} <= {"prepare.json", "results.json", f"{part}.json"}
    if part in ("e2e", "train"):
        rows = Run.load(tmp_path / "results.json").rows
        assert {(row.case.direction, row.status) for row in rows} == {
            ("train" if part == "train" else "forward", "timed")
        }
    elif part == "sweep":
        assert all(case["rows"] and case["rows"][0]["status"] == "right" for case in cases.values())
        table = tune.table_of({"facts": {}, "cases": cases})
        assert table["tiles"].keys() <= tuning.tunables().keys()
    elif part == "questions":
        assert {row["status"] for case in cases.values() for row in case.get("rows", [])} == {"timed"}
    elif part == "sanitize":
        before = (tmp_path / "sanitize.json").read_text()
        again = gpu("--dry-run", "--out", str(tmp_path), part)
        assert again.returncode == 0
        assert "memcheck" not in again.stdout, "what was done is done again"
        assert (tmp_path / "sanitize.json").read_text() == before


def test_without_a_name_every_part_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ran: list[str] = []
    monkeypatch.setenv("TRITON_INTERPRET", os.environ.get("TRITON_INTERPRET", "0"))
    monkeypatch.setattr(command, "_run", lambda part, options: ran.append(part) or part != "sweep")
    assert command.main(["--dry-run", "--out", str(tmp_path)]) == 1
    assert ran == list(command.PARTS)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
def test_without_a_gpu_it_says_so(tmp_path: Path) -> None:
    done = gpu("--out", str(tmp_path))
    assert done.returncode == 2
    assert done.stderr.endswith("error: torch finds no GPU here: try make gpu-dry-run\n")


def test_an_unknown_part_is_refused(tmp_path: Path) -> None:
    done = gpu("--out", str(tmp_path), "--dry-run", "speed")
    assert done.returncode == 2
    assert "unknown part 'speed': choose from parity" in done.stderr


def test_the_record_goes_on_where_it_was_cut_off(tmp_path: Path) -> None:
    path = tmp_path / "part.json"
    first = Journal(path, FACTS, 60)
    first.add("one", {"status": "passed"})
    # each case is in the file as soon as it is done
    assert json.loads(path.read_text())["cases"]["one"]["status"] == "passed"
    second = Journal(path, FACTS, 60)
    assert list(second.todo(["one", "two"])) == ["two"]
    assert not second.finish(["one", "two"])
    second.add("two", {})
    assert second.finish(["one", "two"])


def test_a_case_that_crashed_its_process_is_not_begun_again(tmp_path: Path) -> None:
    path = tmp_path / "part.json"
    Journal(path, FACTS, 60).start("bad")
    found = Journal(path, FACTS, 60)
    assert found.cases["bad"]["status"] == "failed"
    assert list(found.todo(["bad", "good"])) == ["good"]


def test_results_of_other_code_or_machines_are_not_carried_on(tmp_path: Path) -> None:
    path = tmp_path / "part.json"
    Journal(path, FACTS, 60).add("one", {})
    assert list(Journal(path, {"commit": "def"}, 60).todo(["one"])) == ["one"]


@pytest.mark.parametrize("content", ["", "{", "[]", '{"facts": 1}'])
def test_a_broken_record_is_begun_anew(content: str, tmp_path: Path) -> None:
    path = tmp_path / "part.json"
    path.write_text(content)
    assert Journal(path, FACTS, 60).cases == {}


def test_nothing_begins_after_the_deadline(tmp_path: Path) -> None:
    assert list(Journal(tmp_path / "part.json", FACTS, 0).todo(["one"])) == []


def test_a_command_that_hangs_is_ended_with_its_children() -> None:
    found = run_command(["sh", "-c", "echo begun; sleep 60 & wait"], 1.0)
    assert found["code"] is None
    assert found["output"] == "begun\n"
    assert run_command(["no-such-program"], 5)["code"] == 127


def test_outcomes_failures_and_errors_are_read_from_junit() -> None:
    text = """<testsuites><testsuite>
    <testcase name="a"><properties><property name="parity" value="('op x', 'float16', 1e-4, 2e-4, 9e-4)"/>
    <property name="parity" value="('op x', 'float16', 8e-4, 2e-4, 9e-4)"/>
    <property name="parity" value="('op y', 'float32', inf, nan, 1e-5)"/></properties></testcase>
    <testcase name="b"><failure message="wrong&#10;details">long</failure></testcase>
    <testcase name="c"><skipped/></testcase>
    </testsuite></testsuites>"""
    counts, failures, rows = parity.read_junit(text)
    assert counts == {"passed": 1, "failed": 1, "skipped": 1}
    assert failures == ["b: wrong"]
    assert [(row["what"], row["error"]) for row in rows] == [("op x", 8e-4), ("op y", 1e308)]
    assert parity.read_junit("") == ({}, [], [])


def test_the_matrix_names_providers_that_exist_and_the_most_telling_cases_first() -> None:
    for direction in ("forward", "train"):
        found = [(case, provider) for case, group in e2e.plan(direction, dry=False) for provider in group]
        assert {provider.removesuffix(f" {e2e.MEMORY}") for _, provider in found} <= PROVIDERS.keys()
        names = [e2e.name_of(case, provider) for case, provider in found]
        assert len(set(names)) == len(names)
        assert {case.dtype for case, _ in found} == {"bfloat16"}
    assert {case.batch for case, _ in e2e.plan("train", dry=False)} == {8}
    found = e2e.plan("forward", dry=False)
    variants = ("B/32", "B/16", "L/14", "L/14-336")
    assert {(case.variant, case.batch) for case, _ in found} == {
        (one, batch) for one in variants for batch in (1, 8, 32)
    }
    by_bytes = {
        (case.variant, case.batch): {provider for other, group in found if other == case for provider in group}
        for case, _ in found
        if case.input == "uint8"
    }
    assert by_bytes == {shape: {*e2e.FIRST, *e2e.STRONGEST} for shape in e2e.BYTES}
    # a training step is at its best captured, and compiled, on both sides
    for variant in variants:
        trained = {one for case, group in e2e.plan("train", dry=False) if case.variant == variant for one in group}
        assert {"hf-sdpa", *e2e.STRONGEST, "hf-compile", *goals.TRAINED} <= trained
    assert models.methods_of(e2e.plan("train", dry=False)[0][0]) == ("graph", "wall")
    # what the numbers to reach compare is there before anything else is measured
    needed = {*e2e.FIRST, *e2e.STRONGEST}
    head = found[: len(e2e.PRIMARY) * (1 + len(e2e.STRONGEST))]
    assert {provider for _, group in head for provider in group} == needed
    assert [(case.variant, case.batch) for case, _ in head[: len(e2e.PRIMARY)]] == e2e.PRIMARY


def test_a_case_that_was_killed_for_want_of_time_is_begun_anew(tmp_path: Path) -> None:
    path = tmp_path / "part.json"
    for time in range(journal.PATIENCE):
        before = Journal(path, FACTS, 60)
        assert list(before.todo(["slow", "good"])) == ["slow", "good"], time
        before.start("slow")
        journal.forgive(path)
    assert Journal(path, FACTS, 60).cases["slow"]["status"] == "failed"
    # nothing was running, or there is no record
    journal.forgive(path)
    journal.forgive(tmp_path / "none.json")
    assert not (tmp_path / "none.json").exists()


def test_a_process_ends_where_it_has_lost_its_gpu_and_only_there(monkeypatch: pytest.MonkeyPatch) -> None:
    codes: list[int] = []
    monkeypatch.setattr(os, "_exit", codes.append)

    def lost() -> None:
        raise RuntimeError("an illegal memory access was encountered")

    for used, synchronize, expected in (
        (False, lost, []),
        (True, lambda: None, []),
        (True, lost, [journal.LOST]),
    ):
        monkeypatch.setattr(torch.cuda, "is_initialized", lambda used=used: used)
        monkeypatch.setattr(torch.cuda, "synchronize", synchronize)
        journal.leave_if_lost()
        assert codes == expected


def test_utilisation_is_of_the_data_sheet_and_of_models_alone() -> None:
    case = Case("model", "L/14", 8, 32, 400, "bfloat16", "forward", "normalised", "cuda")
    timing = Timing("graph", "warm", 73.6, 73.0, 74.0, 0.1, "hf-sdpa", 1.7, 1.6, 1.8, 0.01, "faster", 8)
    rates = {"bfloat16_tflops": 798.0, "copy_gbs": 3000.0}
    share = e2e.peak_share(Row(case, "engine", "timed", timing=timing), rates)
    assert share == pytest.approx(0.57, abs=0.02)
    assert e2e.peak_share(Row(case, "engine-float8", "timed", timing=timing), rates) == share
    assert e2e.peak_share(Row(case, "open_clip-frames", "timed", timing=timing), rates) is None
    assert e2e.peak_share(Row(case, "engine", "failed"), rates) is None


def test_every_kernel_with_tiles_is_swept() -> None:
    text = "".join(path.read_text() for path in (ROOT / "kernels").glob("*.py"))
    names = set(re.findall(r'@tunable\(\s*"(\w+)"', text))
    assert names == tuning.tunables().keys()
    found = sweep.sweeps(dry=False).values()
    assert {case.kernel.name for case in found if case.kernel is not None} == names
    assert all(case.kernel.op == case.op for case in found if case.kernel is not None)
    # what a launch is tuned for is a call of an op that has example arguments, and a backward pass where it needs one
    assert {kernel.op for kernel in tuning.tunables().values()} <= OPS.keys()
    assert all(OPS[kernel.op].trained for kernel in tuning.tunables().values() if kernel.backward)


def test_the_sweep_covers_every_op_and_the_batches_of_the_end_to_end_matrix() -> None:
    found = sweep.sweeps(dry=False)
    assert {case.op for case in found.values() if case.kernel is None} == set(OPS)
    assert {(case.variant, case.batch) for case in found.values()} >= {
        (variant, batch) for variant in ("B/16", "B/32", "L/14") for batch in (1, 8)
    }
    for name, case in found.items():
        assert name.endswith(f"{case.variant} x{case.batch}")


def test_goals_are_read_from_what_the_parts_record(tmp_path: Path) -> None:
    assert all(goal.found is None for goal in goals.goals(tmp_path))

    def timed(ratio: float, method: str = "graph") -> dict[str, Any]:
        return {"timing": {"ratio": ratio, "method": method}}

    def write(part: str, cases: dict[str, Any]) -> None:
        (tmp_path / f"{part}.json").write_text(json.dumps({"cases": cases}))

    forward = {
        "B/16 x8 engine": {"rows": [timed(1.9), timed(2.0, "wall")], "mfu": {}},
        "B/16 x8 hf-sdpa": {"rows": [timed(1.0), timed(1.0, "wall")]},
        "B/16 x8 hf-compile-max-flash": {"rows": [timed(1.4), timed(1.3, "wall")]},
        "B/16 x8 hf-compile-max-cudnn": {"rows": [timed(1.5, "events")]},
        "B/16 x8 engine-float8": {"rows": [{"timing": None}]},
        "B/16 x1 engine": {"status": "failed"},
    }
    forward["B/32 x1 uint8 engine"] = {"rows": [timed(4.0)]}
    forward["B/32 x1 uint8 hf-compile"] = {"rows": [timed(2.0)]}
    write("e2e", forward)
    kept = {"layers": 5.0, "hf-compile-max-flash": 10.0}
    trained = {f"B/16 x8 {name} memory": {"memory": {"kept_mb": size}} for name, size in kept.items()}
    for name, captured, seen in (
        ("layers", 1.5, 1.9),
        ("layers-compile", 1.8, 1.7),
        ("hf-compile-max-flash", 1.5, 1.2),
        ("hf-compile", 1.2, 1.5),
    ):
        trained[f"B/16 x8 {name}"] = {"rows": [timed(captured), timed(seen, "wall")]}
    write("train", trained)
    times = {"flash": 3.0, "cudnn": 2.8, "triton": 2.0}
    write("questions", {"ifa B/16 x8": {"rows": [{"contender": key, "median_ms": t} for key, t in times.items()]}})
    rows = [{"what": "extension", "ratio": 1.2}, {"what": "reference", "ratio": 0.3}, {"what": "torch"}]
    write("sweep", {"patch_embed backends B/16 x8": {"rows": rows}})
    found = {goal.name: goal for goal in goals.goals(tmp_path) if goal.found is not None}
    assert {name: round(goal.found or 0, 3) for name, goal in found.items()} == {
        "B/16 x8 engine over the best compiled": 1.267,
        "B/16 x8 engine over eager, as a user sees it": 2.0,
        "B/32 x1 engine from bytes over the best compiled": 2.0,
        "B/16 x8 training step over the best compiled, captured": 1.2,
        "B/16 x8 training step over the best compiled, as a user sees it": 1.267,
        "B/16 x8 activations kept, of the compiled one's": 0.5,
        "B/16 x8 attention over SDPA on joined keys": 1.4,
        "B/16 x8 patch embedding over the eager chain": 4.0,
    }
    assert all(str(goal).endswith("reached") for goal in found.values())
    assert str(goals.Goal("x", 0.6, 0.7, at_most=True)) == "x: 0.700 (<= 0.6) MISSED"
    assert str(goals.Goal("x", 3.0, None)) == "x: not measured (>= 3)"


def swept(ratio: float, *, low: float | None = None, default: bool = False, status: str = "right") -> dict[str, Any]:
    row = {"what": str(ratio), "tile": {"rows": int(ratio * 64)}, "default": default, "status": status}
    return row | {"ratio": ratio, "ratio_p10": low or ratio, "noise": 0.01}


def tuned(*cases: dict[str, Any]) -> dict[str, Any]:
    names = {"function": "clip_logits B/16 x8", "op": "clip_logits backends B/16 x8"}
    by_name = {next(names[kind] for kind in names if kind in case): case for case in cases}
    return tune.table_of({"facts": {"gpu": "NVIDIA X", "secret": 1}, "cases": {"rest": {}, **by_name}})


def of_tiles(*rows: dict[str, Any]) -> dict[str, Any]:
    whose = {"function": "clip_logits", "of": "clip_logits", "backward": False}
    return whose | {"shapes": ["512"], "rows": list(rows)}


def of_backends(**ratios: float) -> dict[str, Any]:
    rows = [{"what": name, "status": "right", "ratio": ratio} for name, ratio in ratios.items()]
    return {"op": "clip_logits", "call": "a call", "rows": [*rows, {"what": "none", "status": "refused"}]}


def test_the_best_tiles_enter_the_table() -> None:
    refused = {"what": "x", "status": "refused"}
    found = tuned(of_tiles(swept(1.0, default=True), swept(1.1), swept(1.2), swept(9.0, status="wrong"), refused))
    assert found["tiles"] == {"clip_logits": {"512": {"rows": 76}}}
    assert found["gpu"] == "NVIDIA X"
    assert "secret" not in found
    # within the noise, or not even at its worst: the default stays
    assert tuned(of_tiles(swept(1.005), swept(1.3, low=0.99)))["tiles"] == {}
    assert tuned(of_tiles(swept(1.2, default=True)))["tiles"] == {}
    assert tuned(of_tiles())["tiles"] == {}


@pytest.mark.parametrize(
    ("case", "best", "chosen"),
    [
        ({"torch": 0.9}, None, None),
        ({"torch": 0.98}, None, "torch"),
        ({"torch": 1.5}, None, "torch"),
        # by better tiles the kernel gains what it lacked
        ({"torch": 1.05}, 1.2, None),
        ({"torch": 0.5, "extension": 1.5}, None, None),
        ({"torch": 0.5, "extension": 0.9}, None, "triton"),
        ({"reference": 2.0}, None, None),
    ],
)  # fmt: skip
def test_a_kernel_that_does_not_gain_is_not_used(
    case: dict[str, float], best: float | None, chosen: str | None
) -> None:
    cases = [of_backends(**case)] + ([of_tiles(swept(best))] if best else [])
    assert tuned(*cases)["backends"] == ({"clip_logits": {"a call": chosen}} if chosen else {})


def test_tune_writes_what_the_library_reads(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "sweep.json"
    cases = {"clip_logits B/16 x8": of_tiles(swept(2.0)), "clip_logits backends B/16 x8": of_backends(torch=2.5)}
    path.write_text(json.dumps({"facts": {"gpu": "NVIDIA X"}, "cases": cases}))
    assert tune.main([str(path), "--out", str(tmp_path / "deep" / "x.json")]) == 0
    assert "1 launches tuned, 1 calls by another backend" in capsys.readouterr().out
    assert tuning.read(tmp_path / "deep" / "x.json")["tiles"] == {"clip_logits": {"512": {"rows": 128}}}
    for content in ("{", "[]", '{"cases": {}}', '{"facts": {}, "cases": {}}'):
        path.write_text(content)
        assert tune.main([str(path)]) == 1
    assert tune.main([str(tmp_path / "none.json")]) == 1
    assert capsys.readouterr().err.count("error: ") == 5


def test_a_table_is_added_to(tmp_path: Path) -> None:
    path, table = tmp_path / "sweep.json", tmp_path / "table.json"
    before = {"layer_norm": {"768": {"rows": 1}}, "clip_logits": {"512": {"rows": 1}, "40": {"rows": 2}}}
    table.write_text(
        json.dumps({"schema": tuning.SCHEMA, "tiles": before, "backends": {"clip_logits": {"a": "torch"}}})
    )
    path.write_text(json.dumps({"facts": {"gpu": "NVIDIA X"}, "cases": {"clip_logits B/16 x8": of_tiles(swept(2.0))}}))
    assert tune.main([str(path), "--add", "--out", str(table)]) == 0
    found = tuning.read(table)
    assert found["tiles"] == {
        "layer_norm": before["layer_norm"],
        "clip_logits": {"512": {"rows": 128}, "40": {"rows": 2}},
    }
    assert found["backends"] == {"clip_logits": {"a": "torch"}}
    assert tune.main([str(path), "--out", str(table)]) == 0
    assert tuning.read(table)["tiles"] == {"clip_logits": {"512": {"rows": 128}}}


def test_sanitizers_look_at_every_kernel() -> None:
    kernels = [node.name for path in (ROOT / "kernels").glob("*.py") for node in ast.parse(path.read_text()).body
               if isinstance(node, ast.FunctionDef) and node.name.endswith("_kernel")]  # fmt: skip
    assert len(kernels) >= 18
    for name in [*kernels, "planted_fwd_kernel"]:
        assert any(part in name for part in sanitize.NAMES), name
    assert "patch_rows_kernel(" in (ROOT / "csrc" / "patch_rows_kernel.h").read_text()
    assert "planted_fwd_kernel<<<" in (ROOT / "benchmarks" / "gpu" / "planted.cu").read_text()
    assert (ROOT / sanitize.EXTENSION).exists()


def test_every_launcher_is_launched_at_the_sizes_of_the_models() -> None:
    from benchmarks.compile_gate.capture import captured_launches
    from benchmarks.compile_gate.gate import kernels

    seen = set()
    for launcher in launches.launchers():
        with captured_launches() as found:
            small = launches.launch(launcher, "meta")
        seen |= {launch.name for launch in found}
        assert small > 5, launcher
    assert seen == kernels().keys()


def test_every_suite_of_parity_exists_and_the_most_telling_come_first() -> None:
    suites = parity.suites(dry=False)
    assert all((ROOT / asked[0]).exists() for asked in suites.values())
    assert [name.split("/")[1] for name in suites][:4] == ["gpu"] * 4
    for name, asked in suites.items():
        assert len(asked) == 1 or asked[0] == parity.FULL, name


def test_a_suite_that_is_cut_off_is_begun_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "test_slow.py"
    path.write_text("import time\nimport pytest\n@pytest.mark.parametrize('i', range(99))\n"
                    "def test_slow(i): time.sleep(1)\n")  # fmt: skip
    monkeypatch.setattr(parity, "suites", lambda dry: {"slow": [str(path)]})
    monkeypatch.setattr(parity, "FILE_DEADLINE", 12.0)
    record = Journal(tmp_path / "parity.json", FACTS, 60)
    assert not parity.main(record, tmp_path, True)
    assert "slow" not in record.cases
    assert record.content["cut_off"]["slow"]["tests"]["passed"] >= 2
    assert record.content["complete"] is False
