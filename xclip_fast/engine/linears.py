"""The linear layers of the engine: weights packed once, in the precision and for the library that runs the GEMM."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, partial
from math import isfinite
from threading import Lock
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.nn import functional

from xclip_fast import _extension, processor
from xclip_fast.ops import linear_quick_gelu
from xclip_fast.ops._quantize_rows import activate, quantize_rows

# two of the 255 or 127 steps are room for rounding: a byte that wraps around would be the worst of errors
EIGHT_BITS, SEVEN_BITS = 253, 125
_QNNPACK = Lock()  # the engine that PyTorch packs for is one of the process
_LEAST_RANGE = 1e-35  # of numbers that are not taken for zeros: the inverse of their step is a float32
_BYTES_AT_ONCE = 200_000  # numbers quantised together: in float32 they stay in the L2 cache
_WIDENED_AT_ONCE = 100_000  # weights widened at a time: they stay in the L2 cache too


class Linear(Protocol):
    """``x @ weight.T + bias`` of rows (M, K); ``add`` may modify ``stream`` in place: use the returned tensor."""

    name: str

    def __call__(self, x: Tensor) -> Tensor:
        """(M, N)."""

    def activated(self, x: Tensor) -> Tensor:
        """The activation of (M, N)."""

    def add(self, stream: Tensor, x: Tensor) -> Tensor:
        """``stream + x @ weight.T + bias``, (M, N)."""


class PlainLinear:
    """PyTorch's own GEMM, and the only one that takes every dtype and device.

    Args:
        weight: (N, K).
        bias: (N,), or None.
        activation: "silu", "quick_gelu" or "gelu", of ``activated``.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None, activation: str = "silu") -> None:
        self.name = str(weight.dtype).removeprefix("torch.")
        self.weight, self.bias, self.activation = weight, bias, activation

    def __call__(self, x: Tensor) -> Tensor:
        return functional.linear(x, self.weight, self.bias)

    def activated(self, x: Tensor) -> Tensor:
        if self.activation == "quick_gelu" and self.bias is not None:
            return linear_quick_gelu(x, self.weight, self.bias)
        return activate(self(x), self.activation)

    def add(self, stream: Tensor, x: Tensor) -> Tensor:
        stream = stream.addmm_(x, self.weight.t())
        return stream if self.bias is None else stream.add_(self.bias)


class OneDnnLinear:
    """oneDNN's GEMM with the weight in its own layout, bias, activation and residual in its epilogue.

    Args:
        weight: float32 or bfloat16 (N, K) on the CPU.
        bias, activation: as in ``PlainLinear``.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None, activation: str = "silu") -> None:
        self.name = str(weight.dtype).removeprefix("torch.")
        self.weight = torch.ops.mkldnn._reorder_linear_weight(weight)
        self.bias, self.activation = bias, activation

    def __call__(self, x: Tensor) -> Tensor:
        return torch.ops.mkldnn._linear_pointwise(x, self.weight, self.bias, "none", [], "")

    def activated(self, x: Tensor) -> Tensor:
        if self.activation == "quick_gelu":
            return activate(self(x), self.activation)
        post = ("swish", "") if self.activation == "silu" else ("gelu", "none")
        return torch.ops.mkldnn._linear_pointwise(x, self.weight, self.bias, post[0], [], post[1])

    def add(self, stream: Tensor, x: Tensor) -> Tensor:
        return torch.ops.mkldnn._linear_pointwise.binary(x, stream, self.weight, self.bias, "add")


class PackedLinear:
    """The extension's float32 GEMM of weights kept in their dtype, with bias, activation and residual in its epilogue.

    Args:
        weight: float32, bfloat16 or float16 (N, K) on the CPU.
        bias: float32 (N,), or None.
        activation: as in ``PlainLinear``.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None, activation: str = "silu") -> None:
        self.name = str(weight.dtype).removeprefix("torch.")
        self.weight, self.columns = torch.ops.xclip_fast_native.pack_linear(weight), len(weight)
        self.bias, self.activation = bias, activation

    def __call__(self, x: Tensor) -> Tensor:
        return self._run(x)

    def activated(self, x: Tensor) -> Tensor:
        if self.activation == "silu":
            return self._run(x, silu=True)
        return activate(self(x), self.activation)

    def add(self, stream: Tensor, x: Tensor) -> Tensor:
        return self._run(x, stream.contiguous())

    def _run(self, x: Tensor, stream: Tensor | None = None, *, silu: bool = False) -> Tensor:
        result: Tensor = torch.ops.xclip_fast_native.linear(
            x.contiguous(), self.weight, self.columns, self.bias, stream, silu
        )
        return result


