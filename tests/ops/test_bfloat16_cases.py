"""Every case of ``xclip-fast verify`` in bfloat16, the kernels' own dtype, forward and backward in the interpreter."""

from __future__ import annotations

import pytest
from harness import DEVICE

from xclip_fast.bench.verify import FAILED, Result, check
from xclip_fast.ops.cases import OPS

# the interpreter rounds float8 wrongly
CASES = [(op, case) for op in OPS if op != "quantize_rows" for case in OPS[op].small]


@pytest.mark.parametrize(("op", "case"), CASES, ids=lambda name: name.replace(" ", "_"))
def test_passes(op: str, case: str) -> None:
    found = check(Result(op, case, "triton", DEVICE, "bfloat16", 0, FAILED), gradients=True)
    assert found.status == "passed", found
