"""Linear with QuickGELU, and the whole perceptron: parity, layouts, bad numbers, memory, registration."""

from __future__ import annotations

import importlib
from typing import Any

import pytest
import torch
from harness import KERNEL_DTYPES, ON_GPU, check_op, covering, each_tile, kernel_dtypes, layouts, random, saved_tensors

from xclip_fast.ops import explain, feed_forward, linear_quick_gelu

SIZES = [
    (1, 1, 1),
    (1, 16, 16),
    (2, 3, 5),
    (3, 64, 1),
    (5, 17, 33),
    (7, 31, 129),
    (16, 64, 64),
    (33, 48, 100),
    (63, 65, 63),
    (64, 64, 128),
    (65, 127, 127),
    (66, 128, 129),
    (100, 96, 40),
    (127, 20, 66),
    (129, 768, 32),
    (50, 100, 256),
]


copies_of_hopper = pytest.mark.skipif(
    ON_GPU and torch.cuda.get_device_capability()[0] != 9, reason="only Hopper has the kernel's copies"
)


def arguments(rows: int, width: int, hidden: int, dtype: torch.dtype, *, mean: float = 0.0) -> dict[str, object]:
    return {
        "x": random(rows, width, dtype=dtype, mean=mean),
        "weight": random(hidden, width, dtype=dtype, scale=width**-0.5),
        "bias": random(hidden, dtype=dtype),
    }


def perceptron(rows: int, width: int, hidden: int, dtype: torch.dtype) -> dict[str, object]:
    found = arguments(rows, width, hidden, dtype)
    return {
        "x": found["x"],
        "fc_weight": found["weight"],
        "fc_bias": found["bias"],
        "proj_weight": random(width, hidden, dtype=dtype, scale=hidden**-0.5),
        "proj_bias": random(width, dtype=dtype),
    }


@pytest.mark.parametrize(("size", "dtype"), each_tile(SIZES), ids=str)
def test_parity(size: tuple[int, int, int], dtype: torch.dtype) -> None:
    check_op(linear_quick_gelu, arguments(*size, dtype), what="linear_quick_gelu", ceiling=1e-2)


