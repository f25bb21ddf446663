"""The pointer check itself: it must see planted faults, else it proves nothing."""

from __future__ import annotations

import pytest
import torch

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="the check looks into the interpreter")

import triton  # noqa: E402
import triton.language as tl  # noqa: E402
from pointer_check import checked_pointers  # noqa: E402


@triton.jit
def _copy(x_ptr, out_ptr, count, shift, BLOCK: tl.constexpr, MASKED: tl.constexpr):
    index = tl.arange(0, BLOCK)
    inside = index < (count if MASKED else BLOCK)
    tl.store(out_ptr + index, tl.load(x_ptr + index + shift, mask=inside), mask=inside)


@triton.jit
def _last_row(x_ptr, out_ptr, rows, stride, WIDE: tl.constexpr):
    row = rows - 1
    if WIDE:
        row = tl.cast(row, tl.int64)
    tl.store(out_ptr, tl.load(x_ptr + row * stride))


def test_sound_kernel_passes_and_is_counted() -> None:
    x, out = torch.arange(10.0), torch.empty(10)
    with checked_pointers() as launches:
        _copy[(1,)](x, out, 10, 0, BLOCK=16, MASKED=True)
    assert torch.equal(x, out)
    assert launches.names == ["_copy"]


@pytest.mark.parametrize("fault", ["no mask", "before the start", "behind the end"])
def test_stray_access_is_seen(fault: str) -> None:
    # the tensors lie inside larger storage, so nothing crashes and nothing but the check can tell
    storage = torch.zeros(3, 64)
    x, out = storage[1, 20:30], torch.empty(64)[20:30]
    shift = {"no mask": 0, "before the start": -1, "behind the end": 1}[fault]
    with checked_pointers(), pytest.raises(Exception, match=r"OutOfBoundsError.*outside its tensors"):
        _copy[(1,)](x, out, 10, shift, BLOCK=16, MASKED=fault != "no mask")


def test_wrapped_int32_offset_is_seen() -> None:
    # memory that is never touched is never allocated
    x = torch.empty(3 * 2**30, dtype=torch.int8).as_strided((4, 1), (2**30 - 1, 1))
    x[3, 0] = 7
    out = torch.empty(1, dtype=torch.int8)
    with checked_pointers():
        _last_row[(1,)](x, out, 4, 2**30 - 1, WIDE=True)
    assert out.item() == 7
    with checked_pointers(), pytest.raises(Exception, match="outside its tensors"):
        _last_row[(1,)](x, out, 4, 2**30 - 1, WIDE=False)
