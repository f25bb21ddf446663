"""Where no kernel runs, the registered ops, as exported graphs call them, and the torch formulations keep its rule."""

from __future__ import annotations

import pytest
import torch
from harness import KERNEL_DTYPES, check_op
from test_dtypes import ALL, ATTENTIONS

from xclip_fast.ops import _backends
from xclip_fast.ops.inputs import Draw

CASES = ALL | ATTENTIONS


@pytest.fixture(autouse=True)
def without_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """The registered ops are called with all their tensors, and find that the kernels refuse theirs."""
    monkeypatch.setattr(_backends, "_tensor_refusal", lambda tensors: None)
    monkeypatch.setattr(_backends, "kernel_refusal", lambda *tensors: "not here" if len(tensors) == 1 else None)


# in half precision the torch formulations round as PyTorch's own functions do
@pytest.mark.parametrize(
    ("called", "dtype"), [("torch", torch.float32), *(("registered", dtype) for dtype in KERNEL_DTYPES)], ids=str
)
@pytest.mark.parametrize("name", CASES)
def test_parity(name: str, called: str, dtype: torch.dtype) -> None:
    case, backend = CASES[name], "triton" if called == "registered" else "torch"
    check_op(case.op, case.draw(Draw(dtype, "cpu")), what=f"{name} without kernels", backend=backend, ceiling=1e-2)
