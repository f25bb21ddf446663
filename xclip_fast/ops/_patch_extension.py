"""Patch embedding by the compiled extension: which calls it serves, and the steps between its operators."""

from __future__ import annotations

import torch
from torch import Tensor

from xclip_fast import _extension
from xclip_fast.ops._patch_contract import channels_last, exact_dtype

# the sum of one row of bytes times bytes must fit 32 bits
MAX_INTEGER_ROW = 2**31 // (128 * 128) - 1


def refusal(frames: Tensor, weight: Tensor) -> str | None:
    """Why the extension cannot serve a call with these tensors, or nothing."""
    kind = frames.device.type
    if kind == "cpu":
        return _extension.refusal()
    return f"the tensors are on {kind}, and the extension serves the CPU"


def serves_rows(frames: Tensor) -> bool:
    """Whether ``patch_rows`` below takes these frames."""
    return frames.device.type == "cpu" and _extension.refusal() is None


def patch_rows(frames: Tensor, patch: int, factors: list[list[float]], dtype: torch.dtype) -> Tensor:
    """Patches as rows (F N, 3 P P) in the order of the weights; uint8 pixels times the first factor plus the second."""
    return torch.ops.xclip_fast_native.patch_rows(channels_last(frames), patch, _table(factors), dtype)


def patch_embed_fwd(
    frames: Tensor,
    weight: Tensor,
    class_embedding: Tensor,
    positions: Tensor,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    eps: float,
    factors: list[list[float]],
    dtype: torch.dtype,
    save_embedded: bool,
) -> tuple[Tensor, Tensor]:
    """Tokens, and what they were before their norm if that is to be saved; see ``ops.patch_embed``."""
    native = torch.ops.xclip_fast_native
    patch = weight.shape[-1]
    if _multiplies_bytes(frames, weight):
        # pixels are bytes already: a product of bytes is exact and several times as fast as one of floats
        pieces = 3 if weight.dtype == torch.float32 else 2
        rows = patch_rows(frames, patch, factors, torch.int8)
        bytes_of_weight, unit, bias = native.pack_weights(weight.contiguous(), _table(factors), pieces)
        product = torch._int_mm(rows, bytes_of_weight.T)
    else:
        rows = patch_rows(frames, patch, factors, weight.dtype)
        product, unit, bias = rows @ weight.flatten(1).T, None, None
    vectors = [class_embedding, positions, norm_weight, norm_bias]
    exact = exact_dtype(product.dtype if product.is_floating_point() else weight.dtype)
    vectors = [None if vector is None else vector.to(exact).contiguous() for vector in vectors]
    wide = torch.promote_types(weight.dtype, dtype) if save_embedded else None
    return native.patch_tokens(product, unit, bias, *vectors, eps, len(frames), dtype, wide)


def _multiplies_bytes(frames: Tensor, weight: Tensor) -> bool:
    return (
        frames.dtype == torch.uint8
        and weight.dtype != torch.float64
        and weight[0].numel() <= MAX_INTEGER_ROW
        and torch.cpu._is_vnni_supported()
    )


def _table(factors: list[list[float]]) -> Tensor:
    return torch.tensor(factors, dtype=torch.float64)
