"""Launches stay within the limits of CUDA up to eight thousand million elements; counted on tensors without memory."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest

pytest.importorskip("triton")

from launcher_cases import KEPT, LAUNCHERS, random_cases

from benchmarks.compile_gate import calls
from benchmarks.compile_gate.capture import captured_launches
from benchmarks.compile_gate.cases import META
from benchmarks.compile_gate.gate import kernels
from xclip_fast.ops.cases import Sizes

MOST_PROGRAMS = 2**31 - 1
# 2**33 elements in the largest tensor of each
LARGEST: dict[str, Sizes] = {
    "layer_norm": {"rows": 2**28, "width": 32, "residual": True},
    "quantize_rows": {"rows": 2**28, "width": 32, "norm": True, "residual": True, "constant": True},
    "linear_quick_gelu rows": {"rows": 2**27, "width": 64, "hidden": 64},
    "linear_quick_gelu columns": {"rows": 2**13, "width": 64, "hidden": 2**20},
    "column_sums rows": {"rows": 2**28, "width": 32},
    "column_sums columns": {"rows": 2**3, "width": 2**30},
    "linear_quick_gelu_persistent": {"rows": 2**27, "width": 8, "hidden": 64, "programs": 2**31},
    "mean_norm_over_frames": {"batch": 2**13, "frames": 8, "patches": 2**12, "width": 32},
    "mean_norm_over_frames videos": {"batch": 2**28, "frames": 1, "patches": 1, "width": 32},
    "clip_logits": {"batch": 2**13, "classes": 2**15, "width": 32},
    "clip_logits videos": {"batch": 2**28, "classes": 1, "width": 32},
    "patch_embed frames": {"frames": 2**28, "image": 2, "patch": 2, "width": 16, "planes": True},
    "patch_embed pixels": {"frames": 2, "image": 9 * 2**12, "patch": 9, "width": 16},
    "prompt_attention classes": {"batch": 2**8, "classes": 2**20, "patches": 49, "width": 32, "heads": 1},
    "prompt_attention videos": {"batch": 2**28, "classes": 1, "patches": 1, "width": 32, "heads": 1},
    "prompt_attention patches": {"batch": 2**8, "classes": 1, "patches": 2**20, "width": 32, "heads": 1},
    "frame_attention frames": {"frames": 2**28, "tokens": 1, "width": 32, "heads": 1},
    "frame_attention tokens": {"frames": 2**10, "tokens": 2**18, "width": 32, "heads": 1},
    "frame_attention heads": {"frames": 2**19, "tokens": 64, "width": 128, "heads": 2, "tile": KEPT},
    "message_attention clips": {"batch": 2**27, "frames": 1, "width": 32, "heads": 1, "ragged": True},
    "message_attention frames": {"batch": 1, "frames": 2**27, "width": 32, "heads": 1},
    "message_attention heads": {"batch": 2, "frames": 64, "width": 2**16, "heads": 2**9},
    "message_key_value": {"frames": 2**27, "width": 32},
    "folded_message clips": {"batch": 2**27, "frames": 1, "width": 32, "heads": 1},
    "folded_message frames": {"batch": 1, "frames": 2**27, "width": 32, "heads": 1},
    "temporal_block": {"batch": 2**26, "frames": 2, "width": 32, "heads": 1},
}  # fmt: skip


def call_of(name: str) -> Callable[[], Any]:
    return partial(getattr(calls, name.split()[0]), META, **LARGEST[name])


def check(call: Callable[[], Any]) -> None:
    """Every launch has programs, within the limits, and along one axis."""
    with captured_launches() as launches:
        call()
    assert launches
    for launch in launches:
        # only x goes beyond 65535
        assert len(launch.grid) == 1, launch.name
        assert 0 < launch.grid[0] <= MOST_PROGRAMS, launch.name


@pytest.mark.parametrize("name", LARGEST)
def test_grid_is_within_the_limits(name: str) -> None:
    check(call_of(name))


@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_random_grids_are_within_the_limits(launcher: str) -> None:
    for call in random_cases(launcher, count=200, longest=2**20):
        check(partial(call, META))


def test_every_kernel_is_under_this_test() -> None:
    with captured_launches() as launches:
        for name in LARGEST:
            call_of(name)()
    assert {launch.name for launch in launches} == kernels().keys()
