"""Every op captured into a CUDA graph and replayed with other numbers: the bits of a plain call."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from gpu_cases import copies, equal, forward_and_backward, inputs_of, needs_gpu
from numerics import relative_error
from torch import Tensor

from xclip_fast.bench.providers import PROVIDERS
from xclip_fast.bench.record import Case
from xclip_fast.bench.setting import inputs_of as model_inputs
from xclip_fast.bench.setting import prepared, setting_of, step
from xclip_fast.bench.timing import capture
from xclip_fast.ops.cases import TRAINED, find_op
from xclip_fast.ops.inputs import Inputs

CASES = [("B/16", 2), ("B/32", 1), ("L/14", 1)]


def check(run: Callable[[], list[Tensor]], inputs: Inputs, warm_ups: int) -> None:
    graph, results = capture(run, warm_ups)
    for factor in (1.0, 0.5, -2.0):
        for x in inputs.values():
            if isinstance(x, Tensor) and x.is_floating_point():
                x.detach().mul_(factor)
        wanted = copies(run())
        for result in results:
            result.fill_(float("nan"))
        graph.replay()
        torch.cuda.synchronize()
        assert equal(results, wanted), f"times {factor}"


@needs_gpu
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize(("variant", "batch"), CASES)
@pytest.mark.parametrize("op", TRAINED)
def test_forward(op: str, variant: str, batch: int, dtype: str) -> None:
    inputs = inputs_of(op, variant, dtype, batch=batch)

    def run() -> list[Tensor]:
        # tensors of inference mode could not be poisoned between replays
        with torch.no_grad():
            result = find_op(op)(**inputs, backend="triton")
        return [result] if isinstance(result, Tensor) else list(result)

    # one call compiles, and nothing else has to happen before a capture
    check(run, inputs, warm_ups=1)


@needs_gpu
@pytest.mark.parametrize(("variant", "batch"), CASES)
@pytest.mark.parametrize("op", TRAINED)
def test_forward_and_backward(op: str, variant: str, batch: int) -> None:
    inputs = inputs_of(op, variant, "bfloat16", batch=batch)
    check(forward_and_backward(op, inputs), inputs, warm_ups=3)


@needs_gpu
@pytest.mark.parametrize("provider", ["hf-sdpa", "layers"])
def test_training_step_as_it_is_timed(provider: str) -> None:
    case = Case("model", "B/32", 8, 2, 400, "bfloat16", "train", "normalised", "cuda")
    setting = setting_of(case)
    module = prepared(PROVIDERS[provider].build(setting), case)
    assert isinstance(module, torch.nn.Module)
    run = step(module, model_inputs(setting), True)
    replay = capture(run)[0].replay
    # those that the graph writes
    grads = [x.grad for x in module.parameters() if x.grad is not None]
    for factor in (1.0, 0.5):
        with torch.no_grad():
            for x in module.parameters():
                x.mul_(factor)
        for grad in grads:
            grad.fill_(float("nan"))
        replay()
        torch.cuda.synchronize()
        found = copies(grads)
        run()
        wanted = [x.grad for x in module.parameters() if x.grad is not None]
        assert all(relative_error(one, other) < 2e-2 for one, other in zip(found, wanted, strict=True))
