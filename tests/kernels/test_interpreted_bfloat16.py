"""bfloat16 in the interpreter: its casts and products are right, and what it still could get wrong is refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU needs no interpreter")

import triton  # noqa: E402
import triton.language as tl  # noqa: E402
from interpreted_bfloat16 import interpreted_bfloat16, to_bfloat16, to_float32  # noqa: E402
from torch import Tensor  # noqa: E402

from xclip_fast.ops import explain  # noqa: E402


@triton.jit
def _double(x_ptr, out_ptr, WIDE: tl.constexpr):
    index = tl.arange(0, 16)
    x = tl.load(x_ptr + index)
    if WIDE:
        x = x.to(tl.float32)
    tl.store(out_ptr + index, x + x)


@triton.jit
def _add_up(x_ptr, out_ptr):
    tl.store(out_ptr, tl.sum(tl.load(x_ptr + tl.arange(0, 16)), axis=0))


@triton.jit
def _square(x_ptr, out_ptr):
    row, column = tl.arange(0, 16)[:, None], tl.arange(0, 16)[None, :]
    x = tl.load(x_ptr + row * 16 + column)
    tl.store(out_ptr + row * 16 + column, tl.dot(x, tl.trans(x)))


def numbers() -> Tensor:
    """Of all sizes, on and around the middle between two of bfloat16, and those that are none."""
    drawn = torch.randn(4096) * torch.logspace(-42, 38, 4096, dtype=torch.float64).float()
    ties = (torch.arange(2048, dtype=torch.int32) * 32768 + 0x3F800000).view(torch.float32)
    odd = torch.tensor([0.0, -0.0, 3.4e38, -3.4e38, float("inf"), -float("inf"), float("nan"), 1e-45])
    return torch.cat([drawn, ties, ties.nextafter(torch.tensor(9.0)), odd])


def test_casts_are_those_of_pytorch() -> None:
    wide = numbers()
    found = torch.from_numpy(to_bfloat16(wide.numpy())).view(torch.bfloat16)
    expected = wide.to(torch.bfloat16)
    assert torch.equal(found.isnan(), expected.isnan())
    assert torch.equal(found.nan_to_num().view(torch.int16), expected.nan_to_num().view(torch.int16))
    back = torch.from_numpy(to_float32(expected.view(torch.uint16).numpy()))
    assert torch.equal(back.nan_to_num(), expected.float().nan_to_num())


def test_sums_and_products_are_of_the_numbers() -> None:
    x, twice = torch.randn(16).bfloat16(), torch.empty(16, dtype=torch.bfloat16)
    rows, square = torch.randn(16, 16).bfloat16(), torch.empty(16, 16)
    with interpreted_bfloat16():
        _double[(1,)](x, twice, WIDE=True)
        _square[(1,)](rows, square)
    assert torch.equal(twice, x + x)
    torch.testing.assert_close(square, rows.float() @ rows.float().T)


@pytest.mark.parametrize(("kernel", "options"), [(_double, {"WIDE": False}), (_add_up, {})], ids=["two", "all"])
def test_sums_in_bfloat16_are_refused(kernel: Any, options: dict[str, bool]) -> None:
    x, out = torch.randn(16).bfloat16(), torch.empty(16, dtype=torch.bfloat16)
    with interpreted_bfloat16(), pytest.raises(Exception, match="a kernel computes in bfloat16"):
        kernel[(1,)](x, out, **options)


def test_kernels_take_bfloat16_inside_alone() -> None:
    x, vector = torch.ones(2, 16, dtype=torch.bfloat16), torch.ones(16)
    with interpreted_bfloat16():
        assert explain("layer_norm", x, vector, vector)["triton"] is None
    assert "bfloat16" in explain("layer_norm", x, vector, vector)["triton"]
