"""The same bits every time, forward and backward, also while the GPU has other work."""

from __future__ import annotations

import pytest
import torch
from gpu_cases import DEVICE, DTYPES, ON_GPU, copies, equal, forward_and_backward, inputs_of

from xclip_fast.ops.cases import TRAINED

REPEATS = 50 if ON_GPU else 2
# tokens in whole tiles and tails, and a batch that fills the GPU
CASES = [("B/16", 8), ("L/14", 2), ("B/32", 1)] if ON_GPU else [("tiny", 2)]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("variant", "batch"), CASES)
@pytest.mark.parametrize("op", TRAINED)
def test_repeats_are_bit_equal(op: str, variant: str, batch: int, dtype: str) -> None:
    run = forward_and_backward(op, inputs_of(op, variant, dtype, batch=batch))
    first = copies(run())
    assert all(x.isfinite().all() for x in first)
    side = torch.cuda.Stream() if ON_GPU else None
    load = torch.randn(2048, 2048, device=DEVICE) if ON_GPU else torch.empty(0)
    for repeat in range(REPEATS):
        if side is not None and repeat % 2:
            # programs then start in another order, and between others
            with torch.cuda.stream(side):
                torch.mm(load, load)
        assert equal(run(), first), f"repeat {repeat}"
