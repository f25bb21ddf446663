"""Exact rewrites, and how weights become GEMMs."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.nn.functional import layer_norm

from xclip_fast.engine.linears import (
    Float8Linear,
    Linear,
    PlainLinear,
    cpu_linear,
    int8_linear,
)
from xclip_fast.ops.linear_quick_gelu import SLOPE

REWRITES: Mapping[str, str] = MappingProxyType(
    {
        "pixels": "normalisation in the patch weights: bytes go straight into the first GEMM",
        "class_token": "the class token after the first norm is a constant: no row of it is added or normed",
        "norms": "scale and shift of a norm in the GEMM after it: a norm reads and applies no vectors",
        "silu": "1.702 of QuickGELU in the weights: SiLU, which oneDNN runs in a GEMM's epilogue",
        "scores": "the scale of the attention scores in the weights of the queries: one pass over the scores less",
        "first_message": "the first block's message is a constant: its cross-frame attention is not computed",
        "message_product": "the message and what follows its norms (on the CPU: the first) from one GEMM",
        "stream": "the residual stream without biases: a branch is one GEMM that adds in place",
        "class_row": "features without patches: the last block mixes and transforms the class rows alone",
        "patch_mean": "mean over frames before the patches' projection: T times less work, no (B, T, N, E) tensor",
        "mit_mean": "mean over frames before the last GEMM of MIT: T times less work",
        "text_length": "texts cut after the longest end of text: about 10 of 77 columns are computed",
        "prompt_query": "the first query of the prompts once per class set, not once per video",
    }
)
# measured on the CPU: no gain from the merged GEMM, and oneDNN adds biases at no cost
CPU_REWRITES = frozenset(REWRITES) - {"stream", "message_product"}
# on a GPU kernels have these in other ways: norms read their vectors, MIT's last launch pools
CUDA_REWRITES = frozenset(REWRITES) - {"norms", "silu", "scores", "mit_mean"}
GEMMS = ("qkv", "out", "fc", "projection")  # the large ones of a block, which may run in int8 or float8

Key = TypeVar("Key", bound=Hashable)
Value = TypeVar("Value")
Made = TypeVar("Made", bound="PackedBlock")


@dataclass(frozen=True)
class Packing:
    """How weights become GEMMs.

    Attributes:
        device: where they run.
        dtype: of the residual stream and of every GEMM that is not narrow.
        rewrites: those in force; all but tests leave the device's own.
        narrow: "int8" or "float8_e4m3fn" for the large GEMMs of the blocks, or None.
        stored: the dtype weights are kept in where the processor has no GEMM in it; ``dtype`` is then float32.
        fallback: the dtype of places (see ``linear``) whose GEMM errs beyond its budget.
        smoothing: for places after a norm, powers of two (K,) in float64 by which outlier channels are scaled into the
            weights (SmoothQuant, arXiv:2211.10438), calibrated on ``clips``: the norm divides, the weights multiply.
    """

    device: torch.device
    dtype: torch.dtype
    rewrites: frozenset[str]
    narrow: str | None = None
    stored: torch.dtype | None = None
    fallback: dict[str, torch.dtype] = field(default_factory=dict)
    smoothing: dict[str, Tensor] = field(default_factory=dict)

    def linear(self, weight: Tensor, bias: Tensor | None, activation: str = "silu", *, place: str = "") -> Linear:
        """A linear layer of float64 weights (N, K); one with a place, such as ``blocks.3.fc``, may be narrow."""
        dtype = self.fallback.get(place, self.dtype)
        if self.narrow and place and place not in self.fallback:
            moved = weight.to(self.device), None if bias is None else bias.to(self.device)
            narrow: Any = int8_linear() if self.narrow == "int8" else Float8Linear
            made: Linear = narrow(*moved, activation, self.dtype)
            return made
        stored = dtype if self.stored is None or place in self.fallback else self.stored
        cast = self.tensor(weight, stored), None if bias is None else self.tensor(bias, dtype)
        on_cpu = self.device.type == "cpu"
        linear = cpu_linear(*cast, activation, dtype) if on_cpu else PlainLinear(*cast, activation)
        return linear if dtype is self.dtype else CastLinear(linear, dtype, self.dtype)

    def tensor(self, x: Tensor, dtype: torch.dtype | None = None) -> Tensor:
        """A copy on the device, by default in the dtype of the residual stream."""
        return x.detach().to(self.device, dtype or self.dtype, copy=True).contiguous()

    def once(self, values: dict[Key, Value], key: Key, make: Callable[[], Value]) -> Value:
        """The value of a key, made once for all threads and CUDA streams: captured graphs read its tensors in place."""
        if key not in values:
            made = make()
            self.settle()
            values.setdefault(key, made)
        return values[key]

    def settle(self) -> None:
        """Wait for what was made on this CUDA stream, as it may be read on another."""
        if self.device.type == "cuda":
            torch.cuda.current_stream(self.device).synchronize()

    def vectors(self, norm: Any, *, place: str = "") -> tuple[Tensor | None, Tensor | None]:
        """Weight and bias of a norm, None where they are folded into the GEMM after it, which has the place."""
        share = self.smoothing.get(place)
        if "norms" in self.rewrites:
            return None if share is None else self.tensor(1 / share), None
        weight, bias = exact(norm.weight), exact(norm.bias)
        if share is not None:
            weight, bias = weight / share, bias / share
        return self.tensor(weight), self.tensor(bias)

    def after_norm(self, norm: Any, weight: Tensor, bias: Tensor, *, place: str = "") -> tuple[Tensor, Tensor]:
        """Float64 weight and bias of the GEMM after a norm."""
        weight, bias = exact(weight), exact(bias)
        if "norms" in self.rewrites:
            weight, bias = weight * exact(norm.weight), bias + weight @ exact(norm.bias)
        share = self.smoothing.get(place)
        return weight if share is None else weight * share, bias

    def mlp(
        self, fc: Any, projection: Any, norm: Any, activation: str, *, place: str = ""
    ) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor], str]:
        """Float64 (weight, bias) of both GEMMs of an MLP after a norm, and its activation."""
        weight, bias = self.after_norm(norm, fc.weight, fc.bias, place=place)
        last = exact(projection.weight)
        if activation == "quick_gelu" and "silu" in self.rewrites:
            return (SLOPE * weight, SLOPE * bias), (last / SLOPE, exact(projection.bias)), "silu"
        return (weight, bias), (last, exact(projection.bias)), activation


@dataclass
class Norm:
    """A layer norm; its vectors are None where they are folded into the GEMM after it."""

    weight: Tensor | None
    bias: Tensor | None
    eps: float

    def __call__(self, x: Tensor) -> Tensor:
        return layer_norm(x, x.shape[-1:], self.weight, self.bias, self.eps)


@dataclass
class PackedBlock:
    """Norms and GEMMs of one ``reference.transformer.Block``; each user runs them in its own way."""

    norm_1: Norm
    qkv: Linear
    out: Linear
    norm_2: Norm
    fc: Linear
    projection: Linear
    heads: int

    @classmethod
    def pack(cls: type[Made], block: Any, activation: str, packing: Packing) -> Made:
        """The block is read, never kept."""
        attention = block.attn
        fc, projection, activation = packing.mlp(block.mlp.c_fc, block.mlp.c_proj, block.ln_2, activation)
        return cls(
            norm_1=Norm(*packing.vectors(block.ln_1), block.ln_1.eps),
            qkv=packing.linear(*packing.after_norm(block.ln_1, attention.in_proj_weight, attention.in_proj_bias)),
            out=packing.linear(exact(attention.out_proj.weight), exact(attention.out_proj.bias)),
            norm_2=Norm(*packing.vectors(block.ln_2), block.ln_2.eps),
            fc=packing.linear(*fc, activation),
            projection=packing.linear(*projection),
            heads=attention.heads,
        )


class CastLinear:
    """A linear layer in a wider dtype than the residual stream's, where that has too little range or precision.

    Hidden rows stay in that dtype: the two GEMMs of an MLP are cast together.
    """

    def __init__(self, linear: Linear, inner: torch.dtype, outer: torch.dtype) -> None:
        self.name, self.linear, self.inner, self.outer = linear.name, linear, inner, outer

    def __call__(self, x: Tensor) -> Tensor:
        return self.linear(x.to(self.inner)).to(self.outer)

    def activated(self, x: Tensor) -> Tensor:
        return self.linear.activated(x.to(self.inner))

    def add(self, stream: Tensor, x: Tensor) -> Tensor:
        return self.linear.add(stream.to(self.inner), x.to(self.inner)).to(self.outer)


def place_of(block: int, gemm: str) -> str:
    """The name of one of the ``GEMMS`` of a block."""
    return f"blocks.{block}.{gemm}"


def exact(x: Tensor) -> Tensor:
    """A weight in float64 on the CPU, where the rewrites are computed."""
    return x.detach().to("cpu", torch.float64)


def first_message(block: Any, class_token: Tensor) -> Tensor:
    """The first block's message (D,) in float64: attention over T equal messages returns their common value."""
    message = exact(block.message_fc.weight) @ class_token + exact(block.message_fc.bias)
    norm, attention, width = block.message_ln, block.message_attn, len(message)
    normed = layer_norm(message, message.shape, exact(norm.weight), exact(norm.bias), norm.eps)
    value = exact(attention.in_proj_weight[2 * width :]) @ normed + exact(attention.in_proj_bias[2 * width :])
    return message + exact(attention.out_proj.weight) @ value + exact(attention.out_proj.bias)
