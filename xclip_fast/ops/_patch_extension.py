"""Patch embedding by the compiled extension: which calls it serves, and the steps between its operators."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from xclip_fast import _extension, processor
from xclip_fast.devices import compute_capability
from xclip_fast.ops._backends import runs_kernels
from xclip_fast.ops._dtypes import exact_dtype
from xclip_fast.ops._patch_contract import channels_last
from xclip_fast.ops.layer_norm import layer_norm

# as in csrc/patch_rows_index.h
PIXEL_CENTRE = 128
PIECE = 8
# the largest sum of a row of rows of patches times packed weights, half of what float16 holds
LARGEST_SUM = 2.0**15
LONGEST_SIDE = 32768
# the sum of one row of bytes times bytes must fit 32 bits
MAX_INTEGER_ROW = 2**31 // (128 * 128) - 1
# with fewer patches than this, splitting the weights into bytes costs more than a GEMM of floats
MIN_INTEGER_ROWS = 128
ROWS = 1024  # multiplied at a time by one or two threads


def refusal(frames: Tensor, weight: Tensor) -> str | None:
    """The reason why the extension cannot serve a call with these tensors, or None."""
    kind = frames.device.type
    if kind == "cpu":
        return _extension.refusal()
    if kind != "cuda":
        return f"the tensors are on {kind}, and it serves the CPU and CUDA"
    if frames.dtype != torch.uint8 or weight.dtype not in (torch.float16, torch.bfloat16):
        found = f"{frames.dtype} frames and {weight.dtype} weights"
        return f"on CUDA it takes uint8 frames and float16 or bfloat16 weights, found {found}"
    if max(channels_last(frames).shape[1:3]) > LONGEST_SIDE:
        return f"frames on CUDA have sides of up to {LONGEST_SIDE} pixels, found {tuple(frames.shape)}"
    if compute_capability(frames.get_device()) < (8, 0):
        return "it needs compute capability 8.0 or newer"
    return _extension.cuda_refusal()


def takes_packed(frames: Tensor, weight: Tensor) -> bool:
    """Whether the extension would serve a call by what ``pack_for_cuda`` makes."""
    return frames.device.type == "cuda" and refusal(frames, weight) is None


def serves_rows(frames: Tensor) -> bool:
    """Whether ``patch_rows`` below takes these frames."""
    return frames.device.type == "cpu" and _extension.refusal() is None


def patch_rows(frames: Tensor, patch: int, factors: list[list[float]], dtype: torch.dtype) -> Tensor:
    """Patches as rows (F N, 3 P P) in the order of the weights; uint8 pixels times the first factor plus the second."""
    return torch.ops.xclip_fast_native.patch_rows(channels_last(frames), patch, _table(factors), dtype)


class Call(NamedTuple):
    """The arguments of the registered op, the normalisation of bytes as factors and summands, one a channel."""

    frames: Tensor
    weight: Tensor
    class_embedding: Tensor
    positions: Tensor
    norm_weight: Tensor | None
    norm_bias: Tensor | None
    eps: float
    factors: list[list[float]]
    dtype: torch.dtype
    save_embedded: bool


class Packed(NamedTuple):
    """Weights and table of one grid of patches, for rows of pixels less 128.

    Attributes:
        weight: float16 (D, columns of such a row), the normalisation folded in, each row divided by its scale.
        scale: float32 (D,), powers of two: no sum overflows, whatever the weights are, and few weights are subnormal.
        table: float32 (1 + N, D): the class token, then positions with what the normalisation adds to each sum.
    """

    weight: Tensor
    scale: Tensor
    table: Tensor


def patch_embed_fwd(call: Call) -> tuple[Tensor, Tensor]:
    """Tokens, and what they were before their norm if that is to be saved; see ``ops.patch_embed``."""
    if call.frames.device.type != "cuda":
        return _on_cpu(call)
    # not kept for the next call: neither identity nor version of a tensor tells of a write through ``.data``
    return on_cuda(call, pack_for_cuda(call.weight, call.class_embedding, call.positions, call.factors))


def _on_cpu(call: Call) -> tuple[Tensor, Tensor]:
    native = torch.ops.xclip_fast_native
    frames, weight, factors = call.frames, call.weight, call.factors
    count, patches = len(frames), len(call.positions) - 1
    exact = exact_dtype(weight.dtype)
    vectors = [
        None if vector is None else vector.to(exact).contiguous()
        for vector in (call.class_embedding, call.positions, call.norm_weight, call.norm_bias)
    ]
    shape = (count, *call.positions.shape)
    tokens = weight.new_empty(shape, dtype=call.dtype)
    wide = torch.promote_types(weight.dtype, call.dtype)
    embedded = weight.new_empty(shape if call.save_embedded else 0, dtype=wide)
    # the sums of some frames at a time: of all at once they would take up to three times the memory of the tokens
    some = max(1, ROWS * max(1, torch.get_num_threads() // 2) // patches)
    if count * patches >= MIN_INTEGER_ROWS and _multiplies_bytes(frames, weight):
        # pixels are bytes already: a GEMM of bytes is exact and several times as fast as one of floats
        pieces = 3 if weight.dtype == torch.float32 else 2
        matrix, unit, bias = native.pack_weights(weight.contiguous(), _table(factors), pieces)
        dtype, multiply = torch.int8, torch._int_mm
    else:
        # PyTorch rounds the result of a GEMM to the dtype of its factors, before positions and norm are added
        dtype = weight.dtype if _multiplies_halves(frames, weight) else exact
        matrix, unit, bias = weight.flatten(1).to(dtype), None, None
        multiply, some = torch.mm, max(1, count) if dtype == weight.dtype else some
    sums = weight.new_empty(min(some, count) * patches, len(matrix), dtype=torch.int32 if unit is not None else dtype)
    for first in range(0, count, some):
        part = slice(first, first + some)
        rows = patch_rows(frames[part], weight.shape[-1], factors, dtype)
        projected = multiply(rows, matrix.T, out=sums[: len(rows)])
        saved = embedded[part] if call.save_embedded else None
        native.patch_tokens(projected, unit, bias, *vectors, call.eps, tokens[part], saved)
    return tokens, embedded


def on_cuda(call: Call, packed: Packed) -> tuple[Tensor, Tensor]:
    """As ``patch_embed_fwd``, by what ``pack_for_cuda`` made of the weights of the call."""
    frames = channels_last(call.frames)
    # the operator neither looks up the stream nor changes the device: torch's C functions for it differ by version
    with torch.cuda.device(frames.device):
        stream = torch.cuda.current_stream().cuda_stream
        rows = torch.ops.xclip_fast_native.patch_rows_cuda(frames, call.weight.shape[-1], stream)
    # with a result to write to, so that autocast leaves the dtypes alone
    projected = torch.mm(rows, packed.weight.T, out=rows.new_empty(len(rows), len(packed.weight)))
    norm = call.norm_weight, call.norm_bias, call.eps
    wide = torch.promote_types(call.weight.dtype, call.dtype)
    if runs_kernels(call.weight):
        from xclip_fast.kernels.patch_embed import patch_tokens

        return patch_tokens(
            projected, packed.scale, None, packed.table, *norm, len(frames), call.dtype, wide, call.save_embedded
        )
    patches = (projected * packed.scale).view(len(frames), len(packed.table) - 1, -1) + packed.table[1:]
    tokens = embedded = torch.cat([packed.table[:1].expand(len(frames), 1, -1), patches], dim=1)
    if call.norm_weight is not None and call.norm_bias is not None:
        tokens, _ = layer_norm(tokens, call.norm_weight.float(), call.norm_bias.float(), eps=call.eps)
    return tokens.to(call.dtype), (embedded if call.save_embedded else embedded.new_empty(0)).to(wide)


def pack_for_cuda(weight: Tensor, class_embedding: Tensor, positions: Tensor, factors: list[list[float]]) -> Packed:
    """The normalisation folded into weights, for a GEMM with rows of pixels, and into the table."""
    # factors stay numbers: a tensor of them would be copied from the host, which no CUDA graph can capture
    channels = weight.float().unbind(1)
    scaled = torch.stack([channel * factor for channel, factor in zip(channels, factors[0], strict=True)], dim=-1)
    scaled = scaled.flatten(1)
    # no sum is larger than that of its weights' magnitudes times 128, and a power of two above that rounds nothing
    _, exponent = torch.frexp(scaled.abs().sum(1) * (PIXEL_CENTRE / LARGEST_SUM))
    # for weights near the smallest float32 the scale itself stays a normal number
    scale = torch.ldexp(torch.ones_like(scaled[:, 0]), exponent.clamp(min=-100))
    packed = torch.nn.functional.pad((scaled / scale[:, None]).half(), (0, -scaled.shape[1] % PIECE))
    parts = zip(channels, *factors, strict=True)
    sums = [channel.sum((1, 2)) * (PIXEL_CENTRE * factor + offset) for channel, factor, offset in parts]
    bias = sums[0] + sums[1] + sums[2]
    table = torch.cat([class_embedding.float()[None], bias.expand(len(positions) - 1, -1)]) + positions.float()
    return Packed(packed.contiguous(), scale, table)


def _multiplies_bytes(frames: Tensor, weight: Tensor) -> bool:
    return (
        frames.dtype == torch.uint8
        and weight.dtype != torch.float64
        and weight[0].numel() <= MAX_INTEGER_ROW
        and torch.cpu._is_vnni_supported()
        and not processor.sums_bytes_in_16_bits()
    )


def _multiplies_halves(frames: Tensor, weight: Tensor) -> bool:
    """Whether to multiply in half precision: given frames that are rounded already, where it is native."""
    return frames.dtype == weight.dtype == torch.bfloat16 and torch.cpu._is_avx512_bf16_supported()


def _table(factors: list[list[float]]) -> Tensor:
    return torch.tensor(factors, dtype=torch.float64)
