"""Every kernel writes all of its outputs and nothing else, wherever they lie and however its programs are ordered."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from functools import partial
from math import prod
from typing import Any

import pytest
import torch
from torch import Tensor

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="the checks look into the interpreter")

import triton  # noqa: E402
import triton.language as tl  # noqa: E402
from guards import FAR, GuardedMemory, factories  # noqa: E402
from launcher_cases import CASES, KEPT, LAUNCHERS, random_cases  # noqa: E402
from pointer_check import checked_pointers  # noqa: E402
from programs import programs  # noqa: E402

from benchmarks.compile_gate.calls import EPS, frame_attention  # noqa: E402
from benchmarks.compile_gate.gate import kernels  # noqa: E402
from xclip_fast.kernels.clip_logits import clip_logits_fwd  # noqa: E402
from xclip_fast.kernels.frame_attention import frame_attention_fwd  # noqa: E402
from xclip_fast.kernels.layer_norm import layer_norm_fwd  # noqa: E402
from xclip_fast.kernels.linear_quick_gelu import (  # noqa: E402
    linear_quick_gelu_fwd,
    linear_quick_gelu_persistent_fwd,
    quick_gelu_bwd,
)
from xclip_fast.kernels.mean_norm_over_frames import mean_norm_over_frames_fwd  # noqa: E402
from xclip_fast.kernels.prompt_attention import prompt_attention_fwd  # noqa: E402
from xclip_fast.kernels.quantize_rows import quantize_rows_fwd  # noqa: E402
from xclip_fast.ops.inputs import Factory  # noqa: E402

Call = Callable[..., list[Tensor]]
every_case = pytest.mark.parametrize("call", CASES.values(), ids=CASES)


def shuffled(seed: int, count: int) -> Sequence[int]:
    return random.Random(seed).sample(range(count), count)


ORDERS = [lambda count: range(count)[::-1], *(partial(shuffled, seed) for seed in range(3))]


def equal(one: Sequence[Tensor], other: Sequence[Tensor]) -> bool:
    return len(one) == len(other) and all(map(torch.equal, one, other))


@every_case
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=["float32", "float16"])
def test_outputs_are_written_whole_and_nothing_else(call: Call, dtype: torch.dtype) -> None:
    with checked_pointers(), GuardedMemory(dtype) as memory:
        call(memory.draw)
    assert memory.inputs
    assert memory.outputs
    memory.check()


@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_random_sizes_are_written_whole(launcher: str) -> None:
    for call in random_cases(launcher, count=10, longest=72):
        with checked_pointers(), GuardedMemory() as memory:
            call(memory.draw)
        memory.check()


@every_case
def test_any_order_of_programs_gives_the_same_bits(call: Call) -> None:
    results = []
    for order in (range, *ORDERS):
        torch.manual_seed(0)
        # an output read before it is written is not a number here
        with programs(order), GuardedMemory() as memory:
            results.append(call(memory.draw))
    for result in results[1:]:
        assert equal(results[0], result)


@every_case
@pytest.mark.parametrize("axis", [0, 1, 2])
def test_offsets_beyond_int32(call: Call, axis: int) -> None:
    near, far = factories(axis)
    expected = call(near)
    with checked_pointers():
        found = call(far)
    assert equal(found, expected)


@pytest.mark.slow
def test_far_inputs_are_read_in_place() -> None:
    _, far = factories(axis=0)
    with checked_pointers() as launches:
        for call in CASES.values():
            call(far)
    near = {name for name, stride in launches.strides.items() if stride < FAR // 256}
    assert not near, "no input with a huge stride reached these kernels"


def repeated(count: int, *shape: int) -> Tensor:
    """The same numbers ``count`` times, without memory for each."""
    return torch.linspace(-1.0, 1.0, prod(shape)).view(1, *shape).half().expand(count, *shape)


def quick_gelu_of_tail(rows: int) -> Tensor:
    """The kernel takes dense memory: only what the last program reads is filled."""
    tail = repeated(min(rows, 32), 64)
    grad, pre = (torch.empty(rows, 64, dtype=torch.float16) for _ in range(2))
    grad[-len(tail) :], pre[-len(tail) :] = tail, tail
    return quick_gelu_bwd(grad, pre, False)[0]


VECTORS = {width: torch.linspace(0.5, 2.0, width).half() for width in (16, 32, 64)}
# called with a number of rows, frames or videos; of each, 64 numbers come out
LONG = {
    "layer_norm": lambda count: layer_norm_fwd(repeated(count, 64), VECTORS[64], VECTORS[64], None, None, EPS)[0],
    "quantize_rows": lambda count: quantize_rows_fwd(
        repeated(count, 64), *[VECTORS[64]] * 2, None, VECTORS[64], EPS, None
    )[0].view(torch.int8),
    "quantize_rows residual": lambda count: quantize_rows_fwd(
        repeated(count, 64), *[VECTORS[64]] * 2, repeated(count, 64), None, EPS, None
    )[2],
    "linear_quick_gelu": lambda count: linear_quick_gelu_fwd(
        repeated(count, 16), repeated(64, 16).contiguous(), VECTORS[64], False
    )[0],
    "linear_quick_gelu_persistent": lambda count: linear_quick_gelu_persistent_fwd(
        repeated(count, 16), repeated(64, 16).contiguous(), VECTORS[64], False, FAR
    )[0],
    "quick_gelu": quick_gelu_of_tail,
    "mean_norm_over_frames": lambda count: mean_norm_over_frames_fwd(
        repeated(count, 1, 2, 32), VECTORS[32], VECTORS[32], None, None, EPS
    ),
    "frame_attention": lambda count: frame_attention_fwd(repeated(count, 2, 96), repeated(count, 64), 1, True)[0],
    "frame_attention head": lambda count: frame_attention(
        Factory(lambda *shape, dtype: repeated(shape[0], *shape[1:])),
        frames=-(-count // 64),
        tokens=64,
        width=64,
        heads=1,
        training=False,
        tile=KEPT,
    )[0],
    "prompt_attention": lambda count: prompt_attention_fwd(
        repeated(1, 2, 32), repeated(count, 3, 32), repeated(count, 3, 32), 1
    )[0],
    "clip_logits": lambda count: clip_logits_fwd(
        repeated(count, 32), repeated(64, 32), repeated(count, 64, 32), VECTORS[32], torch.tensor(0.5).half(), None
    ),
}


@pytest.mark.parametrize("call", LONG.values(), ids=LONG)
def test_outputs_beyond_int32(call: Callable[[int], Tensor]) -> None:
    # the last program alone: memory that is never touched is never allocated
    with checked_pointers(), programs(lambda count: [count - 1]):
        expected, found = (call(count).flatten()[-4:].clone() for count in (7, FAR // 64 + 7))
    assert expected.abs().max() > 0
    assert torch.equal(found, expected)


@pytest.mark.slow
def test_every_kernel_is_under_these_tests() -> None:
    most: dict[str, int] = {}

    def count(programs: int) -> Sequence[int]:
        most[launches.names[-1]] = max(most.get(launches.names[-1], 0), programs)
        return range(programs)

    with checked_pointers() as launches, programs(count):
        for call in CASES.values():
            call(GuardedMemory().draw)
    assert most.keys() == kernels().keys()
    # one program has no order
    assert all(number > 1 for number in most.values()), most


@triton.jit
def _faulty(x_ptr, out_ptr, count, FAULT: tl.constexpr, BLOCK: tl.constexpr):
    index = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = index < count
    x = tl.load(x_ptr + index, mask=inside, other=0.0)
    if FAULT == "reads too far":
        x += tl.load(x_ptr + index + 1, mask=inside, other=0.0)
    if FAULT == "reads what another wrote":
        x += tl.load(out_ptr + index - BLOCK, mask=(index >= BLOCK) & inside, other=0.0)
    tl.store(out_ptr + index, x, mask=inside & (index > 0) if FAULT == "leaves one out" else inside)
    if FAULT == "writes too far":
        tl.store(out_ptr + count + index, x, mask=index == 0)
    if FAULT == "writes an input":
        tl.store(x_ptr + index, x + 1, mask=index == 0)


def faulty(make: Any, fault: str) -> list[Tensor]:
    x = make(10)
    out = torch.empty(10)
    _faulty[(3,)](x_ptr=x, out_ptr=out, count=10, FAULT=fault, BLOCK=4)
    return [out]


@pytest.mark.parametrize(
    ("fault", "complaint"),
    [
        ("leaves one out", "1 of 10 elements were not written"),
        ("writes too far", "a guard was written"),
        ("writes an input", "an input was written"),
    ],
)
def test_planted_fault_is_seen_by_the_guards(fault: str, complaint: str) -> None:
    with GuardedMemory() as memory:
        faulty(memory.make, fault)
    with pytest.raises(AssertionError, match=complaint):
        memory.check()


def test_planted_stray_read_is_seen() -> None:
    with checked_pointers() as launches, GuardedMemory() as memory, pytest.raises(Exception, match="outside its tens"):
        faulty(memory.make, "reads too far")
    assert launches.names == ["_faulty"]


def test_planted_dependence_on_order_is_seen() -> None:
    for order in ORDERS:
        results = []
        for programs_in in (range, order):
            torch.manual_seed(0)
            with programs(programs_in), GuardedMemory() as memory:
                results.append(faulty(memory.make, "reads what another wrote"))
        assert not equal(*results)


def test_only_the_chosen_programs_run() -> None:
    with checked_pointers() as launches, programs(lambda count: [count - 1]), GuardedMemory() as memory:
        (out,) = faulty(memory.make, "")
    assert out.isnan().tolist() == [True] * 8 + [False] * 2
    assert launches.names == ["_faulty"]
