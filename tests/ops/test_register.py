"""The one boundary of a call: what eager calls go through, and who still meets the registered op."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from harness import DEVICE
from torch import Tensor
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode

from xclip_fast.ops import layer_norm
from xclip_fast.ops.cases import OPS, TRAINED, Draw, find_op

# the interpreter has no kernel for it
NAMES = [name for name in OPS if name != "quantize_rows"]


def example(name: str) -> dict[str, Any]:
    """The arguments of the first small case of an op: another shape would say the same."""
    case = OPS[name]
    return case.example(Draw(torch.float32, DEVICE), next(iter(case.small)))


def leaves_of(inputs: dict[str, Any]) -> dict[str, Any]:
    """The inputs, those in floating point as leaves that want a gradient."""
    return {
        name: value.detach().requires_grad_() if isinstance(value, Tensor) and value.is_floating_point() else value
        for name, value in inputs.items()
    }


def first(result: Any) -> Tensor:
    found: Tensor = result if isinstance(result, Tensor) else result[0]
    return found


@pytest.fixture
def registered_calls(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of our registered ops, in the order they are called through the dispatcher."""
    calls: list[str] = []
    original: Callable[..., Any] = torch._ops.OpOverload.__call__

    def spy(self: Any, /, *args: Any, **kwargs: Any) -> Any:
        if self.namespace == "xclip_fast":
            calls.append(self._opname)
        return original(self, *args, **kwargs)

    monkeypatch.setattr(torch._ops.OpOverload, "__call__", spy)
    return calls


@pytest.mark.parametrize("name", NAMES)
def test_an_eager_call_meets_no_dispatcher_and_one_autograd_node(name: str, registered_calls: list[str]) -> None:
    inputs = example(name)
    find_op(name)(**inputs, backend="triton")
    assert registered_calls == []
    if name not in TRAINED:
        return
    out = first(find_op(name)(**leaves_of(inputs), backend="triton"))
    node: Any = out.grad_fn
    assert node is not None
    assert "AccumulateGrad" in {type(before).__name__ for before, _ in node.next_functions if before is not None}
    inner = [type(before).__name__ for before, _ in node.next_functions if before is not None]
    # views and casts of the arguments may stand between, other ops of ours may not
    assert not [one for one in inner if one.removesuffix("Backward") in OPS]
    out.sum().backward()
    assert registered_calls == []


@pytest.mark.parametrize("name", sorted(TRAINED))
def test_a_watched_call_is_one_registered_op_with_none_inside(name: str, registered_calls: list[str]) -> None:
    inputs = leaves_of(example(name))
    with FlopCounterMode(display=False):
        out = first(find_op(name)(**inputs, backend="triton"))
        forward = list(registered_calls)
        out.sum().backward()
    # the counter calls what it has seen: each stands there twice
    assert forward == [name] * 2
    assert registered_calls.count(name) == 2


def norm_inputs(**options: Any) -> tuple[Tensor, Tensor, Tensor]:
    return tuple(torch.rand(*shape, device=DEVICE, **options) for shape in ((3, 8), (8,), (8,)))  # type: ignore[return-value]


def test_gradients_are_those_of_the_registered_op() -> None:
    inputs = [x.requires_grad_() for x in norm_inputs()]
    direct = torch.autograd.grad(layer_norm(*inputs, backend="triton")[0].square().sum(), inputs)
    with FlopCounterMode(display=False):
        watched = torch.autograd.grad(layer_norm(*inputs, backend="triton")[0].square().sum(), inputs)
    for ours, theirs in zip(direct, watched, strict=True):
        assert torch.equal(ours, theirs)


def test_a_second_derivative_is_refused() -> None:
    inputs = [x.requires_grad_() for x in norm_inputs()]
    out = layer_norm(*inputs, backend="triton")[0].square().sum()
    grads = torch.autograd.grad(out, inputs, create_graph=True)
    with pytest.raises(RuntimeError, match="layer_norm_backward"):
        grads[0].sum().backward()


def test_a_tensor_of_another_class_meets_the_registered_op(registered_calls: list[str]) -> None:
    class Other(Tensor):
        pass

    x, weight, bias = norm_inputs()
    layer_norm(x.as_subclass(Other), weight, bias, backend="triton")
    assert set(registered_calls) == {"layer_norm"}


def test_a_profiler_sees_the_op() -> None:
    with profile(activities=[ProfilerActivity.CPU]) as seen:
        layer_norm(*norm_inputs(), backend="triton")
    assert "xclip_fast::layer_norm" in {event.key for event in seen.key_averages()}


def test_no_gradient_is_kept_where_none_is_wanted() -> None:
    inputs = norm_inputs()
    assert layer_norm(*inputs, backend="triton")[0].grad_fn is None
    leaves = [x.requires_grad_() for x in inputs]
    with torch.no_grad():
        assert layer_norm(*leaves, backend="triton")[0].grad_fn is None
