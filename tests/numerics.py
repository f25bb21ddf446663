"""The single home of tolerances: how errors are measured, what is allowed, and the table of what was found.

Errors are relative to the largest scale of a float64 truth, so one figure serves every shape and dtype. Two rules:

* ``assert_parity``: a kernel or fused path may err at most twice as much as plain torch of the same dtype, plus one
  rounding of the result;
* ``assert_within``: another implementation, or an exact rewrite, agrees to a limit of the table below.

Both add a row to the table that ``pytest -k parity -s`` prints at the end.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import astuple, dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn


class Tolerance(NamedTuple):
    """What one dtype is allowed; all figures are relative.

    rounding: added to twice torch's own error, the rounding of a result that torch may happen to hit exactly: one in
        half precision, where kernels compute in float32, four where the arithmetic itself rounds as the result does.
    ceiling: no result of one op may be worse, however badly torch does; ill-conditioned inputs lift it explicitly.
    model: a whole model in this dtype against float64.
    """

    rounding: float
    ceiling: float
    model: float


TOLERANCES = {
    torch.float64: Tolerance(rounding=1e-14, ceiling=1e-13, model=1e-12),
    torch.float32: Tolerance(rounding=2.4e-7, ceiling=1e-6, model=1e-5),
    torch.float16: Tolerance(rounding=4.9e-4, ceiling=2e-3, model=1e-2),
    torch.bfloat16: Tolerance(rounding=3.9e-3, ceiling=1e-2, model=5e-2),
}
EXACT = 1e-12  # an algebraic rewrite, in float64
PUBLISHED = 1e-5  # another implementation of X-CLIP, in float32


@dataclass(frozen=True)
class ParityRow:
    """One comparison: what was compared, in which dtype, the error found, torch's own error, the allowance."""

    what: str
    dtype: str
    error: float
    torch_error: float
    allowance: float


ROWS: list[ParityRow] = []  # of the running test; conftest moves them into the test's report


def relative_error(actual: Tensor, truth: Tensor) -> float:
    """The larger of the relative errors in the Euclidean and the maximum norm, computed in float64.

    The Euclidean norm sees a small error everywhere, the maximum norm one wrong element in a million. Infinite where
    the non-finite elements of the two differ in place or kind, and absolute where the truth is zero.

    Raises:
        AssertionError: the shapes differ.
    """
    assert actual.shape == truth.shape, f"shape {tuple(actual.shape)}, expected {tuple(truth.shape)}"
    actual, truth = (x.detach().to("cpu", torch.float64) for x in (actual, truth))
    finite = truth.isfinite()
    if not torch.equal(finite, actual.isfinite()):
        return math.inf
    if not torch.allclose(actual[~finite], truth[~finite], equal_nan=True):
        return math.inf
    difference, truth = actual[finite] - truth[finite], truth[finite]
    if not truth.any():
        return difference.norm().item()
    return max((difference.norm() / truth.norm()).item(), (difference.abs().max() / truth.abs().max()).item())


def assert_within(actual: Tensor, truth: Tensor, limit: float, *, what: str) -> None:
    """Fail when the relative error of ``actual`` against ``truth`` exceeds ``limit``."""
    _judge(actual, relative_error(actual, truth), math.nan, limit, what)


def assert_parity(
    actual: Tensor, same_dtype_torch: Tensor, truth64: Tensor, *, what: str, ceiling: float | None = None
) -> None:
    """Fail when ``actual`` is worse than twice plain torch of the same dtype plus a rounding, or above the ceiling.

    Args:
        actual: the result under test.
        same_dtype_torch: the same computation by plain torch in the dtype of ``actual``.
        truth64: the same computation in float64, from the same (rounded) inputs.
        what: name of the row in the parity table.
        ceiling: replaces the dtype's ceiling where the input is ill-conditioned on purpose, and torch bad with it.
    """
    assert actual.dtype == same_dtype_torch.dtype, f"dtype {actual.dtype}, expected {same_dtype_torch.dtype}"
    assert truth64.dtype == torch.float64, f"the truth is float64, found {truth64.dtype}"
    tolerance = TOLERANCES[actual.dtype]
    torch_error = relative_error(same_dtype_torch, truth64)
    allowance = min(2 * torch_error + tolerance.rounding, tolerance.ceiling if ceiling is None else ceiling)
    _judge(actual, relative_error(actual, truth64), torch_error, allowance, what)


def _judge(actual: Tensor, error: float, torch_error: float, allowance: float, what: str) -> None:
    dtype = str(actual.dtype).removeprefix("torch.")
    ROWS.append(ParityRow(what, dtype, error, torch_error, allowance))
    assert error <= allowance, f"{what} ({dtype}): error {error:.2e}, allowed {allowance:.2e}, torch {torch_error:.2e}"


def parity_table(rows: list[ParityRow]) -> list[str]:
    """The lines of the parity table: for each comparison and dtype the case closest to its allowance."""
    groups: dict[tuple[str, str], list[ParityRow]] = {}
    for row in rows:
        groups.setdefault((row.what, row.dtype), []).append(row)
    width = max(len(what) for what, _ in groups)
    lines = [f"{'what':{width}}  {'dtype':8}  cases     error     torch  allowance"]
    for (what, dtype), cases in sorted(groups.items()):
        worst = max(cases, key=lambda row: row.error / max(row.allowance, sys.float_info.min))
        figures = (f"{x:9.1e}" if not math.isnan(x) else f"{'-':>9}" for x in astuple(worst)[2:])
        lines.append(f"{what:{width}}  {dtype:8}  {len(cases):5} " + " ".join(figures))
    return lines


@contextmanager
def poisoned_memory() -> Iterator[None]:
    """Fill every uninitialised tensor (torch.empty and its kin) with NaN, or the largest integer, while it is active.

    A kernel that leaves an element of its output unwritten then fails its comparison.
    """
    was = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    fill = torch.utils.deterministic.fill_uninitialized_memory
    # torch fills memory only in its deterministic mode
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(was[0], warn_only=was[1])
        torch.utils.deterministic.fill_uninitialized_memory = fill


def randomise_parameters(model: nn.Module, seed: int = 0) -> nn.Module:
    """Give every parameter a random value of unit-scale effect, and return the model.

    No parameter keeps its special first value (norm weights of one, biases of zero), behind which faults can hide.
    """
    generator = torch.Generator().manual_seed(seed)
    norms = {id(part.weight) for part in model.modules() if isinstance(part, nn.LayerNorm)}
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            if id(parameter) in norms:
                value = 1 + 0.3 * noise
            elif parameter.ndim == 0:
                # logit_scale: its exponential multiplies every error alike
                value = 2 + 0.1 * noise
            elif parameter.ndim == 1:
                value = 0.3 * noise
            else:
                value = noise * parameter.flatten(1).shape[1] ** -0.5
            parameter.copy_(value)
    return model
