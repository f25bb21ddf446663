"""What is on the clock: the call that a user makes, a whole training step in a graph, and no trace of the gate."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from xclip_fast.bench import models
from xclip_fast.bench.models import Effort, measure_model, methods_of
from xclip_fast.bench.providers import PROVIDERS, _Engine
from xclip_fast.bench.record import Case
from xclip_fast.bench.run import make_case
from xclip_fast.bench.setting import inputs_of, prepared, setting_of, step
from xclip_fast.engine import Engine
from xclip_fast.ops._backends import asked_backend

EFFORT = Effort(blocks=1, block=0.001, memory=False)
CASE = make_case("model", "tiny", batch=2)
ON_GPU = replace(CASE, device="cuda")


def test_a_class_set_of_the_engine_is_prepared_once_and_outside_of_the_time(monkeypatch: pytest.MonkeyPatch) -> None:
    prepared_texts: list[Tensor] = []
    calls: list[Any] = []
    engine = SimpleNamespace(texts_of=lambda text: prepared_texts.append(text) or ("texts", len(prepared_texts)))

    class Called:
        texts_of = staticmethod(engine.texts_of)

        def __call__(self, video: Tensor, texts: Any) -> Tensor:
            calls.append(texts)
            return video

    classify = _Engine(Called())
    video, first, second = torch.ones(1), torch.zeros(2), torch.zeros(2)
    for text in (first, first, second, second):
        classify(video, text)
    assert [text is wanted for text, wanted in zip(prepared_texts, (first, second), strict=True)] == [True, True]
    assert calls == [("texts", 1)] * 2 + [("texts", 2)] * 2
    # of a whole measurement too: the gate comes before the clock
    inner = Engine.texts_of
    monkeypatch.setattr(Engine, "texts_of", lambda self, text: prepared_texts.append(text) or inner(self, text))
    prepared_texts.clear()
    (row,) = measure_model(CASE, ("engine",), EFFORT, {})
    assert row.status == "timed", row.reason
    assert len(prepared_texts) == 1


@pytest.mark.parametrize(("own_graph", "poisoned"), [(False, True), (True, False)])
def test_what_captures_itself_at_the_gate_captures_no_poison(
    own_graph: bool, poisoned: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    filled: list[bool] = []

    def classify(video: Tensor, text: Tensor) -> Tensor:
        filled.append(torch.are_deterministic_algorithms_enabled())
        return torch.ones(2, 5)

    setting = setting_of(ON_GPU)
    monkeypatch.setitem(PROVIDERS, "own", replace(PROVIDERS["reference"], own_graph=own_graph))
    models.check_of("own", classify, setting, (torch.zeros(1), torch.zeros(1)), {"logits": torch.ones(2, 5)}, 0.0)
    assert filled == [poisoned, False]
    # without a GPU nothing is captured
    filled.clear()
    setting = setting_of(CASE)
    models.check_of("own", classify, setting, (torch.zeros(1), torch.zeros(1)), {"logits": torch.ones(2, 5)}, 0.0)
    assert filled == [True, False]


@pytest.mark.parametrize("wrong", ["triton", None, "neither"])
def test_fused_layers_pass_the_gate_asked_for_kernels_and_as_a_user_sees_them(wrong: str | None) -> None:
    def classify(video: Tensor, text: Tensor) -> Tensor:
        return torch.full((2, 5), float("nan") if asked_backend() == wrong else 1.0)

    frames = torch.zeros(1), torch.zeros(1)
    check = models.check_of("layers", classify, setting_of(ON_GPU), frames, {"logits": torch.ones(2, 5)}, 0.0)
    assert check.passed is (wrong == "neither")


@pytest.mark.parametrize("direction", ["forward", "train"])
def test_on_a_gpu_a_step_is_timed_by_replays_and_as_a_user_sees_it(
    direction: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    case = replace(ON_GPU, direction=direction)
    assert methods_of(case) == ("graph", "wall")
    assert methods_of(replace(case, device="cpu")) == ("wall",)
    asked: list[bool] = []

    def sampler(run: Callable[[], object], device: str, block: float, *, graph: bool, cold: bool) -> Any:
        asked.append(graph)
        run()
        return lambda: 1.0

    monkeypatch.setattr(models, "sampler", sampler)
    setting = setting_of(replace(CASE, direction=direction))
    for provider in ("hf-sdpa", "layers"):
        module: Any = prepared(PROVIDERS[provider].build(setting), setting.case)
        assert models.timed(provider, module, inputs_of(setting), case, "graph", EFFORT)[1] == "graph"
    assert asked == [True, True]


def test_a_training_step_begins_without_gradients() -> None:
    case: Case = replace(CASE, direction="train")
    setting = setting_of(case)
    module: Any = prepared(PROVIDERS["layers"].build(setting), case)
    run = step(module, inputs_of(setting), True)
    run()
    before = {name: (x.grad, x.grad.clone()) for name, x in module.named_parameters() if x.grad is not None}
    assert before
    run()
    for name, x in module.named_parameters():
        if name in before:
            # written anew, never added to what was there
            assert x.grad is not before[name][0]
            assert torch.equal(x.grad, before[name][1])
