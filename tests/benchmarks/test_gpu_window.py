"""Windows on a GPU: turns between processes, cases that go wrong, the table at the end."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("triton")

from benchmarks.gpu import __main__ as command
from benchmarks.gpu import kit, verdict, window
from benchmarks.gpu.lane import FAILED, PASSED, WRONG
from benchmarks.gpu.lock import Turns


def test_who_measures_is_alone_and_who_works_shares(tmp_path: Path) -> None:
    inside: set[str] = set()
    seen: list[set[str]] = []
    both = threading.Barrier(2, timeout=20)

    def share(name: str) -> None:
        with Turns(tmp_path).together():
            inside.add(name)
            both.wait()
            seen.append(set(inside))
            both.wait()
            inside.discard(name)

    def measure(name: str) -> None:
        with Turns(tmp_path).alone():
            inside.add(name)
            time.sleep(0.05)
            seen.append(set(inside))
            inside.discard(name)

    sharing = [threading.Thread(target=share, args=(name,)) for name in ("a", "b")]
    for thread in sharing:
        thread.start()
    time.sleep(0.1)
    measuring = [threading.Thread(target=measure, args=(name,)) for name in ("x", "y")]
    for thread in measuring:
        thread.start()
    for thread in (*sharing, *measuring):
        thread.join(20)
    assert seen[:2] == [{"a", "b"}] * 2
    assert sorted(map(sorted, seen[2:])) == [["x"], ["y"]]


def test_who_waits_to_measure_is_not_overtaken(tmp_path: Path) -> None:
    order: list[str] = []
    first = Turns(tmp_path)
    first.stay()

    def measure() -> None:
        with Turns(tmp_path).alone():
            order.append("alone")

    def share() -> None:
        with Turns(tmp_path).together():
            order.append("together")

    threads = []
    for work in (measure, share):
        threads.append(threading.Thread(target=work))
        threads[-1].start()
        time.sleep(0.2)
    # who stays may go in and out, whoever waits
    with first.together():
        assert order == []
    with first.alone():
        order.append("first")
    for thread in threads:
        thread.join(20)
    assert order.index("alone") < order.index("together")


@pytest.fixture
def faulty(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> dict[str, Any]:
    """The record of a window whose cases go wrong, and what it said."""
    monkeypatch.setitem(window.MODULES, "faulty", "faulty_window")
    monkeypatch.setitem(window.LANES, "faulty", ("a", "never begins"))
    monkeypatch.setitem(os.environ, "PYTHONPATH", str(Path(__file__).parent))
    monkeypatch.setitem(os.environ, "TRITON_CACHE_DIR", str(tmp_path / "triton"))
    monkeypatch.setattr(kit, "KIT", tmp_path / "none.tar.xz")
    code = window.run("faulty", tmp_path, seconds=150)
    content: dict[str, Any] = json.loads((tmp_path / "faulty.json").read_text())
    return content | {"code": code, "said": capsys.readouterr().out}


def test_a_case_that_goes_wrong_costs_itself_alone(faulty: dict[str, Any]) -> None:
    cases = faulty["cases"]
    statuses = {name: case["status"] for name, case in cases.items()}
    assert statuses == {
        "good": PASSED,
        "crashes": FAILED,
        "fails": FAILED,
        "hangs": FAILED,
        "wrong": WRONG,
        "measures": PASSED,
        "imports": FAILED,
    }
    assert all("cpu_s" in cases[name] for name in ("good", "wrong"))
    assert "code 11" in cases["crashes"]["reason"]
    assert "longer" in cases["hangs"]["reason"]
    assert cases["fails"]["reason"] == "ValueError: the first line ... the last one"
    assert faulty["lanes"]["a"]["complete"]
    assert faulty["lanes"]["a"]["restarts"] == 2
    assert not faulty["lanes"]["never begins"]["complete"]
    assert "this lane cannot begin" in faulty["lanes"]["never begins"]["log"]
    assert faulty["code"] == 1
    said = faulty["said"]
    assert "no kit" in said
    assert "wrong wrong: output 0 errs 5.00e-01, 1.00e-02 allowed" in said
    assert "never begins: UNFINISHED" in said


def record(cases: dict[str, Any], **others: Any) -> dict[str, Any]:
    """A record of a window."""
    head = {"facts": {"commit": "abc1234", "gpu": "a GPU"}, "window": "check", "rehearsed": False, "limit_s": 170}
    head |= {"kit": {"unpacked": 7, "compiled_here": 1}, "wall_s": 3.0}
    return head | {"cases": cases, "lanes": {"a": {"complete": True, "restarts": 0, "log": ""}}} | others


def timed(provider: str, ratio: float, method: str = "graph", batch: int = 8) -> dict[str, Any]:
    timing = {"method": method, "median_ms": 2.0, "ratio": ratio, "ratio_p10": ratio, "ratio_p90": ratio}
    case = {"variant": "B/16", "batch": batch, "input": "normalised", "direction": "forward"}
    return {"provider": provider, "case": case, "timing": timing | {"baseline": "hf-sdpa"}, "reason": None}


def test_the_table_fits_into_the_end_of_a_log_and_says_what_it_leaves_out(tmp_path: Path) -> None:
    check = {"what": "output 0", "error": None, "allowance": 0.01, "passed": False}
    cases = {f"op x{i}": {"status": WRONG, "checks": [check]} for i in range(500)}
    rows = [{"contender": f"{i} {'long name ' * 12}", "median_ms": 1.0, "ratio": 1.0} for i in range(200)]
    cases |= {"fc1 B/16 x8": {"status": PASSED, "rows": rows}}
    said = verdict.table(tmp_path, record(cases))
    assert len(said) <= verdict.MOST
    assert said.splitlines()[-1].endswith(f"more lines: see {tmp_path}/check.json")
    assert "op x0 wrong: output 0 errs not finite, 1.00e-02 allowed" in said
    # failures leave room for figures
    assert f"{500 - verdict.FAILURES} more failed or wrong" in said
    assert "fc1 B/16 x8 0 long name" in said
    assert not verdict.sound(record(cases))
    # sanitizers are slow, and may not come to their end
    lanes = {name: {"complete": name == "a", "restarts": 0, "log": ""} for name in ("a", "memcheck", "b")}
    assert not verdict.sound(record({}, lanes=lanes))
    del lanes["b"]
    assert verdict.sound(record({}, lanes=lanes))


def test_figures_stand_beside_their_goals(tmp_path: Path) -> None:
    rows = [
        timed("hf-sdpa", 1.0),
        timed("engine", 1.9),
        timed("hf-compile-max-cublas", 1.4),
        timed("engine", 2.5, "wall"),
    ]
    kernels = [{"contender": name, "median_ms": t, "ratio": 1.0} for name, t in (("flash", 0.3), ("triton", 0.2))]
    content = record(
        {"B/16 x8": {"status": PASSED, "rows": rows, "mfu": {}}, "ifa B/16 x8": {"status": PASSED, "rows": kernels}}
    )
    said = verdict.table(tmp_path, content)
    assert "B/16 x8 engine over the best compiled: 1.357 (>= 1.25) reached" in said
    assert "B/16 x8 attention over SDPA on joined keys: 1.500 (>= 1.3) reached" in said
    assert "B/16 x8 engine wall: 2.000 ms, 2.500 (2.500-2.500) of hf-sdpa" in said
    assert verdict.sound(content)
    rehearsed = verdict.table(tmp_path, content | {"rehearsed": True})
    assert "no number below means anything" in rehearsed
    assert "reached" not in rehearsed


def fill(cache: Path, key: str, name: str = "some_kernel") -> None:
    """An entry as Triton leaves it."""
    folder = cache / key
    folder.mkdir(parents=True)
    files = [f"{name}.{kind}" for kind in ("cubin", "json", "ptx", "ttir")]
    for file in files:
        (folder / file).write_text(file)
    group = {"child_paths": {file: str(folder / file) for file in files}}
    (folder / f"{kit.GROUP}{name}.json").write_text(json.dumps(group))


def test_a_kit_is_found_in_another_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache, there, path = tmp_path / "here", tmp_path / "there", tmp_path / "kit.tar.xz"
    digest = "ab" * 32
    fill(cache, kit._key(digest))
    fill(cache, "OFTHECOMPILER")
    (cache / "STUB").mkdir()
    (cache / "STUB" / "__triton_launcher.cpython-312-x86_64-linux-gnu.so").write_bytes(b"\x7fELF")
    (cache / "FAILED").mkdir()
    lanes = tmp_path / "check.json"
    kernels = [{"kernel": "some_kernel", "hash": digest, "found": False}]
    lanes.write_text(json.dumps({"facts": {"commit": "abc"}, "cases": {"op x": {"kernels": kernels}}}))
    manifest = kit.pack([lanes], path, cache)
    assert manifest["entries"][kit._key(digest)] == {"kernel": "some_kernel", "for": ["op x"]}
    assert manifest["entries"]["OFTHECOMPILER"]["for"] == ["torch.compile"]
    assert set(manifest["versions"]) == set(kit.VERSIONS)
    assert "FAILED" not in manifest["entries"]
    monkeypatch.setenv("TRITON_CACHE_DIR", str(there))
    prepared = kit.prepare(path, carry=False)
    assert prepared["unpacked"] == 3
    found = json.loads((there / kit._key(digest) / f"{kit.GROUP}some_kernel.json").read_text())["child_paths"]
    # what a launch reads, where it is now
    assert sorted(found) == ["some_kernel.cubin", "some_kernel.json"]
    assert all(Path(file).read_text() == name for name, file in found.items())
    assert kit.prepare(path, carry=False)["unpacked"] == 0


@pytest.mark.parametrize("name", kit.VERSIONS)
def test_a_kit_of_another_machine_is_named_and_not_used(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache, path = tmp_path / "here", tmp_path / "kit.tar.xz"
    fill(cache, "KEY")
    versions = kit.versions()
    monkeypatch.setattr(kit, "versions", lambda: versions | {name: "another"})
    kit.pack([], path, cache)
    monkeypatch.setattr(kit, "versions", lambda: versions)
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "there"))
    prepared = kit.prepare(path, carry=False)
    assert prepared["unpacked"] == 0
    assert any(f"{name} another there, {versions[name]} here" in line for line in prepared["said"])


@pytest.mark.parametrize("content", [b"", b"no archive", b"\xfd7zXZ\x00cut off"])
def test_a_damaged_kit_is_named_and_not_used(content: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "there"))
    path = tmp_path / "kit.tar.xz"
    path.write_bytes(content)
    prepared = kit.prepare(path, carry=False)
    assert prepared["unpacked"] == 0
    assert f"{path} is no kit" in prepared["said"][0]


def test_a_carried_extension_takes_the_place_of_one_of_other_sources(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kit, "ROOT", tmp_path)
    (tmp_path / "xclip_fast").mkdir()
    library, sources = (tmp_path / name for name in kit.EXTENSION)
    packed = {kit.EXTENSION[0]: b"new", kit.EXTENSION[1]: b"sums"}
    kit._carry({}, replace=True)
    assert not library.exists()
    kit._carry(packed, replace=False)
    assert (library.read_bytes(), sources.read_bytes()) == (b"new", b"sums")
    library.write_bytes(b"built here, of the same sources")
    kit._carry(packed, replace=True)
    assert library.read_bytes() == b"built here, of the same sources"
    sources.write_bytes(b"older sums")
    kit._carry(packed, replace=False)
    assert library.read_bytes() == b"built here, of the same sources"
    kit._carry(packed, replace=True)
    assert library.read_bytes() == b"new"


def test_a_process_ends_with_all_that_it_has_started(tmp_path: Path) -> None:
    # a session of its own, and a name that looks like the fields behind it
    script = "import subprocess, sys, time; p = subprocess.Popen(['sh', '-c', 'exec sleep 60'], start_new_session=True)"
    parent = subprocess.Popen(
        [sys.executable, "-c", f"{script}; print(p.pid, flush=True); time.sleep(60)"], stdout=subprocess.PIPE, text=True
    )
    assert parent.stdout is not None
    child = int(parent.stdout.readline())
    assert child in window._family(parent.pid)
    window._kill(parent)
    assert parent.poll() is not None
    deadline = time.monotonic() + 10
    while Path(f"/proc/{child}").exists() and time.monotonic() < deadline:
        state = Path(f"/proc/{child}/stat").read_text().rpartition(")")[2].split()[0]
        if state == "Z":
            break
        time.sleep(0.05)
    else:
        assert not Path(f"/proc/{child}").exists()


def test_another_gpu_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kit, "gpu", lambda: ("NVIDIA B200", "10.0"))
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "there"))
    said = kit.prepare(tmp_path / "none.tar.xz", carry=False)["said"]
    assert said[0].startswith("no kit at ")
    assert "NVIDIA B200 has 10.0" in said[1]


def test_a_kit_that_is_too_large_is_not_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fill(tmp_path / "here", "KEY")
    monkeypatch.setattr(kit, "MOST_BYTES", 10)
    with pytest.raises(ValueError, match="more than 0"):
        kit.pack([], tmp_path / "kit.tar.xz", tmp_path / "here")
    assert not (tmp_path / "kit.tar.xz").exists()


def test_results_are_made_of_figures(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from dataclasses import asdict

    from benchmarks.gpu import results
    from benchmarks.gpu.figures import STRONGEST
    from xclip_fast.bench.record import Case, Row, Run, Timing

    case = Case("model", "B/16", 8, 8, 400, "bfloat16", "forward", "normalised", "cuda")
    timing = Timing("graph", "warm", 5.0, 5.0, 5.0, 0.1, "hf-sdpa", 1.9, 1.9, 1.9, 0.01, "faster", 5)
    rows = {name: asdict(Row(case, name, "timed", timing=timing)) for name in ("hf-sdpa", "engine", STRONGEST)}
    machine = {"gpu": "a GPU", "commit": "abc1234"}
    cases = {
        "machine": {"status": PASSED, "machine": machine},
        "ceilings": {"status": PASSED, "rates": {"bfloat16_tflops": 800.0, "copy_gbs": 3000.0}},
        "B/16 x8": {"status": PASSED, "rows": [rows["hf-sdpa"], rows["engine"]]},
        f"B/16 x8 {STRONGEST}": {"status": PASSED, "rows": list(rows.values())},
        "fc1 B/16 x8": {"status": PASSED, "rows": [{"contender": "triton", "median_ms": 1.0}]},
    }
    figures, out = tmp_path / "figures.json", tmp_path / "gpu.json"
    figures.write_text(json.dumps(record(cases)))
    assert results.main([str(figures), str(out)]) == 0
    found = Run.load(out)
    assert [row.provider for row in found.rows] == ["hf-sdpa", "engine", STRONGEST]
    assert found.facts["commit"] == "abc1234"
    assert all(row.roof is not None and 0 < row.roof.achieved < 1 for row in found.rows)
    del cases["ceilings"]
    figures.write_text(json.dumps(record(cases)))
    assert results.main([str(figures), str(out)]) == 0
    assert [row.roof for row in Run.load(out).rows] == [None] * 3
    for wrong in (record(cases, rehearsed=True), record({}), {}):
        figures.write_text(json.dumps(wrong))
        assert results.main([str(figures), str(out)]) == 1
    assert capsys.readouterr().err.count("holds no results") == 3


def test_a_window_without_a_gpu_is_refused_in_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    assert command.main(["--window", "check", "--out", str(tmp_path)]) == 2
    assert capsys.readouterr().err == (
        "error: a window on a GPU was asked for, and torch finds none here: try --dry-run\n"
    )
