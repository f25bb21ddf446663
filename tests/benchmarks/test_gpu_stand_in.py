"""The stand-in for CUDA: its rules, and the windows rehearsed on it."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("triton")

from benchmarks.gpu import kit, questions, standin
from benchmarks.gpu.lane import record_of
from xclip_fast import _extension
from xclip_fast.bench.launches import launches_of
from xclip_fast.bench.record import Case
from xclip_fast.ops.cases import TINY

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def library() -> Path:
    try:
        return standin.build()
    except OSError as error:
        pytest.skip(str(error))


def rehearse(library: Path, script: str, **options: Any) -> list[str]:
    """What a script prints on the stand-in."""
    settings = os.environ | standin.environment(library, **options)
    settings.pop("TRITON_INTERPRET", None)
    begin = "from benchmarks.gpu import standin\nstandin.enter()\nimport torch\n"
    # PyTorch's threads of a backward pass may outlive what they need, where Python puts it away: seen once, an abort
    end = "\nimport os, sys\nsys.stdout.flush()\nos._exit(0)\n"
    done = subprocess.run(
        [sys.executable, "-c", begin + script + end],
        cwd=ROOT,
        env=settings,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout.splitlines()


def test_torch_finds_a_gpu_that_computes_nothing(library: Path) -> None:
    script = """
x = torch.ones(64, 64, device="cuda", dtype=torch.bfloat16)
print(torch.cuda.get_device_capability(), standin.in_force(), (x @ x + 1).sum().item())
print(standin.counts()["gemms"], standin.counts()["other_launches"] >= 3)
"""
    assert rehearse(library, script) == ["(9, 0) True 0.0", "1 True"]
    assert not standin.in_force()


def test_its_memory_has_an_end(library: Path) -> None:
    script = """
for size in (40, 400, 40):
    try:
        torch.empty(size << 20, dtype=torch.uint8, device="cuda")
        print("there")
    except torch.cuda.OutOfMemoryError as error:
        print(str(error)[:18])
    torch.cuda.empty_cache()
"""
    assert rehearse(library, script, memory=100 << 20) == ["there", "CUDA out of memory", "there"]


CAPTURE = """
import warnings
warnings.simplefilter("ignore")
x = torch.ones(8, device="cuda")
main, side = torch.cuda.Stream(), torch.cuda.Stream()

def forked(join):
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        y = x + 1
    if join:
        torch.cuda.current_stream().wait_stream(side)
    return y

def elsewhere():
    with torch.cuda.stream(side):
        x.add_(1)

def fresh():
    torch.cuda.synchronize()

ways = dict(plain=lambda: x * 2 + 1, joined=lambda: forked(True) + 1, unjoined=lambda: forked(False),
            read=lambda: x.sum().item(), waited=fresh, copied=lambda: x.new_tensor([1.0]), elsewhere=elsewhere)
WAY = "{way}"
graph = torch.cuda.CUDAGraph()
try:
    with torch.cuda.graph(graph, stream=main):
        ways[WAY]()
    print("captured", standin.counts()["captured"], standin.counts()["strays"])
except RuntimeError as error:
    print("refused")
"""


@pytest.mark.parametrize(
    ("way", "said"),
    [
        ("plain", "captured 2 0"),
        ("joined", "captured 2 0"),
        ("unjoined", "refused"),
        ("read", "refused"),
        ("waited", "refused"),
        ("copied", "refused"),
        # CUDA runs it at once, and no replay does: only the stand-in tells
        ("elsewhere", "captured 0 1"),
    ],
)
def test_captures_have_cudas_rules(way: str, said: str, library: Path) -> None:
    assert rehearse(library, CAPTURE.replace("{way}", way)) == [said]


def test_every_op_can_be_captured_on_every_backend(library: Path) -> None:
    script = """
from xclip_fast.ops.cases import OPS, TINY, Load, find_op
from xclip_fast.ops.inputs import Draw
from xclip_fast.bench.providers import PROVIDERS
from xclip_fast.bench.record import Case
from xclip_fast.bench.setting import inputs_of, setting_of

def capture(run):
    with torch.inference_mode():
        run()
        with torch.cuda.graph(torch.cuda.CUDAGraph()):
            run()

for name, case in OPS.items():
    inputs = case.arguments(Draw(torch.bfloat16, "cuda"), Load(TINY, 1, 5))
    for backend in ("reference", "torch"):
        capture(lambda: find_op(name)(**inputs, backend=backend))