@copies_of_hopper
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("size", [(1, 16, 16), (37, 72, 264), (129, 64, 256), (300, 48, 520), (260, 8, 1032)], ids=str)
def test_persistent_parity(size: tuple[int, int, int], dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    kernels = importlib.import_module("xclip_fast.kernels.linear_quick_gelu")
    # three programs: some take several tiles, and one fewer than the others
    monkeypatch.setattr(kernels, "_persistent", lambda *tensors: 3)
    # with gradients it keeps the pre-activation too
    check_op(linear_quick_gelu, arguments(*size, dtype), what="linear_quick_gelu", ceiling=1e-2)


@pytest.mark.parametrize(("size", "dtype"), each_tile(SIZES[1::2]), ids=str)
def test_perceptron_parity(size: tuple[int, int, int], dtype: torch.dtype) -> None:
    check_op(feed_forward, perceptron(*size, dtype), what="feed_forward", ceiling=1e-2)


@kernel_dtypes
@pytest.mark.parametrize("mean", [3.0, 30.0])
def test_mean_far_from_zero(mean: float, dtype: torch.dtype) -> None:
    check_op(linear_quick_gelu, arguments(9, 64, 70, dtype, mean=mean), what="linear_quick_gelu far mean", ceiling=1e-2)


@pytest.mark.parametrize(
    ("layout", "name", "dtype"),
    covering(["offset", "padded", "strided", "transposed"], ["x", "weight", "bias"], KERNEL_DTYPES),
    ids=str,
)
def test_layouts(name: str, layout: str, dtype: torch.dtype) -> None:
    inputs = arguments(10, 24, 40, dtype)
    inputs["x"] = inputs["x"].view(5, 2, 24)
    inputs[name] = layouts(inputs[name])[layout]
    check_op(linear_quick_gelu, inputs, what="linear_quick_gelu layouts", ceiling=1e-2)


@pytest.mark.parametrize("shape", [(0, 8), (2, 0, 8)])
@pytest.mark.parametrize("backend", ["reference", "torch", "triton"])
def test_empty(shape: tuple[int, ...], backend: str) -> None:
    inputs = perceptron(1, 8, 12, torch.float32)
    inputs["x"] = torch.empty(shape, device=inputs["x"].device)
    inputs = {name: x.requires_grad_() for name, x in inputs.items()}
    out = feed_forward(**inputs, backend=backend)
    assert out.shape == shape
    with torch.inference_mode():
        assert feed_forward(**inputs, backend=backend).shape == shape
    assert all(not grad.any() for grad in torch.autograd.grad(out.sum(), list(inputs.values())))


@pytest.mark.parametrize("value", [1e4, -1e4, float("nan"), float("inf"), float("-inf")])
def test_extreme_activations_as_torch(value: float) -> None:
    x = torch.tensor([[1.0], [value]], device=random(1, dtype=torch.float32).device, requires_grad=True)
    weight = torch.ones(20, 1, device=x.device)
    found = linear_quick_gelu(x, weight, weight[:, 0] * 0, backend="triton")
    expected = linear_quick_gelu(x, weight, weight[:, 0] * 0, backend="reference")
    assert torch.allclose(found, expected, equal_nan=True)
    grads = [torch.autograd.grad(y.sum(), x)[0] for y in (found, expected)]
    assert torch.allclose(*grads, equal_nan=True)


@copies_of_hopper
@pytest.mark.parametrize("persists", [True, False])
def test_what_is_bad_stays_where_it_is(persists: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    kernels = importlib.import_module("xclip_fast.kernels.linear_quick_gelu")
    monkeypatch.setattr(kernels, "_persistent", lambda *tensors: int(persists))
    nan, inf = float("nan"), float("inf")
    # the persistent kernel divides once for two columns: each value beside many others
    values = [0.5, inf, -20.0, 1e4, nan, -inf, 1.0, -1e30, 30.0, 1e30, -3.0, -1e4, -36.0]
    bias = torch.tensor(values).repeat(24)[:304].to(random(1, dtype=torch.bfloat16))
    x, weight = bias.new_zeros(3, 8), bias.new_zeros(304, 8)
    found = linear_quick_gelu(x, weight, bias, backend="triton")
    expected = linear_quick_gelu(x.float(), weight.float(), bias.float(), backend="reference")
    assert torch.allclose(found.float(), expected, rtol=2**-8, atol=1e-9, equal_nan=True)


@pytest.mark.parametrize("op", [linear_quick_gelu, feed_forward])
def test_frozen_tensors_have_no_gradient_and_the_others_the_same(op: Any) -> None:
    drawn = (arguments if op is linear_quick_gelu else perceptron)(5, 24, 40, torch.float32)

    def gradients(trained: str) -> dict[str, torch.Tensor | None]:
        inputs = {name: x.detach().clone().requires_grad_(trained in (name, "all")) for name, x in drawn.items()}
        out = op(**inputs, backend="triton")
        (out * torch.linspace(-1, 1, out.shape[-1], device=out.device)).sum().backward()
        return {name: x.grad for name, x in inputs.items()}

    whole = gradients("all")
    for name, grad in whole.items():
        found = gradients(name)
        assert torch.equal(found.pop(name), grad)  # type: ignore[arg-type]
        assert not any(other is not None for other in found.values())


@copies_of_hopper
@pytest.mark.parametrize("programs", [0, 3])
def test_results_may_be_changed_in_place(programs: int, monkeypatch: pytest.MonkeyPatch) -> None:
    kernels = importlib.import_module("xclip_fast.kernels.linear_quick_gelu")
    monkeypatch.setattr(kernels, "_persistent", lambda *tensors: programs)
    x = random(2, 3, 16, dtype=torch.float16).requires_grad_()
    weight, bias = random(24, 16, dtype=torch.float16), random(24, dtype=torch.float16)
    linear_quick_gelu(x, weight, bias, backend="triton").mul_(2).sum().backward()
    assert x.grad is not None


def test_backward_keeps_input_and_one_hidden_tensor() -> None:
    inputs = {name: x.requires_grad_() for name, x in perceptron(40, 32, 128, torch.float32).items()}
    weights = {x.data_ptr() for name, x in inputs.items() if name != "x"}
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x) or x, lambda x: x):
        feed_forward(**inputs, backend="triton")
    activations = sum(x.numel() for x in kept if x.data_ptr() not in weights)
    assert activations == 40 * (32 + 128)


