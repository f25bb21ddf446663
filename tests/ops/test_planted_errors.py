"""An error of four roundings is beyond the allowance, on every op and in every dtype, of eight in one float32 element.

In float32 one element says less: plain torch's own largest error is five roundings in the smallest attentions.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from harness import kernel_dtypes
from numerics import TOLERANCES, longest_sum, parity_error
from torch import Tensor

from xclip_fast.bench.parity import doubled, floating, run_op
from xclip_fast.numerics import allowance, sum_error
from xclip_fast.ops.cases import OPS, find_op
from xclip_fast.ops.inputs import Draw


def everywhere(exact: Tensor, dtype: torch.dtype, size: float) -> Tensor:
    return exact * (1 + size)


def in_one_element(exact: Tensor, dtype: torch.dtype, size: float) -> Tensor:
    size = 2 * size if dtype == torch.float32 else size
    found = exact.flatten().clone()
    found[exact.abs().argmax()] *= 1 + size
    return found.view(exact.shape)


@kernel_dtypes
@pytest.mark.parametrize("plant", [everywhere, in_one_element])
@pytest.mark.parametrize("op", OPS)
def test_four_roundings_are_seen(
    op: str, plant: Callable[[Tensor, torch.dtype, float], Tensor], dtype: torch.dtype
) -> None:
    rounding = TOLERANCES[dtype].rounding
    for name in OPS[op].small:
        inputs = OPS[op].example(Draw(dtype, "cpu", 0), name)
        wanted, function = floating(inputs), find_op(op)
        truth = run_op(function, doubled(inputs), wanted, "reference", OPS[op].trained)
        plain = run_op(function, inputs, wanted, "reference", OPS[op].trained)
        terms, ceiling = longest_sum(inputs), OPS[op].ceiling(dtype)
        for what, exact in truth.items():
            if not exact.any() or not exact.dtype.is_floating_point:
                continue
            torch_error = parity_error(plain[what], exact)
            # where torch itself errs more than a rounding, four times as much as it does
            planted = plant(exact, plain[what].dtype, 4 * max(rounding, torch_error)).to(plain[what].dtype)
            assert parity_error(planted, exact) > allowance(torch_error, dtype, terms, ceiling), (name, what)


@pytest.mark.parametrize("terms", [1, 7, 64, 768, 10**6])
@pytest.mark.parametrize("dtype", list(TOLERANCES), ids=str)
def test_an_allowance_is_below_four_roundings(dtype: torch.dtype, terms: int) -> None:
    # with what an honest sum of this length errs on top of the planted error, or against it
    rounding = TOLERANCES[dtype].rounding
    for torch_error in (0.0, rounding / 2):
        assert allowance(torch_error, dtype, terms) < 4 * rounding
    assert sum_error(dtype, terms) <= 1.3 * rounding


@pytest.mark.parametrize("terms", [4, 16, 64])
def test_sums_err_as_derived(terms: int) -> None:
    # one sum in float32, term by term: half of what a chain of four is said to err
    x = torch.randn(4000, terms)
    total = torch.zeros(4000)
    for column in x.unbind(1):
        total = total + column
    error = (total.double() - x.double().sum(1)).square().mean().sqrt() / x.double().sum(1).square().mean().sqrt()
    assert 0.25 < error / sum_error(torch.float32, terms) < 0.75
