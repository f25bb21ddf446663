"""The GEMMs of the engine against plain PyTorch, and the arithmetic of bytes."""

from __future__ import annotations

from math import isfinite

import pytest
import torch
from numerics import relative_error
from torch import Tensor
from torch.nn.functional import linear

from xclip_fast import _extension, processor
from xclip_fast.engine import linears
from xclip_fast.engine.linears import (
    EIGHT_BITS,
    SEVEN_BITS,
    Int8Linear,
    OneDnnLinear,
    PackedLinear,
    PlainLinear,
    QnnpackInt8Linear,
    WidenedLinear,
    cpu_linear,
    int8_channels,
    int8_linear,
    int8_rows,
    onednn_packs,
)
from xclip_fast.engine.packing import CPU_REWRITES, CastLinear, Packing
from xclip_fast.ops._quantize_rows import activate

CPU = torch.device("cpu")
INT8_LINEARS = ([Int8Linear] if processor.X86 and int8_linear() else []) + (
    [QnnpackInt8Linear] if "qnnpack" in torch.backends.quantized.supported_engines else []
)
KEPT_LINEARS = [WidenedLinear] + ([] if _extension.linear_refusal() else [PackedLinear])
SIZES = [(1, 64, 64), (7, 48, 80), (130, 96, 32)]


