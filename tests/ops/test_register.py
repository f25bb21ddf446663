"""The one boundary of a call: what eager calls go through, and who still meets the registered op."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from harness import DEVICE, saved_tensors
from torch import Tensor
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode

from xclip_fast.ops import explain, layer_norm
from xclip_fast.ops.cases import OPS, TRAINED, Draw, find_op
from xclip_fast.ops.layer_norm import layer_norm_op

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


@pytest.mark.parametrize("name", sorted(TRAINED))
def test_what_is_saved_is_read_once(name: str) -> None:
    """Checkpoints compute it again at a reading, and refuse a second; offloaded tensors are copied at each."""
    inputs = leaves_of(example(name))
    with saved_tensors() as (_, read):
        result = first(find_op(name)(**inputs, backend="triton"))
    result.sum().backward()
    assert read
    assert len(read) == len(set(read))


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


def test_a_whole_number_is_another_eps_to_no_kernel() -> None:
    inputs = norm_inputs()
    assert torch.equal(
        layer_norm(*inputs, eps=1, backend="triton")[0], layer_norm(*inputs, eps=1.0, backend="triton")[0]
    )
    layer_norm_op(*inputs, None, None, 0)
    layer_norm_op(*inputs, None, None, 0.0)


def test_a_tracer_sees_the_op() -> None:
    inputs = norm_inputs()

    def norm(x: Tensor) -> Tensor:
        return layer_norm(x, *inputs[1:], backend="triton")[0]

    assert "xclip_fast::layer_norm" in str(torch.jit.trace(norm, inputs[:1]).graph)


def test_a_negated_view_is_not_read_without_its_sign() -> None:
    x, weight, bias = norm_inputs()
    negated = torch._neg_view(x)
    assert explain("layer_norm", negated, weight, bias)["triton"] is not None
    expected = layer_norm(-x, weight, bias, backend="triton")[0]
    torch.testing.assert_close(layer_norm(negated, weight, bias)[0], expected)
    # a gradient can be one
    leaves = [leaf.requires_grad_() for leaf in (x, weight, bias)]
    out = layer_norm(*leaves, backend="triton")[0]
    plain = torch.autograd.grad(out, leaves, -torch.ones_like(out), retain_graph=True)
    for ours, theirs in zip(
        torch.autograd.grad(out, leaves, torch._neg_view(torch.ones_like(out))), plain, strict=True
    ):
        torch.testing.assert_close(ours, theirs)


def test_what_hooks_give_back_in_other_strides_is_read_right() -> None:
    def transposed(x: Tensor) -> Tensor:
        return x.transpose(-1, -2).contiguous().transpose(-1, -2) if x.ndim > 1 else x

    for name in ("prompt_attention", "feed_forward"):
        inputs = leaves_of(example(name))
        leaves = [x for x in inputs.values() if isinstance(x, Tensor) and x.requires_grad]
        found = []
        for pack in (lambda x: x, transposed):
            with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
                out = first(find_op(name)(**inputs, backend="triton"))
            found.append(torch.autograd.grad(out.sum(), leaves))
        for ours, theirs in zip(*found, strict=True):
            torch.testing.assert_close(ours, theirs)
