"""The two assertions about errors, and the table of what was found; the tolerances are ``xclip_fast.numerics``.

* ``assert_parity``: a kernel or fused path may err at most twice as much as plain torch of the same dtype, or as sums
  of its length usually do, plus one rounding of the result;
* ``assert_within``: another implementation, or an exact rewrite, agrees to a limit of the table below.

Both add a row to the table that ``pytest -k parity -s`` prints at the end.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence
from dataclasses import astuple, dataclass

import torch
from torch import Tensor, nn

from xclip_fast.numerics import (
    TOLERANCES,
    allowance,
    longest_sum,
    model_allowance,
    parity_error,
    poisoned_memory,
    relative_error,
)

__all__ = ["TOLERANCES", "longest_sum", "model_allowance", "parity_error", "poisoned_memory", "relative_error"]

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


def assert_within(actual: Tensor, truth: Tensor, limit: float, *, what: str) -> None:
    """Fail when the relative error of ``actual`` against ``truth`` exceeds ``limit``."""
    _judge(actual, relative_error(actual, truth), math.nan, limit, what)


def assert_parity(
    actual: Tensor,
    same_dtype_torch: Tensor,
    truth64: Tensor,
    *,
    what: str,
    terms: int,
    ceiling: float | None = None,
    distance: float = 1.0,
) -> None:
    """Fail when ``actual`` is worse than ``xclip_fast.numerics.allowance``.

    Args:
        actual: the result under test.
        same_dtype_torch: the same computation by plain torch in the dtype of ``actual``.
        truth64: the same computation in float64, from the same (rounded) inputs.
        what: name of the row in the parity table.
        terms: of the longest sum on the way to it.
        ceiling: replaces the dtype's ceiling where the input is ill-conditioned on purpose, and torch bad with it.
        distance: see ``allowance``.
    """
    assert actual.dtype == same_dtype_torch.dtype, f"dtype {actual.dtype}, expected {same_dtype_torch.dtype}"
    assert truth64.dtype == torch.float64, f"the truth is float64, found {truth64.dtype}"
    torch_error = parity_error(same_dtype_torch, truth64)
    allowed = allowance(torch_error, actual.dtype, terms, ceiling, distance)
    _judge(actual, parity_error(actual, truth64), torch_error, allowed, what)


def assert_gradients(
    found: Sequence[Tensor | None], same_dtype_torch: Sequence[Tensor | None], truth64: Sequence[Tensor | None]
) -> None:
    """Fail when a model's gradient in float32 errs more than such a gradient may, and twice plain torch's error.

    Errors are relative to the gradient, or to a thousandth of the largest where one vanishes, as a key's bias does:
    what is left of it is the rounding of others.
    """
    least = 1e-3 * max(x.norm().item() for x in truth64 if x is not None)
    for index, (ours, plain, exact) in enumerate(zip(found, same_dtype_torch, truth64, strict=True)):
        assert (ours is None) == (plain is None) == (exact is None), index
        if ours is None or plain is None or exact is None:
            continue
        scale = max(exact.norm().item(), least)
        error, torch_error = ((x.cpu() - exact.cpu()).norm().item() / scale for x in (ours, plain))
        allowed = TOLERANCES[torch.float32].gradients + 2 * torch_error
        assert error <= allowed, f"gradient {index}: error {error:.2e}, allowed {allowed:.2e}, torch {torch_error:.2e}"


def _judge(actual: Tensor, error: float, torch_error: float, allowed: float, what: str) -> None:
    dtype = str(actual.dtype).removeprefix("torch.")
    ROWS.append(ParityRow(what, dtype, error, torch_error, allowed))
    assert error <= allowed, f"{what} ({dtype}): error {error:.2e}, allowed {allowed:.2e}, torch {torch_error:.2e}"


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