setting = setting_of(Case("model", "tiny", 4, 1, 5, "bfloat16", "forward", "uint8", "cuda"))
model = PROVIDERS["reference"].build(setting)
inputs = inputs_of(setting)
capture(lambda: model(*inputs))
print(standin.counts()["captures"], standin.counts()["refused"])
"""
    from xclip_fast.ops.cases import OPS

    assert rehearse(library, script) == [f"{2 * len(OPS) + 1} 0"]


def window(name: str, out: Path, checkout: Path, cache: Path) -> dict[str, Any]:
    """The record of a tiny window, rehearsed."""
    settings = os.environ | {"TRITON_CACHE_DIR": str(cache), "COMMIT": "abc1234", "PYTHONPATH": str(checkout)}
    settings.pop("TRITON_INTERPRET", None)
    command = [sys.executable, "-m", "benchmarks.gpu", "--window", name, "--dry-run", "--tiny", "--seconds", "400"]
    done = subprocess.run([*command, "--out", str(out)], cwd=checkout, env=settings, capture_output=True, text=True)
    assert done.returncode == 0, (done.stdout + done.stderr)[-4000:]
    found: dict[str, Any] = json.loads((out / f"{name}.json").read_text())
    assert len(done.stdout) < 11_000
    return found


def test_a_rehearsal_in_another_folder_finds_every_kernel(library: Path, tmp_path: Path) -> None:
    first = window("check", tmp_path / "out", ROOT, tmp_path / "here")
    statuses = {name: case["status"] for name, case in first["cases"].items()}
    assert set(statuses.values()) == {"ran"}, statuses
    counted = [case["counted"] for case in first["cases"].values()]
    assert sum(one["triton_launches"] for one in counted) > 100
    assert sum(one["captures"] for one in counted) > 15
    assert not any(one["refused"] or one["strays"] for one in counted)
    assert first["kit"]["compiled_here"] > 20
    # what the engine's graph has captured is what is counted on meta tensors
    case = Case("model", "tiny", TINY.frames, 1, 400, "bfloat16", "forward", "uint8", "cuda")
    extension = _extension.cuda_refusal() is None
    assert first["cases"]["engine tiny bfloat16 calls"]["nodes"] == launches_of(case, "engine") or not extension
    checkout = tmp_path / "checkout"
    kit._copy(checkout)
    for name in kit.EXTENSION:
        if (ROOT / name).exists():
            shutil.copy(ROOT / name, checkout / name)
    manifest = kit.pack([tmp_path / "out" / "check.json"], checkout / "build" / "gpu-kit.tar.xz", tmp_path / "here")
    assert any("op frame_attention" in " ".join(entry["for"]) for entry in manifest["entries"].values())
    second = window("check", tmp_path / "again", checkout, tmp_path / "there")
    kernels = [kernel for case in second["cases"].values() for kernel in case["kernels"]]
    assert kernels
    assert all(kernel["found"] for kernel in kernels)
    assert second["kit"]["unpacked"] == len(manifest["entries"])
    # no kernel is new; a stub may be, of a Triton that looks at where the driver is
    new = kit.entries(tmp_path / "there") - kit.entries(tmp_path / "here")
    assert not [path for key in new for path in (tmp_path / "there" / key).glob("*.cubin")]


def lane(library: Path, folder: Path, module: str, name: str, **options: Any) -> dict[str, Any]:
    """The cases of one tiny lane, rehearsed."""
    settings = os.environ | standin.environment(library, **options) | {"TRITON_CACHE_DIR": str(folder / "triton")}
    settings.pop("TRITON_INTERPRET", None)
    (folder / "facts.json").write_text(json.dumps({"facts": {"commit": "abc"}, "end": 2**40, "lanes": [name]}))
    command = [sys.executable, "-m", "benchmarks.gpu.lane", module, name, str(folder), "--tiny"]
    done = subprocess.run(command, cwd=ROOT, env=settings, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    content: dict[str, Any] = json.loads(record_of(folder, name).read_text())
    assert content["over"]
    cases: dict[str, Any] = content["cases"]
    return cases


def test_the_questions_of_figures_are_rehearsed(library: Path, tmp_path: Path) -> None:
    cases = lane(library, tmp_path, "benchmarks.gpu.figures", "kernels")
    assert len(cases) == 2 + len(questions.QUESTIONS)
    assert {case["status"] for case in cases.values()} == {"ran"}, cases


def test_a_case_that_the_memory_is_too_small_for_says_so(library: Path, tmp_path: Path) -> None:
    cases = lane(library, tmp_path, "benchmarks.gpu.check", "ops 1", memory=1 << 20)
    too_large = cases["op frame_attention tiny x1 bfloat16 and gradients"]
    assert too_large["status"] == "failed"
    assert too_large["reason"].startswith("OutOfMemoryError: CUDA out of memory. Tried to allocate")


def test_a_lane_that_begins_again_builds_what_it_measures(library: Path, tmp_path: Path) -> None:
    script = f"""
import json, pathlib
from benchmarks.gpu import contest
from benchmarks.gpu.lane import Desk
from benchmarks.gpu.lock import Turns
folder = pathlib.Path({str(tmp_path)!r})
desk = Desk(folder, folder / "a.json", "abc", ("a",), True, False, Turns(folder))
case = contest.case_of("tiny", 1)
# nothing was built in this process
found = contest.measure(desk, case, ("hf-sdpa", "layers"), ("graph",))
print(found["status"], [row["provider"] for row in found["rows"] if row["timing"]])
# a baseline that is broken makes nothing right
desk.kept(f"contest {{case}}").torch_error = float("inf")
found = contest.build(desk, case, ("layers",))
print([check["passed"] for check in found["checks"]][0])
# and what cannot be built is no success
contest.PROVIDERS["gone"] = None
print(contest.measure(desk, contest.case_of("tiny", 2), ("gone",), ("graph",))["status"])
"""
    assert rehearse(library, script) == ["ran ['hf-sdpa', 'layers']", "False", "failed"]
