"""Patch embedding in Triton: parity for bytes and floats in every layout, patches of any size, class rows."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from harness import DEVICE, ON_GPU, check_op, kernel_dtypes, layouts, random
from pointer_check import Launches
from torch import Tensor

from xclip_fast.ops import patch_embed

# frames, rows and columns of patches, patch, width
SHAPES = [
    (1, 1, 1, 1, 1),
    (1, 1, 1, 2, 5),
    (2, 3, 2, 4, 33),
    (1, 2, 3, 7, 40),
    (3, 2, 2, 8, 64),
    (1, 5, 1, 9, 65),
    (2, 2, 2, 14, 96),
    (1, 3, 3, 16, 70),
    (1, 2, 1, 32, 129),
    (5, 4, 4, 3, 24),
    (1, 9, 8, 2, 130),
]


def frames_of(shape: tuple[int, ...], kind: str, dtype: torch.dtype) -> Tensor:
    count, rows, columns, patch, _ = shape
    height, width = rows * patch, columns * patch
    if kind == "float":
        return random(count, 3, height, width, dtype=dtype)
    pixels = torch.randint(0, 256, (count, height + 2, width + 3, 3), dtype=torch.uint8).to(DEVICE)
    crop = pixels[:, 1:-1, 2:-1]
    return {
        "crop": crop,
        "bytes": crop.contiguous(),
        # where both readings fit, bytes are read with channels last
        "planes": crop.permute(0, 3, 1, 2).contiguous() if width != 3 else crop.contiguous(),
    }[kind]


def arguments(shape: tuple[int, ...], kind: str, dtype: torch.dtype, *, norm: bool = True) -> dict[str, Any]:
    _, rows, columns, patch, width = shape
    inputs = {
        "frames": frames_of(shape, kind, dtype),
        "weight": random(width, 3, patch, patch, dtype=dtype, scale=(3 * patch**2) ** -0.5),
        "class_embedding": random(width, dtype=dtype),
        "positions": random(1 + rows * columns, width, dtype=dtype, mean=0.5),
    }
    if norm:
        inputs |= {"norm_weight": random(width, dtype=dtype, mean=1.0), "norm_bias": random(width, dtype=dtype)}
    return inputs


@kernel_dtypes
@pytest.mark.parametrize("kind", ["bytes", "crop", "planes", "float"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_parity(shape: tuple[int, ...], kind: str, dtype: torch.dtype) -> None:
    inputs = arguments(shape, kind, dtype, norm=False)
    check_op(patch_embed, inputs, what="patch_embed kernel", ceiling=4e-3)


@kernel_dtypes
@pytest.mark.parametrize("kind", ["bytes", "float"])
@pytest.mark.parametrize("shape", [shape for shape in SHAPES if shape[-1] > 8][::2], ids=str)
def test_parity_with_the_norm(shape: tuple[int, ...], kind: str, dtype: torch.dtype) -> None:
    check_op(patch_embed, arguments(shape, kind, dtype), what="patch_embed kernel norm", ceiling=1e-2)


@pytest.mark.parametrize("layout", ["offset", "padded", "strided", "transposed"])
@pytest.mark.parametrize("name", ["frames", "weight", "class_embedding", "positions"])
def test_layouts(name: str, layout: str) -> None:
    inputs = arguments((2, 2, 3, 4, 40), "float", torch.float32)
    inputs[name] = layouts(inputs[name])[layout]
    check_op(patch_embed, inputs, what="patch_embed kernel layouts", ceiling=4e-3)


def test_one_bad_pixel_spoils_only_its_own_patch() -> None:
    inputs = arguments((2, 2, 2, 4, 40), "float", torch.float32)
    inputs["frames"][1, 2, 5, 1] = float("nan")
    tokens = patch_embed(**inputs, backend="triton")
    assert tokens[1, 3].isnan().all()
    assert tokens.isfinite().all(-1).sum() == 9


def test_a_bad_weight_leaves_the_class_token_alone() -> None:
    inputs = arguments((2, 1, 1, 4, 40), "bytes", torch.float32, norm=False)
    inputs["weight"][:] = float("inf")
    tokens = patch_embed(**inputs, backend="triton")
    assert torch.equal(tokens[:, 0], (inputs["class_embedding"] + inputs["positions"][0]).expand(2, -1))


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_dtype_of_the_result(dtype: torch.dtype) -> None:
    inputs = arguments((1, 2, 2, 4, 40), "bytes", torch.float32)
    tokens = patch_embed(**inputs, dtype=dtype, backend="triton")
    assert tokens.dtype == dtype
    assert torch.allclose(tokens.float(), patch_embed(**inputs, backend="reference"), atol=4e-3)


@pytest.mark.skipif(ON_GPU, reason="the interpreter's pointer check counts the launches")
@pytest.mark.parametrize("norm", [False, True])
def test_launches(norm: bool, launches: Launches) -> None:
    patch_embed(**arguments((2, 2, 2, 4, 40), "crop", torch.float16, norm=norm), backend="triton")
    assert launches.names == ["_patch_rows_fwd_kernel", "_patch_tokens_fwd_kernel"]
