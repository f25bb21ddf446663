"""How errors are measured and what is allowed: one table for the tests, ``xclip-fast verify`` and every benchmark.

Errors are relative to the largest scale of a float64 truth, so one figure serves every shape and dtype. A kernel or
fused path may err at most twice as much as plain torch of the same dtype, plus one rounding of the result. Which order
torch sums in depends on the processor, and where it is lucky that is no measure: what sums of this length err anyway is
allowed everywhere.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
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

    @property
    def gradients(self) -> float:
        """A gradient of a whole model: it has passed twice as many roundings, and the differences in a softmax's."""
        return 4 * self.model


_ARITHMETIC = threading.RLock()  # PyTorch has one set of its settings

TOLERANCES = {
    torch.float64: Tolerance(rounding=1e-14, ceiling=1e-13, model=1e-12),
    torch.float32: Tolerance(rounding=2.4e-7, ceiling=1e-6, model=1e-5),
    torch.float16: Tolerance(rounding=4.9e-4, ceiling=2e-3, model=1e-2),
    torch.bfloat16: Tolerance(rounding=3.9e-3, ceiling=1e-2, model=5e-2),
}


def sum_error(dtype: torch.dtype, terms: int, distance: float = 1.0) -> float:
    """What an op with sums of this many terms errs in whatever order, relative to its largest results.

    A rounding is uniform within half a step, and a number anywhere between two powers of two: its root mean square is
    0.41 of the unit, 2^-24 where half precision and float32 are summed up. Partial sums of n terms of random sign grow
    as sqrt(k), so their roundings add up to 0.41 sqrt(n / 2) = 0.29 sqrt(n) units of the result. An op and its gradient
    chain four such sums or fewer (scores, weighted values, both backwards), independent ones: twice as much. Longer
    sums than 64 terms run in lanes and blocks, and torch's error, an average over them, is no luck.

    A norm of numbers ``distance`` deviations from zero subtracts their mean, which is a rounded number itself: half a
    step of it, 0.29 units as a root mean square, shifts them all. So does a softmax of scores as far from zero.
    """
    unit = 2.0**-53 if dtype == torch.float64 else 2.0**-24
    return max(0.6 * math.sqrt(min(terms, 64)), 0.29 * distance) * unit


def longest_sum(arguments: Mapping[str, object]) -> int:
    """The most terms a sum in an op or its gradients has: rows or columns of its largest argument."""
    tensors = [x for x in arguments.values() if isinstance(x, Tensor) and x.is_floating_point() and x.numel()]
    return max((max(x.shape[-1], x.numel() // x.shape[-1]) for x in tensors if x.ndim), default=1)


def allowance(
    torch_error: float, dtype: torch.dtype, terms: int, ceiling: float | None = None, distance: float = 1.0
) -> float:
    """The error a result of this dtype may have where plain torch has ``torch_error``.

    In float32 that is at most 8.1e-7 where torch errs no more than such sums do: an error of four roundings shows, of
    eight where it is in one element.

    Args:
        torch_error: ``parity_error`` of the same computation by plain torch in the same dtype.
        dtype: of the result.
        terms: of the longest sum on the way to it.
        ceiling: replaces the dtype's ceiling where the input is ill-conditioned on purpose, and torch bad with it.
        distance: from zero, of the mean of what is normed in its deviations, or of the scores of a softmax.
    """
    tolerance = TOLERANCES[dtype]
    usual = max(torch_error, sum_error(dtype, terms, distance))
    return min(2 * usual + tolerance.rounding, tolerance.ceiling if ceiling is None else ceiling)


def model_allowance(torch_error: float, dtype: torch.dtype, *, gradients: bool = False) -> float:
    """The error the results of a whole model may have where plain torch has ``torch_error``, like ``allowance``.

    A model's few logits are one draw of its error: below a quarter of its tolerance torch was lucky. Where torch errs
    more than the tolerance, so may others.
    """
    tolerance = TOLERANCES[dtype]
    limit = tolerance.gradients if gradients else tolerance.model
    if not math.isfinite(torch_error):
        # where torch is broken nothing else may be
        return limit
    return min(2 * max(torch_error, limit / 4) + tolerance.rounding, max(limit, torch_error))


def relative_error(actual: Tensor, truth: Tensor) -> float:
    """The larger of the relative errors in the Euclidean and the maximum norm, computed in float64.

    The Euclidean norm sees a small error everywhere, the maximum norm one wrong element in a million. Infinite where
    the non-finite elements of the two differ in place or kind, and absolute where the truth is zero.

    Raises:
        ValueError: the shapes differ.
    """
    return max(_errors(actual, truth))


def parity_error(actual: Tensor, truth: Tensor) -> float:
    """``relative_error`` as ``allowance`` judges it: in float32 and float64 the maximum norm counts by half.

    Results carry the roundings of all their sums there: those of an attention, or of its gradients, are large in the
    rows of large scores, and the largest is twice the usual one. Half precision rounds the result alone, each element
    alike. Whoever holds a result to a limit of its own takes ``relative_error``.
    """
    euclidean, largest = _errors(actual, truth)
    return max(euclidean, 0.5 * largest if actual.dtype in (torch.float32, torch.float64) else largest)


def _errors(actual: Tensor, truth: Tensor) -> tuple[float, float]:
    """The relative errors in the Euclidean and the maximum norm."""
    if actual.shape != truth.shape:
        raise ValueError(f"shape {tuple(actual.shape)}, expected {tuple(truth.shape)}")
    actual, truth = (x.detach().to("cpu", torch.float64) for x in (actual, truth))
    finite = truth.isfinite()
    if not torch.equal(finite, actual.isfinite()):
        return math.inf, math.inf
    if not torch.allclose(actual[~finite], truth[~finite], equal_nan=True):
        return math.inf, math.inf
    difference, truth = actual[finite] - truth[finite], truth[finite]
    if not truth.any():
        return difference.norm().item(), 0.0
    return (difference.norm() / truth.norm()).item(), (difference.abs().max() / truth.abs().max()).item()


@contextmanager
def exact_float32() -> Iterator[None]:
    """GEMMs and convolutions of float32 in float32 while it is active, whatever the settings: no TF32, no bfloat16.

    PyTorch convolves in TF32 unless it is told otherwise, and multiplies in it when it is told to: an error of 1e-3,
    which is no float32. The settings are the whole process's: one thread at a time sets them, others compute under them
    meanwhile, and all are as they were afterwards.
    """
    backends: Any = torch.backends
    convolutions = backends.cudnn
    newer = backends.cuda.matmul, convolutions.conv, backends.mkldnn.matmul
    with _ARITHMETIC:
        precisions = [setting.fp32_precision for setting in newer]
        older = None
        # they refuse to be read where the newer ones say something else; set here, they can be read inside
        with suppress(RuntimeError):
            older = torch.get_float32_matmul_precision(), convolutions.allow_tf32
        try:
            if older is not None:
                torch.set_float32_matmul_precision("highest")
                convolutions.allow_tf32 = False
            for setting in newer:
                setting.fp32_precision = "ieee"
            yield
        finally:
            if older is not None:
                torch.set_float32_matmul_precision(older[0])
                convolutions.allow_tf32 = older[1]
            for setting, precision in zip(newer, precisions, strict=True):
                # what was inherited is again, and follows later changes of the setting above it
                setting.fp32_precision = "none"
                if setting.fp32_precision != precision:
                    setting.fp32_precision = precision


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