class WidenedLinear:
    """PyTorch's GEMM in float32 of weights that stay in half precision and are widened block by block.

    Args:
        weight: bfloat16 or float16 (N, K) on the CPU.
        bias: float32 (N,), or None.
        activation: as in ``PlainLinear``.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None, activation: str = "silu") -> None:
        self.name = str(weight.dtype).removeprefix("torch.")
        self.weight, self.bias, self.activation = weight, bias, activation

    def __call__(self, x: Tensor) -> Tensor:
        result = x.new_empty(len(x), len(self.weight))
        rows = max(1, _WIDENED_AT_ONCE // self.weight.shape[1])
        for first in range(0, len(self.weight), rows):
            some = slice(first, first + rows)
            bias = None if self.bias is None else self.bias[some]
            result[:, some] = functional.linear(x, self.weight[some].float(), bias)
        return result

    def activated(self, x: Tensor) -> Tensor:
        return activate(self(x), self.activation)

    def add(self, stream: Tensor, x: Tensor) -> Tensor:
        return stream.add_(self(x))


class Int8Linear:
    """oneDNN's int8 GEMM: a scale for each output channel of the weight, one for all rows of a call.

    The rows of a call are those of one video, so the rest of a batch never changes its result. Where pairs of products
    are accumulated in 16 bits, which saturate, rows have seven bits.

    Args:
        weight: (N, K) on the CPU, in any precision.
        bias, activation: as in ``PlainLinear``.
        dtype: of the rows and the results, bfloat16 or float32.
    """

    name = "int8"

    def __init__(self, weight: Tensor, bias: Tensor | None, activation: str, dtype: torch.dtype) -> None:
        quantised, self.scale = int8_channels(weight)
        self.weight = torch.ops.onednn.qlinear_prepack(quantised, None)
        self.zero = torch.zeros(len(weight), dtype=torch.int32)
        self.bias = None if bias is None else bias.float()
        self.activation, self.dtype = activation, dtype
        self.steps = SEVEN_BITS if processor.sums_bytes_in_16_bits() else EIGHT_BITS

    def __call__(self, x: Tensor) -> Tensor:
        return self._run(x, "none", "")

    def activated(self, x: Tensor) -> Tensor:
        if self.activation == "quick_gelu":
            return activate(self(x), self.activation)
        return self._run(x, "swish", "") if self.activation == "silu" else self._run(x, "gelu", "none")

    def add(self, stream: Tensor, x: Tensor) -> Tensor:
        rows, scale, zero = int8_rows(x, self.steps)
        weight = self.weight, self.scale, self.zero
        result = 1.0, 0, self.dtype, 1.0, 0
        return torch.ops.onednn.qlinear_pointwise.binary(
            rows, scale, zero, *weight, stream, self.bias, *result, "sum", 1.0, "none", [], ""
        )

    def _run(self, x: Tensor, post: str, algorithm: str) -> Tensor:
        rows, scale, zero = int8_rows(x, self.steps)
        weight = self.weight, self.scale, self.zero
        return torch.ops.onednn.qlinear_pointwise(
            rows, scale, zero, *weight, self.bias, 1.0, 0, self.dtype, post, [], algorithm
        )


class QnnpackInt8Linear:
    """QNNPACK's int8 GEMM, for ARM: as ``Int8Linear``, but activation and residual are passes of their own.

    Args:
        weight: (N, K) on the CPU, in any precision.
        bias, activation, dtype: as in ``Int8Linear``.
    """

    name = "int8"

    def __init__(self, weight: Tensor, bias: Tensor | None, activation: str, dtype: torch.dtype) -> None:
        quantised, scale = int8_channels(weight)
        zeros = torch.zeros(len(weight), dtype=torch.int64)
        channels = torch._make_per_channel_quantized_tensor(quantised, scale.double(), zeros, 0)
        with _QNNPACK:
            # packed for the engine that is set now, and always run by it
            engine = torch.backends.quantized.engine
            torch.backends.quantized.engine = "qnnpack"
            try:
                self.packed = torch.ops.quantized.linear_prepack(channels, None if bias is None else bias.float())
            finally:
                torch.backends.quantized.engine = engine
        self.activation, self.dtype = activation, dtype

    def __call__(self, x: Tensor) -> Tensor:
        rows = x.float().contiguous()
        # quantised rows would hide what is not finite
        spoilt = rows.new_full((), float("nan")) if not rows.isfinite().all() else None
        result: Tensor = torch.ops.quantized.linear_dynamic(rows if spoilt is None else rows.nan_to_num(), self.packed)
        return (result if spoilt is None else result.fill_(spoilt)).to(self.dtype)

    def activated(self, x: Tensor) -> Tensor:
        return activate(self(x), self.activation)

    def add(self, stream: Tensor, x: Tensor) -> Tensor:
        return stream.add_(self(x))


class Float8Linear:
    """``torch._scaled_mm`` with a scale for each row of both sides, on Hopper and newer.

    ``multiply`` takes rows that the kernel of a norm or an activation has quantised; the other methods quantise them.

    Args:
        weight: (N, K) on the GPU, in any precision.
        bias, activation: as in ``PlainLinear``.
        dtype: of the rows and the results.
        fast: accumulate in the tensor cores, which keep fewer bits than float32, instead of adding their partial sums
            in float32 registers every few steps.
    """

    name = "float8_e4m3fn"

    def __init__(
        self, weight: Tensor, bias: Tensor | None, activation: str, dtype: torch.dtype, *, fast: bool = True
    ) -> None:
        self.weight, scale, _ = quantize_rows(weight.float())
        self.scale = scale.t().contiguous()
        self.bias = None if bias is None else bias.to(dtype)
        self.activation, self.dtype, self.fast = activation, dtype, fast

    def __call__(self, x: Tensor) -> Tensor:
        quantized, scale, _ = quantize_rows(x)
        return self.multiply(quantized, scale)

    def multiply(self, rows: Tensor, scale: Tensor) -> Tensor:
        """(M, N) from float8 rows (M, K) and their float32 scales (M, 1), as ``quantize_rows`` gives them."""
        return torch._scaled_mm(
            rows,
            self.weight.t(),
            scale_a=scale,
            scale_b=self.scale,
            bias=self.bias,
            out_dtype=self.dtype,
            use_fast_accum=self.fast,
        )

    def activated(self, x: Tensor) -> Tensor:
        return activate(self(x), self.activation)

    def add(self, stream: Tensor, x: Tensor) -> Tensor:
        return stream.add_(self(x))


def int8_channels(weight: Tensor) -> tuple[Tensor, Tensor]:
    """(N, K) as int8 and the float32 scale of each row; a row of zeros has the scale 1."""
    largest = weight.float().abs().amax(dim=1)
    scale = torch.where(largest > 0, largest / 127, torch.ones_like(largest))
    return (weight.float() / scale[:, None]).round().clamp(-127, 127).to(torch.int8), scale


def int8_rows(x: Tensor, steps: int = EIGHT_BITS) -> tuple[Tensor, float, int]:
    """Float32 or bfloat16 rows on the CPU as bytes, scale and zero point: ``x = scale * (bytes - zero)``.

    ``steps`` lie between the smallest number and the largest. A NaN or an infinity makes all of them NaN.
    """
    if _extension.refusal() is None:
        return torch.ops.xclip_fast_native.int8_rows(x.contiguous(), steps)
    low, high = (value.item() for value in x.aminmax())
    low, high = min(low, 0.0), max(high, 0.0)
    scale = 1.0 if high - low < _LEAST_RANGE else (high - low) / steps
    zero = round(-low / scale) + 1 if isfinite(scale) else 0
    rows = torch.empty(x.shape, dtype=torch.int8)
    size = max(1, _BYTES_AT_ONCE // x.shape[1])
    for part, result in zip(x.split(size), rows.split(size), strict=True):
        exact = part.to(torch.float32, copy=True)
        torch.add(exact.new_tensor(zero - 128), exact, alpha=1 / scale, out=exact)
        # by way of signed bytes: PyTorch's cast to unsigned ones is ten times slower
        result.copy_(exact.round_())
    return rows.view(torch.uint8).bitwise_xor_(128), scale, zero


def cpu_linear(weight: Tensor, bias: Tensor | None, activation: str, dtype: torch.dtype) -> Linear:
    """The fastest linear layer on this processor for rows in float32 or, where it has such GEMMs, half precision.

    Args:
        weight: (N, K) on the CPU in the dtype that it is kept in.
        bias: (N,) in the dtype of the rows, or None.
        activation: as in ``PlainLinear``.
        dtype: of rows and results: the weight's, or float32.
    """
    # oneDNN is faster where it has AVX-512, and slower or equal where it has AVX2 alone
    extension = weight.dtype is not dtype or "avx512" not in processor.onednn_features()
    if dtype is torch.float32 and extension and _extension.linear_refusal() is None:
        return PackedLinear(weight, bias, activation)
    if weight.dtype is not dtype:
        return WidenedLinear(weight, bias, activation)
    return OneDnnLinear(weight, bias, activation) if onednn_packs(dtype) else PlainLinear(weight, bias, activation)


@cache
def onednn_packs(dtype: torch.dtype) -> bool:
    """Whether this processor and this PyTorch run ``OneDnnLinear`` in a dtype; found by running a small one."""
    if not torch.backends.mkldnn.is_available() or dtype not in (torch.float32, torch.bfloat16):
        return False
    if dtype is torch.bfloat16 and not torch.ops.mkldnn._is_mkldnn_bf16_supported():
        return False
    x = torch.arange(32.0).view(4, 8).to(dtype) / 8
    weight = torch.arange(-64.0, 64.0).view(16, 8).to(dtype) / 64
    return _agrees(OneDnnLinear, PlainLinear(weight, torch.arange(16.0).to(dtype)), x)


@cache
def int8_linear() -> type[Int8Linear] | type[QnnpackInt8Linear] | None:
    """The int8 layer that this processor and PyTorch compute correctly, found by running large sums; else None."""
    # the largest sums there are, and some of no pattern
    x = torch.ones(64, 64) - torch.arange(64.0).remainder(7)[:, None] / 8
    weight = torch.ones(64, 64) - torch.eye(64).cumsum(0) / 2
    plain = PlainLinear(weight, torch.ones(64))
    # on ARM oneDNN is right, and a thousand times slower
    kinds: tuple[Any, ...] = (Int8Linear,) if processor.X86 else (QnnpackInt8Linear,)
    return next((kind for kind in kinds if _agrees(partial(kind, dtype=torch.float32), plain, x)), None)


def _agrees(make: Callable[..., Linear], plain: PlainLinear, x: Tensor) -> bool:
    """Whether another layer agrees with the plain one; False if it cannot run."""
    weight, bias = plain.weight, plain.bias
    stream = torch.ones_like(plain(x))
    for activation in ("silu", "gelu"):
        plain.activation = activation
        wanted = plain(x), plain.activated(x), plain.add(stream.clone(), x)
        try:
            linear = make(weight, bias, activation=activation)
            found = linear(x), linear.activated(x), linear.add(stream.clone(), x)
        except (AttributeError, NotImplementedError, RuntimeError, TypeError):
            return False
        for one, other in zip(found, wanted, strict=True):
            if not (one.float() - other.float()).norm() <= 0.02 * other.float().norm():
                return False
    return True
