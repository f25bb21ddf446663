"""The patch embedding of bytes on a GPU: every read of its kernels, exact answers, a graph. Sanitizers run this too."""

from __future__ import annotations

import pytest
import torch
from gpu_cases import DEVICE, ON_GPU, check, copies, equal, needs_gpu
from numerics import relative_error
from torch import Tensor

from xclip_fast import _extension
from xclip_fast.bench.timing import capture
from xclip_fast.ops import patch_embed
from xclip_fast.ops._patch_contract import affine
from xclip_fast.ops._patch_extension import pack_for_cuda
from xclip_fast.ops.inputs import Inputs

REASON = _extension.cuda_refusal() if ON_GPU else "only a GPU has this"
needs_cuda_extension = pytest.mark.skipif(REASON is not None, reason=str(REASON))
BACKENDS = ["triton", pytest.param("extension", marks=needs_cuda_extension)]
HALVES = ["bfloat16", "float16"]

# frames, patch, token width: reads of 8 bytes at once, of 2, of one, of planes; then thousands of rows
SHAPES = [
    ((3, 32, 48, 3), 16, 64),
    ((3, 32, 48, 3), 16, 72),
    ((3, 32, 48, 3), 16, 37),
    ((1, 64, 64, 3), 32, 64),
    ((2, 42, 70, 3), 14, 72),
    ((2, 35, 63, 3), 7, 40),
    ((2, 3, 32, 48), 16, 64),
]
LARGE = [
    ((513, 32, 64, 3), 16, 1024),
    ((513, 32, 64, 3), 16, 1017),
    ((513, 3, 32, 64), 16, 1024),
]


def sides(shape: tuple[int, ...]) -> tuple[int, int]:
    return shape[1:3] if shape[-1] == 3 else shape[2:4]


def arguments(shape: tuple[int, ...], patch: int, width: int, dtype: str, *, norm: bool = True) -> Inputs:
    height, across = sides(shape)
    kind = getattr(torch, dtype)

    def random(*size: int, scale: float = 1.0, mean: float = 0.0) -> Tensor:
        return (torch.randn(*size) * scale + mean).to(DEVICE, kind)

    found: Inputs = {
        "frames": torch.randint(0, 256, shape, dtype=torch.uint8).to(DEVICE),
        "weight": random(width, 3, patch, patch, scale=(3 * patch**2) ** -0.5),
        "class_embedding": random(width, scale=0.3),
        "positions": random(1 + height // patch * (across // patch), width, scale=0.3),
    }
    return found | ({"norm_weight": random(width, mean=1.0), "norm_bias": random(width)} if norm else {})


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_parity(shape: tuple[tuple[int, ...], int, int], backend: str, dtype: str) -> None:
    check("patch_embed", arguments(*shape, dtype), dtype, f"{backend} paths", backend)


@needs_gpu
@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("shape", LARGE, ids=str)
def test_parity_of_many_rows(shape: tuple[tuple[int, ...], int, int], backend: str, dtype: str) -> None:
    check("patch_embed", arguments(*shape, dtype), dtype, f"{backend} many rows", backend)


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    ("shape", "patch"),
    [
        ((3, 32, 48, 3), 16),
        ((1, 64, 64, 3), 32),
        ((2, 42, 70, 3), 14),
        ((2, 35, 63, 3), 7),
        ((2, 3, 35, 63), 7),
        pytest.param((1100, 32, 64, 3), 16, marks=needs_gpu),
    ],
    ids=str,
)
def test_one_hot_weights_find_each_pixel(shape: tuple[int, ...], patch: int, backend: str, dtype: str) -> None:
    height, across = sides(shape)
    width = 3 * patch**2
    inputs = arguments(shape, patch, width, dtype, norm=False)
    inputs["weight"] = torch.eye(width, device=DEVICE, dtype=inputs["weight"].dtype).view(width, 3, patch, patch)
    inputs["class_embedding"].fill_(3)
    inputs["positions"].zero_()
    # a pixel is then exactly its byte over 256, which every dtype holds
    tokens = patch_embed(**inputs, mean=(0.0,) * 3, std=(256 / 255,) * 3, backend=backend)
    planes = inputs["frames"] if shape[1] == 3 else inputs["frames"].permute(0, 3, 1, 2)
    grid = planes.unflatten(3, (across // patch, patch)).unflatten(2, (height // patch, patch))
    expected = grid.permute(0, 2, 4, 1, 3, 5).reshape(shape[0], -1, width).double() / 256
    assert torch.equal(tokens[:, 1:].double(), expected)
    assert torch.equal(tokens[:, 0], inputs["class_embedding"].expand(shape[0], -1))


@needs_cuda_extension
@pytest.mark.parametrize("shape", [SHAPES[0], SHAPES[4], LARGE[0]], ids=str)
def test_graph_after_one_warm_up(shape: tuple[tuple[int, ...], int, int]) -> None:
    inputs = arguments(*shape, "bfloat16")

    def run() -> list[Tensor]:
        with torch.no_grad():
            return [patch_embed(**inputs, backend="extension")]

    graph, results = capture(run, warm_ups=1)
    inputs["frames"].copy_(torch.randint(0, 256, shape[0], dtype=torch.uint8))
    wanted = copies(run())
    results[0].fill_(float("nan"))
    graph.replay()
    torch.cuda.synchronize()
    assert equal(results, wanted)


@needs_cuda_extension
@pytest.mark.parametrize("shape", [*SHAPES, LARGE[0]], ids=str)
@torch.inference_mode()
def test_weights_packed_before_give_the_bits_of_a_call(shape: tuple[tuple[int, ...], int, int]) -> None:
    inputs = arguments(*shape, "bfloat16")
    mean, std = (0.4, 0.5, 0.6), (0.2, 0.25, 0.3)
    wanted = patch_embed(**inputs, mean=mean, std=std, backend="extension")
    weights = (inputs[name] for name in ("weight", "class_embedding", "positions"))
    packed = pack_for_cuda(*weights, affine(mean, std))
    found = patch_embed(**inputs, mean=mean, std=std, backend="extension", _packed=packed)
    assert torch.equal(found, wanted)


@needs_cuda_extension
def test_changed_weights_are_packed_anew() -> None:
    inputs = arguments(*SHAPES[0], "bfloat16", norm=False)
    with torch.no_grad():
        first = patch_embed(**inputs, backend="extension")
        # no version counter tells of it
        inputs["weight"].data.mul_(2)
        inputs["class_embedding"].data.mul_(2)
        inputs["positions"].data.mul_(2)
        assert relative_error(patch_embed(**inputs, backend="extension"), 2 * first) < 1e-2


@needs_cuda_extension
@torch.inference_mode()
def test_only_packed_weights_are_worth_the_extension() -> None:
    inputs = arguments(*SHAPES[0], "bfloat16") | {"mean": (0.4, 0.5, 0.6), "std": (0.2, 0.25, 0.3)}
    assert torch.equal(patch_embed(**inputs), patch_embed(**inputs, backend="triton"))
    weights = (inputs[name] for name in ("weight", "class_embedding", "positions"))
    packed = pack_for_cuda(*weights, affine(inputs["mean"], inputs["std"]))
    wanted = patch_embed(**inputs, backend="extension")
    assert torch.equal(patch_embed(**inputs, _packed=packed), wanted)


@needs_cuda_extension
def test_repeats_are_bit_equal() -> None:
    inputs = arguments(*LARGE[1], "bfloat16")
    first = patch_embed(**inputs, backend="extension")
    for _ in range(50):
        assert torch.equal(patch_embed(**inputs, backend="extension"), first)
