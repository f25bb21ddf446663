"""Linear layers in training: gradients as PyTorch's, and bias gradients whose sums are exact, whole and repeatable."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from harness import DEVICE, KERNEL_DTYPES, covering, kernel_dtypes, random
from torch import Tensor
from torch.nn import functional

from xclip_fast.kernels.column_sums import column_sums
from xclip_fast.numerics import allowance, parity_error
from xclip_fast.ops import backend
from xclip_fast.ops._linear import linear, linear_op


def gradients(call: Callable[..., Tensor], grad: Tensor, *tensors: Tensor) -> list[Tensor]:
    leaves = [tensor.detach().clone().requires_grad_() for tensor in tensors]
    out = call(*leaves)
    return [out, *torch.autograd.grad(out, leaves, grad)]


@pytest.mark.parametrize(
    ("rows", "width", "dtype"),
    covering([1, 63, 64, 65, 129, 500], [1, 8, 127, 128, 129, 200], KERNEL_DTYPES),
    ids=str,
)
def test_sums_against_float64(rows: int, width: int, dtype: torch.dtype) -> None:
    x = random(rows, width, dtype=dtype, mean=0.5)
    exact = x.double().sum(0)
    error = parity_error(column_sums(x), exact)
    assert error <= allowance(parity_error(x.sum(0), exact), dtype, rows)


def test_no_rows_sum_to_zero() -> None:
    x = random(0, 70, dtype=torch.float32)
    assert torch.equal(column_sums(x), torch.zeros(70, device=x.device))


def test_no_columns_have_no_sums() -> None:
    assert column_sums(random(5, 0, dtype=torch.float32)).shape == (0,)


def test_a_bias_gradient_has_a_gradient() -> None:
    x, weight, bias = (random(*shape, dtype=torch.float32).requires_grad_() for shape in ((5, 8), (6, 8), (6,)))
    with backend("triton"):
        out = linear(x, weight, bias)
        (grad,) = torch.autograd.grad(out.square().sum(), bias, create_graph=True)
        grad.sum().backward()
    torch.testing.assert_close(x.grad, 2 * weight.sum(0).expand(5, 8), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("layout", ["expanded", "transposed", "every second row", "part of the columns"])
def test_sums_of_rows_as_they_lie(layout: str) -> None:
    x = random(140, 60, dtype=torch.float32)
    x = {
        "expanded": x[:1].expand(140, 60),
        "transposed": x.t().contiguous().t(),
        "every second row": x[::2],
        "part of the columns": x[:, 3:40],
    }[layout]
    torch.testing.assert_close(column_sums(x), x.sum(0), rtol=1e-6, atol=1e-5)


def test_what_is_bad_stays_in_its_column() -> None:
    x = random(200, 40, dtype=torch.float32)
    x[77, 3], x[0, 5], x[199, 39] = float("nan"), float("inf"), -float("inf")
    found = column_sums(x)
    assert found.isnan().nonzero().flatten().tolist() == [3]
    assert found.isinf().nonzero().flatten().tolist() == [5, 39]


def test_the_same_bits_again() -> None:
    x = random(700, 90, dtype=torch.float32)
    assert torch.equal(column_sums(x), column_sums(x))


@kernel_dtypes
@pytest.mark.parametrize("shape", [(70, 24), (2, 3, 5, 24), (24,)])
def test_gradients_are_those_of_pytorch(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    tensors = [random(*sizes, dtype=dtype) for sizes in ((*shape[:-1], 40), shape, (40, 24), (40,))]
    with backend("triton"):
        found = gradients(linear, *tensors)
    plain = gradients(functional.linear, *tensors)
    exact = gradients(functional.linear, *(tensor.double() for tensor in tensors))
    for one, other, truth in zip(found, plain, exact, strict=True):
        assert parity_error(one, truth) <= allowance(parity_error(other, truth), dtype, 70)


def test_only_gradients_that_are_asked_for() -> None:
    x, weight, bias = (random(*shape, dtype=torch.float32) for shape in ((5, 8), (6, 8), (6,)))
    out = linear_op(x, weight, bias.requires_grad_())
    out.sum().backward()
    assert torch.equal(bias.grad, torch.full((6,), 5.0, device=x.device))  # type: ignore[arg-type]
    assert x.grad is None
    assert weight.grad is None


def test_autocast_gives_its_dtype() -> None:
    x, weight, bias = (random(*shape, dtype=torch.float32).requires_grad_() for shape in ((5, 8), (6, 8), (6,)))
    with backend("triton"), torch.autocast(DEVICE, torch.float16 if DEVICE == "cpu" else torch.bfloat16):
        out = linear(x, weight, bias)
        assert out.dtype == functional.linear(x, weight, bias).dtype
    out.float().sum().backward()
    assert bias.grad is not None
    assert bias.grad.dtype == torch.float32


def test_without_kernels_it_is_pytorchs(monkeypatch: pytest.MonkeyPatch) -> None:
    called = []
    monkeypatch.setattr("xclip_fast.ops._linear.linear_op", lambda *tensors: called.append(tensors))
    x, weight, bias = (random(*shape, dtype=torch.float32) for shape in ((5, 8), (6, 8), (6,)))
    with backend("torch"):
        linear(x, weight, bias.requires_grad_())
    with backend("triton"), torch.no_grad():
        linear(x, weight, bias)
    with backend("triton"):
        linear(x, weight, bias.detach())
    assert not called