def operands(rows: int, inner: int, columns: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    x, weight = torch.randn(rows, inner) + 0.3, torch.randn(columns, inner) / inner**0.5
    return x.to(dtype), weight.to(dtype), torch.randn(columns).to(dtype), torch.randn(rows, columns).to(dtype)


def compare(layer: linears.Linear, operand: tuple[Tensor, ...], activation: str, limit: float) -> None:
    x, weight, bias, stream = (tensor.double() for tensor in operand)
    truth = linear(x, weight, bias)
    assert relative_error(layer(operand[0]), truth) < limit
    assert relative_error(layer.activated(operand[0]), activate(truth.clone(), activation)) < limit
    assert relative_error(layer.add(operand[3].clone(), operand[0]), stream + truth) < limit


@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("activation", ["silu", "quick_gelu", "gelu"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_linears_agree(size: tuple[int, int, int], activation: str, dtype: torch.dtype) -> None:
    operand = operands(*size, dtype)
    limit = 1e-6 if dtype is torch.float32 else 8e-3
    compare(PlainLinear(*operand[1:3], activation), operand, activation, limit)
    if onednn_packs(dtype):
        compare(OneDnnLinear(*operand[1:3], activation), operand, activation, limit)
    wide = [x.float() for x in operand[1:3]]
    compare(CastLinear(PlainLinear(*wide, activation), torch.float32, dtype), operand, activation, limit)
    for narrow in INT8_LINEARS:
        compare(narrow(*operand[1:3], activation, dtype), operand, activation, 0.04)
    # half precision is kept, and multiplied in float32
    for kept in KEPT_LINEARS if dtype is torch.float32 else ():
        compare(kept(*operand[1:3], activation), operand, activation, 1e-6)


@pytest.mark.skipif(_extension.linear_refusal() is not None, reason="the extension has no GEMM here")
@pytest.mark.parametrize("inner", [768, 3072])
def test_long_sums_beside_large_terms_round_seldom(inner: int) -> None:
    weight = (torch.randn(96, inner) / inner**0.5).bfloat16()
    x = torch.randn(50, inner)
    x[:, [3, 77, 400]] *= 60
    exact = x.double() @ weight.double().T
    layer = PackedLinear(weight, None)
    # sums of a few hundred terms each, added up
    assert (layer(x) - exact).norm() <= 8 * 2**-24 * exact.norm()
    stream = 1000 * torch.randn(50, 96)
    truth = stream.double() + exact
    found = layer.add(stream.clone(), x)
    # it is rounded at the size of the stream for each of these sums, not for each term
    assert (found - truth).norm() <= 3 * 2**-24 * truth.norm()


@pytest.mark.parametrize("size", [*SIZES, (205, 300, 33), (5, 257, 1), (0, 16, 16)], ids=str)
@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("kind", [PackedLinear, WidenedLinear], ids=lambda kind: kind.__name__)
def test_weights_are_kept_in_their_dtype_and_multiplied_in_float32(
    kind: type, stored: torch.dtype, size: tuple[int, int, int]
) -> None:
    if kind is PackedLinear and (reason := _extension.linear_refusal()):
        pytest.skip(reason)
    x, weight, bias, stream = operands(*size, torch.float32)
    layer = kind(weight.to(stored), bias, "silu")
    assert layer.name == str(stored).removeprefix("torch.")
    assert layer.weight.dtype is stored
    assert layer.weight.numel() < weight.numel() + 16 * weight.shape[1]
    if len(x):
        compare(layer, (x, weight.to(stored).float(), bias, stream), "silu", 1e-6)
    assert layer(x).shape == stream.shape
    strided = torch.randn(*reversed(x.shape)).t()
    torch.testing.assert_close(layer(strided), layer(strided.contiguous()), rtol=1e-6, atol=2e-6)


def test_weights_widened_in_parts_meet_their_biases(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(linears, "_WIDENED_AT_ONCE", 7 * 48)
    x, weight, bias, stream = operands(5, 48, 33, torch.float32)
    layer = WidenedLinear(weight.bfloat16(), bias, "silu")
    compare(layer, (x, weight.bfloat16().float(), bias, stream), "silu", 1e-6)


def test_bad_numbers_of_a_row_spoil_that_row_of_a_packed_linear() -> None:
    if reason := _extension.linear_refusal():
        pytest.skip(reason)
    x, weight, bias, stream = operands(14, 300, 40, torch.float32)
    layer = PackedLinear(weight, bias)
    whole = layer.activated(x)
    for bad in (float("nan"), float("inf"), -float("inf")):
        spoilt = x.clone()
        spoilt[7, 299] = bad
        found = layer.activated(spoilt)
        assert not found[7].isfinite().all()
        others = torch.arange(14) != 7
        assert torch.equal(found[others], whole[others])
        assert not layer.add(stream.clone(), spoilt)[7].isfinite().any()


@pytest.mark.parametrize("x", [-300.0, -126.5, -88.0, -20.0, -1e-30, 0.0, 1e-30, 0.7, 88.0, 300.0])
def test_silu_of_a_packed_linear_over_its_range(x: float) -> None:
    if reason := _extension.linear_refusal():
        pytest.skip(reason)
    found = PackedLinear(torch.ones(16, 1), None).activated(torch.full((1, 1), x))
    truth = torch.nn.functional.silu(torch.full((1, 16), x, dtype=torch.float64))
    assert (found - truth).abs().max() <= 2.0**-22 * abs(truth[0, 0]) + 1e-37


@pytest.mark.parametrize(
    ("found", "stored", "kind"),
    [
        (("avx2",), torch.float32, PackedLinear),
        (("avx2", "avx512"), torch.float32, OneDnnLinear),
        (("avx2", "avx512"), torch.bfloat16, PackedLinear),
        ((), torch.float16, PackedLinear),
    ],
    ids=str,
)
def test_the_linear_is_chosen_by_the_processor(
    found: tuple[str, ...], stored: torch.dtype, kind: type, monkeypatch: pytest.MonkeyPatch
) -> None:
    if (reason := _extension.linear_refusal()) or not onednn_packs(torch.float32):
        pytest.skip(reason or "no oneDNN")
    monkeypatch.setattr(processor, "onednn_features", lambda: found)
    weight = torch.ones(16, 8, dtype=stored)
    assert type(cpu_linear(weight, None, "silu", torch.float32)) is kind
    monkeypatch.setattr(_extension, "linear_refusal", lambda: "not now")
    plain = OneDnnLinear if stored is torch.float32 else WidenedLinear
    assert type(cpu_linear(weight, None, "silu", torch.float32)) is plain


def test_linears_without_bias() -> None:
    x, weight, _, stream = operands(9, 32, 48, torch.float32)
    made = [PlainLinear(weight, None)]
    made += [OneDnnLinear(weight, None)] if onednn_packs(torch.float32) else []
    for layer in made:
        torch.testing.assert_close(layer(x), linear(x, weight))
        torch.testing.assert_close(layer.add(stream.clone(), x), stream + linear(x, weight))
    for narrow in INT8_LINEARS:
        assert relative_error(narrow(weight, None, "silu", torch.float32)(x), linear(x, weight)) < 0.04


@pytest.mark.parametrize("kind", INT8_LINEARS, ids=lambda kind: kind.__name__)
def test_the_largest_sums_of_bytes_do_not_saturate(kind: type) -> None:
    # all bytes of rows and weights at the end of their range: pairs of products beyond 16 bits
    x, weight = torch.ones(8, 512), torch.ones(32, 512)
    x[0, 0], weight[1] = 0.0, -1.0
    found = kind(weight, None, "silu", torch.float32)(x)
    assert relative_error(found, linear(x, weight)) < 0.01


def test_rows_have_seven_bits_where_pairs_are_added_in_16(monkeypatch: pytest.MonkeyPatch) -> None:
    for narrow, steps in ((True, SEVEN_BITS), (False, EIGHT_BITS)):
        monkeypatch.setattr(processor, "sums_bytes_in_16_bits", lambda narrow=narrow: narrow)
        if Int8Linear in INT8_LINEARS:
            assert Int8Linear(torch.eye(16), None, "silu", torch.float32).steps == steps
        rows, scale, _ = int8_rows(torch.linspace(-1, 3, 4000).view(4, 1000), steps)
        assert rows.max() <= steps + 2
        assert 4 / scale == pytest.approx(steps)
    # of seven bits two products fit
    assert 2 * (SEVEN_BITS + 2) * 127 < 2**15 < 2 * 255 * 127


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
        for narrow in INT8_LINEARS:
            assert not narrow(torch.eye(1000), None, "silu", torch.float32)(x).isfinite().any()


def test_channels_are_within_half_a_step() -> None:
    weight = torch.randn(5, 40, dtype=torch.float64) * torch.tensor([1e-3, 1.0, 50.0, 0.0, 1.0])[:, None]
    quantised, scale = int8_channels(weight)
    assert quantised.dtype is torch.int8
    assert quantised.abs().amax(dim=1).tolist() == [127, 127, 127, 0, 127]
    assert ((quantised * scale[:, None] - weight).abs() <= 0.5001 * scale[:, None]).all()


def test_engine_without_onednn(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(linears, "onednn_packs", lambda dtype: False)
    monkeypatch.setattr(_extension, "linear_refusal", lambda: "not now")
    x, weight, bias, _ = operands(5, 32, 16, torch.float32)
    layer = Packing(CPU, torch.float32, CPU_REWRITES).linear(weight.double(), bias.double())
    assert isinstance(layer, PlainLinear)
    torch.testing.assert_close(layer(x), linear(x, weight, bias))


def test_detection_refuses_a_linear_that_is_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    assert not onednn_packs.__wrapped__(torch.float64)
    monkeypatch.setattr(OneDnnLinear, "__call__", lambda self, x: torch.zeros(4, 16))
    assert not onednn_packs.__wrapped__(torch.float32)
    for kind in (Int8Linear, QnnpackInt8Linear):
        monkeypatch.setattr(kind, "add", lambda self, stream, x: stream)
    assert int8_linear.__wrapped__() is None


def test_int8_on_arm_is_that_of_qnnpack(monkeypatch: pytest.MonkeyPatch) -> None:
    if QnnpackInt8Linear not in INT8_LINEARS:
        pytest.skip("this PyTorch has no QNNPACK")
    engine = torch.backends.quantized.engine
    monkeypatch.setattr(processor, "X86", False)
    assert int8_linear.__wrapped__() is QnnpackInt8Linear
    assert torch.backends.quantized.engine == engine


def test_detection_refuses_what_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(*_: object) -> None:
        raise AttributeError("'_OpNamespace' object has no attribute '_reorder_linear_weight'")

    monkeypatch.setattr(OneDnnLinear, "__init__", missing)
    assert not onednn_packs.__wrapped__(torch.float32)
