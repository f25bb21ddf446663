"""``make gpu`` without a GPU: the dry run of every part, and a record that survives crashes and deadlines."""

from __future__ import annotations

import ast
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.gpu import e2e, launches, parity, sanitize
from benchmarks.gpu.journal import Journal
from benchmarks.gpu.prepare import run as run_command
from xclip_fast.bench.providers import PROVIDERS
from xclip_fast.bench.record import Run

ROOT = Path(__file__).parents[2]
FACTS = {"commit": "abc"}


def gpu(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "benchmarks.gpu", *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=280)


def test_a_dry_run_of_every_part(tmp_path: Path) -> None:
    done = gpu("--dry-run", "--out", str(tmp_path))
    assert done.returncode == 0, done.stdout + done.stderr
    assert "all parts are complete" in done.stdout
    for part in ("parity", "sanitize", "sweep", "e2e", "train"):
        found = json.loads((tmp_path / f"{part}.json").read_text())
        assert found["complete"] is True
        assert found["cases"]
    rows = Run.load(tmp_path / "results.json").rows
    assert {row.case.direction for row in rows} == {"forward", "train"}
    assert {row.status for row in rows} == {"timed"}
    sweep = json.loads((tmp_path / "sweep.json").read_text())["cases"]
    assert all(case["candidates"] and case["candidates"][0]["status"] == "right" for case in sweep.values())
    # what comes back from a borrowed machine is eight files at most
    assert len(list(tmp_path.iterdir())) <= 8

    before = (tmp_path / "sanitize.json").read_text()
    again = gpu("--dry-run", "--out", str(tmp_path), "sanitize")
    assert again.returncode == 0
    assert "memcheck" not in again.stdout, "what was done is done again"
    assert (tmp_path / "sanitize.json").read_text() == before


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
    found = list(e2e.cases("forward", dry=False))
    assert {provider for _, provider in found} <= PROVIDERS.keys()
    assert {(case.variant, case.batch) for case, _ in found} == {
        (variant, batch) for variant in ("B/32", "B/16", "L/14", "L/14-336") for batch in (1, 8, 32)
    }
    names = [e2e.name_of(case, provider) for case, provider in found]
    assert len(set(names)) == len(names)
    # compilers take minutes: they come when every case has an eager figure
    first_compiled = next(index for index, (_, provider) in enumerate(found) if "compile" in provider)
    assert all("compile" in provider for _, provider in found[first_compiled:])
    assert {case.dtype for case, _ in found} == {"bfloat16"}
    assert {case.batch for case, _ in e2e.cases("train", dry=False)} == {8}


def test_the_sweep_has_at_most_eight_candidates_each_of_its_kind() -> None:
    from benchmarks.gpu.candidates import MOST, TUNABLE
    from xclip_fast.bench.cases import Load, config_of

    for entry in TUNABLE:
        kinds: set[Any] = set()
        for variant, batch in (("B/32", 1), ("B/16", 8), ("L/14-336", 1)):
            made = entry.candidates(Load(config_of(variant), batch, 400))
            assert 2 <= len(made) <= MOST
            assert len(set(made)) == len(made), entry.op
            kinds |= {type(tiles) for tiles in made}
        assert len(kinds) == 1
        assert callable(getattr(entry.module, entry.function))


def test_sanitizers_look_at_every_kernel() -> None:
    kernels = [node.name for path in (ROOT / "kernels").glob("*.py") for node in ast.parse(path.read_text()).body
               if isinstance(node, ast.FunctionDef) and node.name.endswith("_kernel")]  # fmt: skip
    assert len(kernels) >= 18
    for name in [*kernels, "planted_fwd_kernel"]:
        assert any(part in name for part in sanitize.NAMES), name
    assert "patch_embed_kernel(" in (ROOT / "csrc" / "patch_embed_kernel.h").read_text()
    assert "planted_fwd_kernel<<<" in (ROOT / "benchmarks" / "gpu" / "planted.cu").read_text()
    assert (ROOT / sanitize.EXTENSION).exists()


def test_every_launcher_is_launched_at_the_sizes_of_the_models() -> None:
    from benchmarks.static.capture import captured_launches
    from benchmarks.static.gate import kernels

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
    journal = Journal(tmp_path / "parity.json", FACTS, 60)
    assert not parity.main(journal, tmp_path, True)
    assert "slow" not in journal.cases
    assert journal.content["cut_off"]["slow"]["tests"]["passed"] >= 2
    assert journal.content["complete"] is False
