"""The engine's products against plain PyTorch, and the arithmetic of bytes."""

from __future__ import annotations

from math import isfinite

import pytest
import torch
from numerics import relative_error
from torch import Tensor
from torch.nn.functional import linear

from xclip_fast import _extension
from xclip_fast.engine import packing, products
from xclip_fast.engine.packing import CPU_REWRITES, CastProduct, Packing
from xclip_fast.engine.products import (
    Int8Product,
    OneDnnProduct,
    PlainProduct,
    int8_channels,
    int8_rows,
    onednn_int8,
    onednn_packs,
)
from xclip_fast.ops._quantize_rows import activate

CPU = torch.device("cpu")
SIZES = [(1, 64, 64), (7, 48, 80), (130, 96, 32)]


def operands(rows: int, inner: int, columns: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    x, weight = torch.randn(rows, inner) + 0.3, torch.randn(columns, inner) / inner**0.5
    return x.to(dtype), weight.to(dtype), torch.randn(columns).to(dtype), torch.randn(rows, columns).to(dtype)


def compare(product: products.Product, operand: tuple[Tensor, ...], activation: str, limit: float) -> None:
    x, weight, bias, stream = (tensor.double() for tensor in operand)
    truth = linear(x, weight, bias)
    assert relative_error(product(operand[0]), truth) < limit
    assert relative_error(product.activated(operand[0]), activate(truth.clone(), activation)) < limit
    assert relative_error(product.add(operand[3].clone(), operand[0]), stream + truth) < limit


@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("activation", ["silu", "quick_gelu", "gelu"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_products_agree(size: tuple[int, int, int], activation: str, dtype: torch.dtype) -> None:
    operand = operands(*size, dtype)
    limit = 1e-6 if dtype is torch.float32 else 8e-3
    compare(PlainProduct(*operand[1:3], activation), operand, activation, limit)
    if onednn_packs(dtype):
        compare(OneDnnProduct(*operand[1:3], activation), operand, activation, limit)
    wide = [x.float() for x in operand[1:3]]
    compare(CastProduct(PlainProduct(*wide, activation), torch.float32, dtype), operand, activation, limit)
    if onednn_int8():
        compare(Int8Product(*operand[1:3], activation, dtype), operand, activation, 0.04)


def test_products_without_bias() -> None:
    x, weight, _, stream = operands(9, 32, 48, torch.float32)
    made = [PlainProduct(weight, None)]
    made += [OneDnnProduct(weight, None)] if onednn_packs(torch.float32) else []
    for product in made:
        torch.testing.assert_close(product(x), linear(x, weight))
        torch.testing.assert_close(product.add(stream.clone(), x), stream + linear(x, weight))
    if onednn_int8():
        assert relative_error(Int8Product(weight, None, "silu", torch.float32)(x), linear(x, weight)) < 0.04


@pytest.fixture(params=["extension", "torch"])
def without_or_with_extension(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Bytes as the extension makes them, and as PyTorch does."""
    if request.param == "torch":
        monkeypatch.setattr(_extension, "refusal", lambda: "not now")
    elif _extension.refusal():
        pytest.skip(_extension.refusal())


@pytest.mark.usefixtures("without_or_with_extension")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", [(1, 1), (33, 20), (70, 1000)], ids=str)
@pytest.mark.parametrize("low, high", [(-3.0, 3.0), (-0.2, 9.0), (0.5, 2.0), (-2.0, -1.0), (-1e30, 1e32)])  # noqa: PT006
def test_bytes_are_within_half_a_step(low: float, high: float, shape: tuple[int, int], dtype: torch.dtype) -> None:
    x = (torch.rand(shape) * (high - low) + low).to(dtype)
    x[-1, -1], x[0, 0] = low, high
    rows, scale, zero = int8_rows(x)
    assert rows.dtype is torch.uint8
    assert 0 <= zero <= 255
    assert scale <= (max(x.max().item(), 0) - min(x.min().item(), 0)) / 252
    assert (scale * (rows.double() - zero) - x.double()).abs().max() <= 0.5001 * scale


@pytest.mark.usefixtures("without_or_with_extension")
@pytest.mark.parametrize("size", [0.0, 1e-42, -1e-36])
def test_bytes_of_zeros_and_of_numbers_next_to_them(size: float) -> None:
    rows, scale, zero = int8_rows(torch.full((3, 4), size))
    assert (scale * (rows.float() - zero) == 0).all()
    x = torch.linspace(-1.0, 1.0, 12).view(3, 4) * 1e-34
    rows, scale, zero = int8_rows(x)
    assert (scale * (rows.double() - zero) - x.double()).abs().max() <= 0.5001 * scale


@pytest.mark.usefixtures("without_or_with_extension")
def test_bytes_of_strided_rows() -> None:
    x = torch.randn(8, 30)
    for part in (x[::2], x[:, ::3], x.t()):
        rows, scale, zero = int8_rows(part)
        assert (scale * (rows.double() - zero) - part.double()).abs().max() <= 0.5001 * scale


@pytest.mark.usefixtures("without_or_with_extension")
@pytest.mark.parametrize("place", [(0, 0), (69, 999), (35, 1)], ids=str)
def test_bytes_of_bad_numbers(place: tuple[int, int]) -> None:
    for bad in (float("nan"), float("inf"), -float("inf")):
        x = torch.ones(70, 1000)
        x[place] = bad
        assert not isfinite(int8_rows(x)[1])
        if onednn_int8():
            product = Int8Product(torch.eye(1000), None, "silu", torch.float32)
            assert not product(x).isfinite().any()


def test_channels_are_within_half_a_step() -> None:
    weight = torch.randn(5, 40, dtype=torch.float64) * torch.tensor([1e-3, 1.0, 50.0, 0.0, 1.0])[:, None]
    quantised, scale = int8_channels(weight)
    assert quantised.dtype is torch.int8
    assert quantised.abs().amax(dim=1).tolist() == [127, 127, 127, 0, 127]
    assert ((quantised * scale[:, None] - weight).abs() <= 0.5001 * scale[:, None]).all()


def test_engine_without_onednn(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packing, "onednn_packs", lambda dtype: False)
    x, weight, bias, _ = operands(5, 32, 16, torch.float32)
    product = Packing(CPU, torch.float32, CPU_REWRITES).product(weight.double(), bias.double())
    assert isinstance(product, PlainProduct)
    torch.testing.assert_close(product(x), linear(x, weight, bias))


def test_detection_refuses_a_product_that_is_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    assert not onednn_packs.__wrapped__(torch.float64)
    monkeypatch.setattr(OneDnnProduct, "__call__", lambda self, x: torch.zeros(4, 16))
    assert not onednn_packs.__wrapped__(torch.float32)
    monkeypatch.setattr(Int8Product, "add", lambda self, stream, x: stream)
    assert not onednn_int8.__wrapped__()


def test_detection_refuses_what_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(*_: object) -> None:
        raise AttributeError("'_OpNamespace' object has no attribute '_reorder_linear_weight'")

    monkeypatch.setattr(OneDnnProduct, "__init__", missing)
    assert not onednn_packs.__wrapped__(torch.float32)
