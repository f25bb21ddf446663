"""Parity of every op, forward and gradients, at the shapes of the published models: 50, 197, 257 and 577 tokens."""

from __future__ import annotations

import pytest
from gpu_cases import DTYPES, OF_CLIPS, ON_GPU, VARIANTS, check, inputs_of

from xclip_fast.ops.cases import TRAINED, config_of


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("op", TRAINED)
def test_parity_of_a_clip(op: str, variant: str, dtype: str) -> None:
    check(op, inputs_of(op, variant, dtype), dtype, f"in {variant}")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("frames", [16, 32] if ON_GPU else [8])
@pytest.mark.parametrize("op", OF_CLIPS)
def test_parity_of_longer_clips(op: str, frames: int, variant: str, dtype: str) -> None:
    check(op, inputs_of(op, variant, dtype, frames), dtype, f"of {frames} frames")


@pytest.mark.skipif(not ON_GPU, reason="the sizes of production are too slow in the interpreter")
def test_these_are_the_sizes_of_production() -> None:
    assert [config_of(variant).patches + 1 for variant in VARIANTS] == [50, 197, 257, 577]
