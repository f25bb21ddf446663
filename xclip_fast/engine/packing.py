"""What the engine computes otherwise than the model: the exact rewrites, and how weights become products."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, TypeVar

import torch
from torch import Tensor

from xclip_fast.engine.products import (
    Float8Product,
    PlainProduct,
    Product,
    cpu_product,
    int8_product,
)
from xclip_fast.ops.linear_quick_gelu import SLOPE

REWRITES: Mapping[str, str] = MappingProxyType(
    {
        "pixels": "normalisation in the patch weights: bytes go straight into the first product",
        "class_token": "the class token behind the first norm is a constant: no row of it is added or normed",
        "norms": "scale and shift of a norm in the product behind it: a norm reads and applies no vectors",
        "silu": "1.702 of QuickGELU in the weights: SiLU, which oneDNN runs in a product's last pass",
        "scores": "the scale of the attention scores in the weights of the queries: one pass over the scores less",
        "first_message": "the first block's message is a constant: its cross-frame attention is not computed",
        "message_product": "the message and what is behind its norms (on the CPU: behind the first) from one product",
        "stream": "the residual stream without biases: a branch is one product that adds in place",
        "class_row": "features without patches: the last block mixes and transforms the class rows alone",
        "patch_mean": "mean over frames before the patches' projection: T times less work, no (B, T, N, E) tensor",
        "mit_mean": "mean over frames before the last product of MIT: T times less work",
        "text_length": "texts cut behind the longest end of text: about 10 of 77 columns are computed",
        "prompt_query": "the first query of the prompts once per class set, not once per video",
    }
)
# measured on the CPU: no gain from the merged product, and oneDNN adds biases for nothing
CPU_REWRITES = frozenset(REWRITES) - {"stream", "message_product"}
# on a GPU kernels have these in other ways: norms read their vectors, MIT's last launch pools
CUDA_REWRITES = frozenset(REWRITES) - {"norms", "silu", "scores", "mit_mean"}
PRODUCTS = ("qkv", "out", "fc", "projection")  # the large ones of a block, which may be narrow

Key = TypeVar("Key", bound=Hashable)
Value = TypeVar("Value")


@dataclass(frozen=True)
class Packing:
    """How weights become products.

    Attributes:
        device: where they run.
        dtype: of the stream and of every product that is not narrow.
        rewrites: those in force; all but tests leave the device's own.
        narrow: "int8" or "float8_e4m3fn" for the large products of the blocks, or nothing.
        stored: what weights are kept in where products of it are slower than in ``dtype``, which is then float32.
        kept: places (see ``product``) whose narrow product is not used, and the dtype used there instead.
        smoothing: for places behind a norm, powers of two (K,) in float64: the norm divides its channels by them and
            the weights are multiplied, which is exact and leaves no channel so large that the others lose their steps
            (SmoothQuant, arXiv:2211.10438).
    """

    device: torch.device
    dtype: torch.dtype
    rewrites: frozenset[str]
    narrow: str | None = None
    stored: torch.dtype | None = None
    kept: dict[str, torch.dtype] = field(default_factory=dict)
    smoothing: dict[str, Tensor] = field(default_factory=dict)

    def product(self, weight: Tensor, bias: Tensor | None, activation: str = "silu", *, place: str = "") -> Product:
        """A product of float64 weights (N, K); one with a place, such as ``blocks.3.fc``, may be narrow."""
        dtype = self.kept.get(place, self.dtype)
        if self.narrow and place and place not in self.kept:
            moved = weight.to(self.device), None if bias is None else bias.to(self.device)
            narrow: Any = int8_product() if self.narrow == "int8" else Float8Product
            made: Product = narrow(*moved, activation, self.dtype)
            return made
        stored = dtype if self.stored is None or place in self.kept else self.stored
        cast = self.tensor(weight, stored), None if bias is None else self.tensor(bias, dtype)
        on_cpu = self.device.type == "cpu"
        product = cpu_product(*cast, activation, dtype) if on_cpu else PlainProduct(*cast, activation)
        return product if dtype is self.dtype else CastProduct(product, dtype, self.dtype)

    def tensor(self, x: Tensor, dtype: torch.dtype | None = None) -> Tensor:
        """A copy on the device, in the stream's dtype unless told otherwise."""
        return x.detach().to(self.device, dtype or self.dtype, copy=True).contiguous()

    def once(self, values: dict[Key, Value], key: Key, make: Callable[[], Value]) -> Value:
        """The value of a key, made once for all threads and streams: a captured graph reads its tensors in place."""
        if key not in values:
            made = make()
            self.settle()
            values.setdefault(key, made)
        return values[key]

    def settle(self) -> None:
        """Wait for what was made on this stream: whoever finds it may read it on another."""
        if self.device.type == "cuda":
            torch.cuda.current_stream(self.device).synchronize()

    def vectors(self, norm: Any, *, place: str = "") -> tuple[Tensor | None, Tensor | None]:
        """Weight and bias of a norm; nothing where they are in the product behind it, which has the place."""
        share = self.smoothing.get(place)
        if "norms" in self.rewrites:
            return None if share is None else self.tensor(1 / share), None
        weight, bias = exact(norm.weight), exact(norm.bias)
        if share is not None:
            weight, bias = weight / share, bias / share
        return self.tensor(weight), self.tensor(bias)

    def behind(self, norm: Any, weight: Tensor, bias: Tensor, *, place: str = "") -> tuple[Tensor, Tensor]:
        """Float64 weight and bias of the product behind a norm."""
        weight, bias = exact(weight), exact(bias)
        if "norms" in self.rewrites:
            weight, bias = weight * exact(norm.weight), bias + weight @ exact(norm.bias)
        share = self.smoothing.get(place)
        return weight if share is None else weight * share, bias

    def perceptron(
        self, fc: Any, projection: Any, norm: Any, activation: str, *, place: str = ""
    ) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor], str]:
        """Float64 (weight, bias) of both products of a perceptron behind a norm, and its activation."""
        weight, bias = self.behind(norm, fc.weight, fc.bias, place=place)
        last = exact(projection.weight)
        if activation == "quick_gelu" and "silu" in self.rewrites:
            return (SLOPE * weight, SLOPE * bias), (last / SLOPE, exact(projection.bias)), "silu"
        return (weight, bias), (last, exact(projection.bias)), activation


class CastProduct:
    """A product in another dtype than the stream's, where the stream's has not range or precision enough.

    Hidden rows stay in that dtype: the two products of a perceptron are cast together.
    """

    def __init__(self, product: Product, inner: torch.dtype, outer: torch.dtype) -> None:
        self.name, self.product, self.inner, self.outer = product.name, product, inner, outer

    def __call__(self, x: Tensor) -> Tensor:
        return self.product(x.to(self.inner)).to(self.outer)

    def activated(self, x: Tensor) -> Tensor:
        return self.product.activated(x.to(self.inner))

    def add(self, stream: Tensor, x: Tensor) -> Tensor:
        return self.product.add(stream.to(self.inner), x.to(self.inner)).to(self.outer)


def place_of(block: int, product: str) -> str:
    """The name of one of the ``PRODUCTS`` of a block."""
    return f"blocks.{block}.{product}"


def exact(x: Tensor) -> Tensor:
    """A weight in float64 on the CPU, where the rewrites are computed."""
    return x.detach().to("cpu", torch.float64)
