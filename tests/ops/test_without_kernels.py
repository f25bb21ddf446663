"""The registered ops where no kernel runs, as exported graphs call them on the CPU, held to the rule of the kernels."""

from __future__ import annotations

import pytest
import torch
from harness import check_op, kernel_dtypes
from test_dtypes import ALL, ATTENTIONS

from xclip_fast.bench.inputs import Draw
from xclip_fast.ops import _backends

CASES = ALL | ATTENTIONS


@pytest.fixture(autouse=True)
def without_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """The registered ops are called with all their tensors, and find that the kernels refuse theirs."""
    monkeypatch.setattr(_backends, "kernel_refusal", lambda *tensors: "not here" if len(tensors) == 1 else None)


@kernel_dtypes
@pytest.mark.parametrize("name", CASES)
def test_parity(name: str, dtype: torch.dtype) -> None:
    case = CASES[name]
    check_op(case.op, case.draw(Draw(dtype, "cpu")), what=f"{name} without kernels", backend="triton", ceiling=1e-2)
