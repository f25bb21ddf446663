"""The measure of errors and the rules on it must themselves be able to fail."""

from __future__ import annotations

import math
from collections.abc import Iterator

import numerics
import pytest
import torch
from numerics import (
    TOLERANCES,
    ParityRow,
    assert_parity,
    assert_within,
    parity_error,
    parity_table,
    poisoned_memory,
    randomise_parameters,
    relative_error,
)
from torch import nn

from xclip_fast.numerics import model_allowance
from xclip_fast.reference import VideoPrompts

NAN, INF = math.nan, math.inf


@pytest.fixture(autouse=True)
def _no_rows() -> Iterator[None]:
    """Rows of these tests are no findings about the library."""
    yield
    numerics.ROWS.clear()


def test_error_is_relative_to_the_truth() -> None:
    truth = torch.randn(50, 40)
    assert relative_error(truth, truth) == 0
    assert relative_error(1.01 * truth, truth) == pytest.approx(0.01, rel=1e-3)
    assert relative_error(1e6 * 1.01 * truth, 1e6 * truth) == pytest.approx(0.01, rel=1e-3)


@pytest.mark.slow
def test_error_sees_one_wrong_element_in_a_million() -> None:
    for dtype, share in ((torch.float16, 1.0), (torch.bfloat16, 1.0), (torch.float32, 0.5), (torch.float64, 0.5)):
        truth = torch.ones(1000, 1000, dtype=dtype)
        actual = truth.clone()
        actual[3, 7] = 1.5
        assert relative_error(actual, truth) == pytest.approx(0.5)
        assert parity_error(actual, truth) == pytest.approx(0.5 * share)


def test_error_of_a_zero_truth_is_absolute() -> None:
    assert relative_error(torch.full((4,), 0.5), torch.zeros(4)) == 1
    assert relative_error(torch.zeros(0, 3), torch.zeros(0, 3)) == 0


@pytest.mark.parametrize(
    ("actual", "truth", "expected"),
    [
        ([NAN, 1.0], [NAN, 1.0], 0),
        ([INF, 1.0], [INF, 1.0], 0),
        ([NAN, 1.0], [0.0, 1.0], INF),
        ([0.0, 1.0], [NAN, 1.0], INF),
        ([INF, 1.0], [NAN, 1.0], INF),
        ([INF, 1.0], [-INF, 1.0], INF),
        ([NAN, NAN], [NAN, NAN], 0),
    ],
)
def test_error_wants_the_same_non_finite_elements(actual: list[float], truth: list[float], expected: float) -> None:
    assert relative_error(torch.tensor(actual), torch.tensor(truth)) == expected


def test_error_refuses_to_broadcast() -> None:
    with pytest.raises(ValueError, match=r"shape \(3,\), expected \(1, 3\)"):
        relative_error(torch.zeros(3), torch.zeros(1, 3))


def test_parity_allows_twice_the_error_of_torch() -> None:
    truth = torch.ones(8, dtype=torch.float64)
    torch_result = (truth + 1e-3).half()
    torch_error = relative_error(torch_result, truth)
    limit = 2 * torch_error + TOLERANCES[torch.float16].rounding
    assert_parity((truth + 0.9 * limit).half(), torch_result, truth, what="x", terms=1, ceiling=INF)
    with pytest.raises(AssertionError, match=r"x \(float16\): error"):
        assert_parity((truth + 2 * limit).half(), torch_result, truth, what="x", terms=1, ceiling=INF)


def test_parity_has_a_ceiling_where_torch_is_bad_too() -> None:
    truth = torch.ones(8, dtype=torch.float64)
    bad = (truth + 0.1).float()
    assert_parity(bad, bad, truth, what="x", terms=1, ceiling=1.0)
    with pytest.raises(AssertionError, match=r"error 1\.00e-01, allowed 1\.00e-06"):
        assert_parity(bad, bad, truth, what="x", terms=1)


def test_parity_never_passes_on_nan() -> None:
    truth = torch.ones(8, dtype=torch.float64)
    with pytest.raises(AssertionError):
        assert_parity(torch.full((8,), NAN), torch.full((8,), NAN), truth, what="x", terms=1)
    with pytest.raises(AssertionError):
        assert_within(torch.full((8,), NAN), truth, 1.0, what="x")


def test_parity_wants_one_dtype_and_a_float64_truth() -> None:
    x = torch.ones(2)
    with pytest.raises(AssertionError, match="dtype"):
        assert_parity(x.half(), x, x.double(), what="x", terms=1)
    with pytest.raises(AssertionError, match="float64"):
        assert_parity(x, x, x, what="x", terms=1)


def test_table_keeps_the_worst_case_of_each_comparison() -> None:
    rows = [
        ParityRow("b", "float32", 1e-8, NAN, 1e-5),
        ParityRow("a", "float32", 1e-7, 1e-7, 2e-7),
        ParityRow("a", "float32", 3e-7, 1e-6, 2e-6),
        ParityRow("a", "float16", 1e-4, 1e-4, 2e-4),
    ]
    lines = [line.split() for line in parity_table(rows)]
    assert lines[1:] == [
        ["a", "float16", "1", "1.0e-04", "1.0e-04", "2.0e-04"],
        ["a", "float32", "2", "1.0e-07", "1.0e-07", "2.0e-07"],
        ["b", "float32", "1", "1.0e-08", "-", "1.0e-05"],
    ]


def test_table_survives_an_allowance_of_zero() -> None:
    assert "x" in parity_table([ParityRow("x", "float64", 0.0, NAN, 0.0)])[1]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64], ids=str)
def test_poisoned_memory_is_nan(dtype: torch.dtype) -> None:
    with poisoned_memory():
        base = torch.ones(3, 5, dtype=dtype)
        tensors = [
            torch.empty(2000, dtype=dtype),
            torch.empty_like(base),
            base.new_empty(7),
            torch.empty_strided((3, 2), (2, 1), dtype=dtype),
        ]
        assert all(x.isnan().all() for x in tensors)
        assert torch.empty(3, dtype=torch.int32).min() == torch.iinfo(torch.int32).max
    assert not torch.are_deterministic_algorithms_enabled()


def test_poisoned_memory_ends_with_an_error() -> None:
    with pytest.raises(RuntimeError, match="inside"), poisoned_memory():
        raise RuntimeError("inside")
    assert not torch.are_deterministic_algorithms_enabled()


def test_random_parameters_leave_no_special_value() -> None:
    prompts = randomise_parameters(VideoPrompts(64, 1))
    for name, parameter in prompts.named_parameters():
        assert parameter.std() > 0.01, name
    norms = [part for part in prompts.modules() if isinstance(part, nn.LayerNorm)]
    assert all(0.5 < norm.weight.mean() < 1.5 for norm in norms)
    again = randomise_parameters(VideoPrompts(64, 1)).state_dict()
    assert all(torch.equal(value, again[name]) for name, value in prompts.state_dict().items())


@pytest.mark.parametrize("broken", [math.inf, math.nan])
@pytest.mark.parametrize("gradients", [False, True])
def test_where_torch_is_broken_nothing_else_may_be(broken: float, gradients: bool) -> None:
    allowed = model_allowance(broken, torch.bfloat16, gradients=gradients)
    assert allowed == (TOLERANCES[torch.bfloat16].gradients if gradients else TOLERANCES[torch.bfloat16].model)
    assert not math.inf <= allowed
