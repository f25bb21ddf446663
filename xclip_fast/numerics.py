"""How errors are measured and what is allowed: one table for the tests, ``xclip-fast verify`` and every benchmark.

Errors are relative to the largest scale of a float64 truth, so one figure serves every shape and dtype. A kernel or
fused path may err at most twice as much as plain torch of the same dtype, plus one rounding of the result.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor


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


def allowance(torch_error: float, dtype: torch.dtype, ceiling: float | None = None) -> float:
    """The error a result of this dtype may have where plain torch has ``torch_error``.

    Args:
        torch_error: relative error of the same computation by plain torch in the same dtype.
        dtype: of the result.
        ceiling: replaces the dtype's ceiling where the input is ill-conditioned on purpose, and torch bad with it.
    """
    tolerance = TOLERANCES[dtype]
    return min(2 * torch_error + tolerance.rounding, tolerance.ceiling if ceiling is None else ceiling)


def relative_error(actual: Tensor, truth: Tensor) -> float:
    """The larger of the relative errors in the Euclidean and the maximum norm, computed in float64.

    The Euclidean norm sees a small error everywhere, the maximum norm one wrong element in a million. Infinite where
    the non-finite elements of the two differ in place or kind, and absolute where the truth is zero.

    Raises:
        ValueError: the shapes differ.
    """
    if actual.shape != truth.shape:
        raise ValueError(f"shape {tuple(actual.shape)}, expected {tuple(truth.shape)}")
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


@contextmanager
def poisoned_memory() -> Iterator[None]:
    """Fill every uninitialised tensor (torch.empty and its kin) with NaN, or the largest integer, while it is active.

    A kernel that leaves an element of its output unwritten then fails its comparison.
    """
    was = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    deterministic: Any = torch.utils.deterministic
    fill = deterministic.fill_uninitialized_memory
    # torch fills memory only in its deterministic mode
    torch.use_deterministic_algorithms(True, warn_only=True)
    deterministic.fill_uninitialized_memory = True
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(was[0], warn_only=was[1])
        deterministic.fill_uninitialized_memory = fill