def test_repeats_are_bit_equal() -> None:
    inputs = {name: x.requires_grad_() for name, x in perceptron(70, 48, 96, torch.float32).items()}
    runs = [torch.autograd.grad(feed_forward(**inputs, backend="triton").sum(), list(inputs.values())) for _ in "abc"]
    assert all(torch.equal(a, b) for other in runs[1:] for a, b in zip(runs[0], other, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("gradients", [True, False])
def test_torch_formulation(dtype: torch.dtype, gradients: bool) -> None:
    check_op(
        feed_forward, perceptron(9, 40, 70, dtype), what="feed_forward torch", backend="torch", gradients=gradients
    )


@pytest.mark.parametrize("save_pre", [True, False])
def test_registered_ops(save_pre: bool) -> None:
    inputs = [x.requires_grad_() for x in perceptron(6, 20, 24, torch.float32).values()]
    torch.library.opcheck(torch.ops.xclip_fast.linear_quick_gelu, (*inputs[:3], save_pre))
    torch.library.opcheck(torch.ops.xclip_fast.feed_forward, (*inputs, save_pre))


def test_registered_ops_without_kernels_have_exact_gradients(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    inputs = [x.cpu().requires_grad_() for x in perceptron(3, 5, 7, torch.float64).values()]
    assert torch.autograd.gradcheck(lambda *args: torch.ops.xclip_fast.feed_forward(*args, True)[0], inputs)
    assert torch.autograd.gradcheck(
        lambda *args: torch.ops.xclip_fast.linear_quick_gelu(*args, True)[0], tuple(inputs[:3])
    )


def test_on_plain_torch_it_has_second_and_forward_derivatives():
    inputs = tuple(x.requires_grad_() for x in perceptron(2, 3, 4, torch.float64).values())

    def plain(*tensors):
        return feed_forward(*tensors, backend="torch")

    assert torch.autograd.gradcheck(plain, inputs, check_forward_ad=True)
    assert torch.autograd.gradgradcheck(plain, inputs)


def test_gradients_of_the_torch_formulation_are_the_same_where_they_have_gradients() -> None:
    inputs = [x.requires_grad_() for x in perceptron(4, 6, 8, torch.float64).values()]
    out = feed_forward(*inputs, backend="torch")
    weights = torch.linspace(-1, 1, out.numel(), dtype=out.dtype, device=out.device).view(out.shape)
    plain, recorded = (torch.autograd.grad(out, inputs, weights, True, graph) for graph in (False, True))
    for one, other in zip(recorded, plain, strict=True):
        assert other.grad_fn is None
        torch.testing.assert_close(one, other)


def test_on_plain_torch_it_keeps_its_rows_and_one_hidden_tensor() -> None:
    given = [x.cpu().requires_grad_() for x in perceptron(5, 16, 32, torch.float32).values()]
    with saved_tensors() as (kept, _):
        out = feed_forward(*given, backend="torch")
    assert [tensor.shape for tensor in kept if tensor.shape[0] == 5] == [(5, 16), (5, 32)]
    expected = out.detach().clone() * 2
    # as of any result of PyTorch's
    assert torch.equal(out.mul_(2), expected)
    out.sum().backward()
    assert all(tensor.grad is not None for tensor in given)


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_compiles_whole(backend: str) -> None:
    compiled = torch.compile(lambda *args: feed_forward(*args, backend=backend), fullgraph=True, backend="aot_eager")
    inputs = [x.requires_grad_() for x in perceptron(4, 16, 32, torch.float32).values()]
    assert torch.allclose(compiled(*inputs), feed_forward(*inputs, backend=backend), atol=1e-6)
    with torch.inference_mode():
        assert torch.allclose(compiled(*inputs), feed_forward(*inputs, backend=backend), atol=1e-6)


def test_autocast_as_linear() -> None:
    x, weight, bias = (x.cpu() for x in arguments(4, 16, 24, torch.float32).values())
    with torch.autocast("cpu", torch.bfloat16):
        found = linear_quick_gelu(x, weight, bias, backend="torch")
        assert found.dtype == torch.nn.functional.linear(x, weight, bias).dtype == torch.bfloat16


def test_wrong_arguments_are_named() -> None:
    x, weight, bias = arguments(2, 8, 6, torch.float32).values()
    with pytest.raises(
        ValueError, match=r"weight must be torch.float32 \(N, 8\) to fit x, found torch.float32 \(6, 7\)"
    ):
        linear_quick_gelu(x, weight[:, :7], bias)
    with pytest.raises(ValueError, match=r"bias must have shape \(6,\) to fit weight, found \(5,\)"):
        linear_quick_gelu(x, weight, bias[:5])
    with pytest.raises(ValueError, match=r"weight must be torch.float32 \(N, 6\)"):
        feed_forward(x, weight, bias, weight, bias)
    assert "float64" in explain("linear_quick_gelu", x.double(), weight.double(), bias.double())["triton"]
