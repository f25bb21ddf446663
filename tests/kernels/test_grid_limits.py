"""Launches stay within the limits of CUDA up to eight thousand million elements; counted on tensors without memory."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch

pytest.importorskip("triton")

from launcher_cases import KEPT, LAUNCHERS, random_cases

from benchmarks.compile_gate import calls
from benchmarks.compile_gate.capture import captured_launches
from benchmarks.compile_gate.cases import make
from benchmarks.compile_gate.gate import kernels

MOST_PROGRAMS = 2**31 - 1
# 2**33 elements in the largest tensor of each
LARGEST: dict[str, Callable[[], Any]] = {
    "layer_norm": partial(calls.layer_norm, make, 2**28, 32, residual=True),
    "quantize_rows": partial(calls.quantize_rows, make, 2**28, 32, norm=True, residual=True, constant=True),
    "linear_quick_gelu rows": partial(calls.linear_quick_gelu, make, 2**27, 64, 64, training=True),
    "linear_quick_gelu columns": partial(calls.linear_quick_gelu, make, 2**13, 64, 2**20, training=True),
    "linear_quick_gelu_persistent": partial(calls.linear_quick_gelu_persistent, make, 2**27, 8, 64, programs=2**31),
    "mean_norm_over_frames": partial(calls.mean_norm_over_frames, make, 2**13, 8, 2**12, 32),
    "mean_norm_over_frames videos": partial(calls.mean_norm_over_frames, make, 2**28, 1, 1, 32),
    "clip_logits": partial(calls.clip_logits, make, 2**13, 2**15, 32),
    "clip_logits videos": partial(calls.clip_logits, make, 2**28, 1, 32),
    "patch_embed frames": partial(calls.patch_embed, make, 2**28, 1, 2, 16),
    "patch_embed pixels": partial(calls.patch_embed, make, 2, 2**12, 9, 16, pixels=torch.uint8),
    "prompt_attention classes": partial(calls.prompt_attention, make, 2**8, 2**20, 49, 32, 1, shared=True),
    "prompt_attention videos": partial(calls.prompt_attention, make, 2**28, 1, 1, 32, 1, shared=False),
    "prompt_attention patches": partial(calls.prompt_attention, make, 2**8, 1, 2**20, 32, 1, shared=True),
    "frame_attention frames": partial(calls.frame_attention, make, 2**28, 1, 1, head_dim=32, training=True),
    "frame_attention tokens": partial(calls.frame_attention, make, 2**10, 2**18, 1, head_dim=32, training=True),
    "frame_attention heads": partial(calls.frame_attention, make, 2**19, 64, 2, training=True, tile=KEPT),
    "message_attention clips": partial(calls.message_attention, make, 2**27, 1, 1, head_dim=32, ragged=True),
    "message_attention frames": partial(calls.message_attention, make, 1, 2**27, 1, head_dim=32),
    "message_attention heads": partial(calls.message_attention, make, 2, 64, 2**9, head_dim=128),
    "folded_message clips": partial(calls.folded_message, make, 2**27, 1, 1, head_dim=32),
    "folded_message frames": partial(calls.folded_message, make, 1, 2**27, 1, head_dim=32),
    "temporal_block": partial(calls.temporal_block, make, 2**26, 2, 1, head_dim=32),
}


def check(call: Callable[[], Any]) -> None:
    """Every launch has programs, within the limits, and along one axis."""
    with captured_launches() as launches:
        call()
    assert launches
    for launch in launches:
        # only x goes beyond 65535
        assert len(launch.grid) == 1, launch.name
        assert 0 < launch.grid[0] <= MOST_PROGRAMS, launch.name


@pytest.mark.parametrize("call", LARGEST.values(), ids=LARGEST)
def test_grid_is_within_the_limits(call: Callable[[], Any]) -> None:
    check(call)


@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_random_grids_are_within_the_limits(launcher: str) -> None:
    for call in random_cases(launcher, count=200, longest=2**20):
        check(partial(call, make))


def test_every_kernel_is_under_this_test() -> None:
    with captured_launches() as launches:
        for call in LARGEST.values():
            call()
    assert {launch.name for launch in launches} == kernels().keys()
