"""Entries for pytest-benchmark: each op and the encoder, a backend each, right before it is timed.

``pytest benchmarks --benchmark-only --benchmark-autosave`` stores a run of this machine, and
``--benchmark-compare`` sets the next one beside it.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from xclip_fast.bench.models import Effort
from xclip_fast.bench.operators import measure_op, timed_call
from xclip_fast.bench.providers import PROVIDERS
from xclip_fast.bench.run import make_case
from xclip_fast.bench.setting import UnavailableError, inputs_of, prepared, setting_of, step
from xclip_fast.ops.cases import OPS

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
ONCE = Effort(blocks=1, block=0.0, memory=False)


def synchronised(call: Callable[[], object]) -> Callable[[], object]:
    """The call to the end of its work: a GPU returns before."""

    def run() -> object:
        found = call()
        torch.cuda.synchronize()
        return found

    return run if DEVICE == "cuda" else call


@pytest.mark.parametrize("backend", ["reference", "torch", "triton", "extension"])
@pytest.mark.parametrize("op", OPS)
def test_op(op: str, backend: str, benchmark) -> None:  # type: ignore[no-untyped-def]
    case = make_case(op, "B/32", device=DEVICE)
    (row,) = measure_op(case, (backend,), ONCE, {})
    if row.status == "unavailable":
        pytest.skip(str(row.reason))
    assert row.check is not None
    assert row.check.passed, row.reason
    benchmark.extra_info.update(error=row.check.error, allowance=row.check.allowance)
    benchmark(synchronised(timed_call(case, backend)))


@pytest.mark.parametrize("provider", ["hf-sdpa", "layers", "engine"])
def test_model(provider: str, benchmark) -> None:  # type: ignore[no-untyped-def]
    case = make_case("model", "B/32", device=DEVICE)
    setting = setting_of(case)
    try:
        classify = prepared(PROVIDERS[provider].build(setting), case)
    except UnavailableError as reason:
        pytest.skip(str(reason))
    run = step(classify, inputs_of(setting), train=False)
    assert run().isfinite().all()
    benchmark.pedantic(synchronised(run), rounds=3, warmup_rounds=1)
