"""float32 without TF32: the settings are put aside and back, and whatever is held to float32 runs without them."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from configs import SMALL
from torch import Tensor, nn

from xclip_fast.bench import machine
from xclip_fast.bench.models import Effort, measure_model
from xclip_fast.bench.operators import measure_op
from xclip_fast.bench.parity import compare
from xclip_fast.bench.providers import PROVIDERS, Provider
from xclip_fast.bench.run import make_case
from xclip_fast.engine import Engine
from xclip_fast.engine.cpu import CpuTower
from xclip_fast.model import create_model
from xclip_fast.numerics import exact_float32
from xclip_fast.ops.cases import OPS, find_op
from xclip_fast.ops.inputs import Draw

EFFORT = Effort(blocks=1, block=0.001, memory=False)
EXACT = ("ieee", "ieee")

# each state in a process of its own: what was set once is set for good
EVERY_STATE = """
import os, sys, warnings
import torch
from xclip_fast.numerics import exact_float32
warnings.simplefilter("error")
b = torch.backends
changes = {
    "nothing": lambda: None,
    "old matmul": lambda: setattr(b.cuda.matmul, "allow_tf32", True),
    "old cudnn": lambda: setattr(b.cudnn, "allow_tf32", False),
    "medium": lambda: torch.set_float32_matmul_precision("medium"),
    "new matmul": lambda: setattr(b.cuda.matmul, "fp32_precision", "tf32"),
    "new conv": lambda: setattr(b.cudnn.conv, "fp32_precision", "ieee"),
    "new of all": lambda: setattr(b, "fp32_precision", "tf32"),
}
questions = [
    lambda: b.fp32_precision, lambda: b.cuda.matmul.fp32_precision, lambda: b.cudnn.conv.fp32_precision,
    lambda: b.cudnn.rnn.fp32_precision, lambda: b.mkldnn.matmul.fp32_precision, lambda: b.cuda.matmul.allow_tf32,
    lambda: b.cudnn.allow_tf32, torch.get_float32_matmul_precision,
]
def ask(question):
    try:
        return question()
    except RuntimeError:
        return "refused"
for name, change in changes.items():
    child = os.fork()
    if child == 0:
        change()
        before = list(map(ask, questions))
        with exact_float32(), exact_float32():
            inside = [x.fp32_precision for x in (b.cuda.matmul, b.cudnn.conv, b.mkldnn.matmul)]
            # what the compiler asks for
            inside.append(b.cuda.matmul.allow_tf32)
        after = list(map(ask, questions))
        good = inside == ["ieee"] * 3 + [False] and before == after
        if name == "new of all":
            # what is inherited stays so
            b.fp32_precision = "ieee"
            good &= [x.fp32_precision for x in (b.cuda.matmul, b.cudnn.conv, b.mkldnn.matmul)] == ["ieee"] * 3
        if not good:
            print(name, inside, before, after, flush=True)
        os._exit(not good)
    if os.waitpid(child, 0)[1]:
        sys.exit(f"{name} failed")
"""


def settings() -> tuple[str, str]:
    backends: Any = torch.backends
    return backends.cuda.matmul.fp32_precision, backends.cudnn.conv.fp32_precision


@pytest.fixture(autouse=True)
def in_tf32() -> Iterator[None]:
    """A user who allows TF32 everywhere."""
    before = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
    torch.set_float32_matmul_precision("high")
    torch.backends.cudnn.allow_tf32 = True
    assert settings() == ("tf32", "tf32")
    yield
    assert settings() == ("tf32", "tf32")
    torch.set_float32_matmul_precision(before[0])
    torch.backends.cudnn.allow_tf32 = before[1]


@pytest.mark.slow
def test_every_state_of_the_settings_is_put_aside_and_back() -> None:
    done = subprocess.run([sys.executable, "-c", EVERY_STATE], capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_an_error_inside_leaves_the_settings() -> None:
    with pytest.raises(ValueError, match="inside"), exact_float32():
        raise ValueError("inside")


class _Asking(nn.Module):
    def __init__(self, inner: Any, seen: set[tuple[str, str]]) -> None:
        super().__init__()
        self.inner, self.seen = inner, seen

    def forward(self, video: Tensor, text: Tensor) -> Tensor:
        self.seen.add(settings())
        found: Tensor = self.inner(video, text)
        return found


@pytest.mark.parametrize("direction", ["forward", "train"])
@pytest.mark.slow
def test_a_model_is_judged_and_timed_in_float32(direction: str, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: set[tuple[str, str]] = set()
    # truth, baseline, and the one under test
    for name in ("reference", "hf-sdpa", "layers"):
        build = PROVIDERS[name].build
        asking = Provider(name, lambda setting, build=build: _Asking(build(setting), seen))  # type: ignore[misc]
        monkeypatch.setitem(PROVIDERS, name, asking)
    rows = list(measure_model(make_case("model", "tiny", direction=direction), ("layers",), EFFORT, {}))
    assert [row.status for row in rows] == ["timed"]
    assert seen == {EXACT}


def test_an_op_is_judged_and_timed_in_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: set[tuple[str, str]] = set()

    inner = find_op("clip_logits")

    def op(**arguments: Any) -> Any:
        seen.add(settings())
        return inner(**arguments)

    inputs = OPS["clip_logits"].example(Draw(torch.float32, "cpu", 0), "odd sizes")
    assert all(row.passed for row in compare(op, inputs, "torch", gradients=True))
    assert seen == {EXACT}
    seen.clear()
    monkeypatch.setattr("xclip_fast.bench.operators.find_op", lambda name: op)
    list(measure_op(make_case("clip_logits", "tiny", direction="train"), ("torch",), EFFORT, {}))
    assert seen == {EXACT}


@pytest.mark.slow
def test_the_ceiling_of_float32_is_one_of_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[str, str]] = []
    monkeypatch.setattr(machine, "_best", lambda run, device, seconds: seen.append(settings()) or 1.0)
    machine.ceilings("cpu", ("float32",))
    assert set(seen) == {EXACT}


def test_an_engine_is_held_to_float32_and_runs_as_its_user_says(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: set[tuple[torch.dtype, tuple[str, str]]] = set()

    def asking(name: str) -> Any:
        inner = getattr(CpuTower, name)

        def ask(self: CpuTower, *arguments: Any, **named: Any) -> Any:
            # on some processors bfloat16 is stored alone, and multiplied in float32
            seen.add((self.packing.stored or self.packing.dtype, settings()))
            return inner(self, *arguments, **named)

        return ask

    for name in ("__call__", "embed"):
        monkeypatch.setattr(CpuTower, name, asking(name))
    model = create_model(SMALL)
    engine = Engine(model, torch.bfloat16)
    # the budget check
    assert seen == {(torch.float32, EXACT)}
    seen.clear()
    assert engine.report().video_error is not None
    assert {said for dtype, said in seen if dtype is torch.float32} == {EXACT}
    assert {said for dtype, said in seen if dtype is torch.bfloat16} <= {("tf32", "tf32")}
