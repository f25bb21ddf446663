"""Patch weights packed once for bytes by the CUDA tower; the extension's CUDA operator is emulated."""

from __future__ import annotations

import threading
from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from engine_cases import random_video, small_model
from numerics import relative_error
from torch import Tensor

from xclip_fast import ops
from xclip_fast.config import CLIP_MEAN, CLIP_STD
from xclip_fast.engine.cuda import CudaTower
from xclip_fast.engine.packing import CUDA_REWRITES, Packing
from xclip_fast.ops import _patch_extension, patch_embed
from xclip_fast.ops._patch_contract import affine
from xclip_fast.ops._patch_extension import (
    PIECE,
    PIXEL_CENTRE,
    Packed,
    pack_for_cuda,
)
from xclip_fast.ops.patch_embed import patch_embed_ref
from xclip_fast.reference import XCLIP

HALF = Packing(torch.device("cpu"), torch.float16, CUDA_REWRITES)


def emulated_rows(frames: Tensor, patch: int, stream: int) -> Tensor:
    """What ``patch_rows_cuda`` gathers."""
    count, height, width, _ = frames.shape
    grid = (frames.half() - PIXEL_CENTRE).view(count, height // patch, patch, width // patch, patch, 3)
    rows = grid.transpose(2, 3).reshape(-1, 3 * patch**2)
    return torch.nn.functional.pad(rows, (0, -rows.shape[1] % PIECE))


@pytest.fixture
def extension(monkeypatch: pytest.MonkeyPatch) -> dict[str, list[Any]]:
    """The extension as on a GPU; what was packed for it, and what each call used of that."""
    seen: dict[str, list[Any]] = {"packed": [], "used": []}
    inner = _patch_extension.on_cuda

    def pack(*arguments: Any) -> Packed:
        seen["packed"].append(pack_for_cuda(*arguments))
        return seen["packed"][-1]

    def on_cuda(call: _patch_extension.Call, packed: Packed) -> tuple[Tensor, Tensor]:
        seen["used"].append(packed.weight)
        return inner(call, packed)

    monkeypatch.setattr(_patch_extension, "refusal", lambda frames, weight: None)
    monkeypatch.setattr(_patch_extension, "takes_packed", lambda frames, weight: True)
    monkeypatch.setattr(_patch_extension, "pack_for_cuda", pack)
    monkeypatch.setattr(_patch_extension, "on_cuda", on_cuda)
    monkeypatch.setattr(torch.ops.xclip_fast_native, "patch_rows_cuda", emulated_rows, raising=False)
    monkeypatch.setattr(torch.cuda, "device", lambda device: nullcontext())
    monkeypatch.setattr(torch.cuda, "current_stream", lambda *_: SimpleNamespace(cuda_stream=0))
    return seen


@pytest.fixture(scope="module")
def model() -> XCLIP:
    return small_model()


@torch.inference_mode()
def test_a_grid_is_packed_once(model: XCLIP, extension: dict[str, list[Any]]) -> None:
    tower = CudaTower(model.visual, model.config, HALF)
    for side in (32, 48, 32, 48, 32):
        video = random_video(side=side)
        found = tower._embed(video)
        with ops.backend("torch"):
            assert relative_error(found, tower._embed(video)) < 2e-3
    assert [len(packed.table) for packed in extension["packed"]] == [1 + (side // 8) ** 2 for side in (32, 48)]
    assert len(extension["used"]) == 5
    assert {weight.data_ptr() for weight in extension["used"]} == {x.weight.data_ptr() for x in extension["packed"]}


@torch.inference_mode()
def test_grids_with_as_many_rows_or_patches_are_packed_apart(model: XCLIP, extension: dict[str, list[Any]]) -> None:
    tower = CudaTower(model.visual, model.config, HALF)
    for height, width in [(32, 32), (32, 16), (16, 64), (32, 32)]:
        video = torch.randint(256, (1, 2, height, width, 3), dtype=torch.uint8)
        found = tower._embed(video)
        with ops.backend("torch"):
            assert relative_error(found, tower._embed(video)) < 2e-3
    assert len(extension["packed"]) == 3


@pytest.mark.parametrize("name", ["reference", "torch"])
@torch.inference_mode()
def test_another_backend_is_respected(model: XCLIP, extension: dict[str, list[Any]], name: str) -> None:
    tower = CudaTower(model.visual, model.config, HALF)
    with ops.backend(name):
        tower._embed(random_video())
    assert not extension["used"]


@torch.inference_mode()
def test_normalised_frames_need_nothing_packed(model: XCLIP, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_patch_extension, "pack_for_cuda", lambda *_: pytest.fail("packed"))
    tower = CudaTower(model.visual, model.config, HALF)
    tower._embed(torch.randn(2, 4, 3, 32, 32))
    # nor do bytes that the extension does not serve
    tower._embed(random_video())


@torch.inference_mode()
def test_packed_weights_give_the_bits_of_the_op(model: XCLIP, extension: dict[str, list[Any]]) -> None:
    frames = random_video()[0]
    generator = torch.Generator().manual_seed(0)
    weights = [torch.randn(size, generator=generator).half() for size in ((24, 3, 16, 16), (24,), (5, 24))]
    norm = {"norm_weight": torch.ones(24).half(), "norm_bias": torch.ones(24).half()}
    mean, std = (0.4, 0.5, 0.3), (0.2, 0.3, 0.25)
    packed = pack_for_cuda(*weights, affine(mean, std))
    for options in ({}, norm):
        call = _patch_extension.Call(
            frames, *weights, *(norm.values() if options else (None, None)), 1e-5, affine(mean, std), torch.half, False
        )
        wanted, _ = _patch_extension.on_cuda(call, pack_for_cuda(*weights, call.factors))
        found = patch_embed(frames, *weights, **options, mean=mean, std=std, _packed=packed)
        assert torch.equal(found, wanted)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("patch", [14, 16])
@torch.inference_mode()
def test_rows_and_packed_weights_are_no_less_exact_than_the_definition(
    patch: int, dtype: torch.dtype, extension: dict[str, list[Any]]
) -> None:
    generator = torch.Generator().manual_seed(patch)

    def random(*size: int) -> Tensor:
        return torch.randn(size, generator=generator)

    frames = torch.randint(0, 256, (2, 3 * patch, 2 * patch, 3), generator=generator, dtype=torch.uint8)
    # bright frames are far from the mean: what is added up cancels least
    frames[0].clamp_(min=200)
    weight, norm = (random(128, 3, patch, patch) / patch / 2).to(dtype), (1 + random(128) / 4, random(128))
    embedding = (random(128) / 4).to(dtype), (random(7, 128) / 4).to(dtype)
    mean, std = CLIP_MEAN, CLIP_STD
    # powers of two change no digit of the definition in bfloat16; float16 holds few of them
    for scale in (1.0, 2.0**-40, 2.0**40) if dtype == torch.bfloat16 else (1.0, 2.0**-5, 2.0**5):
        weights = [tensor * scale for tensor in (weight, *embedding)]
        for vectors in ((None, None), tuple(vector.to(dtype) for vector in norm)):
            call = _patch_extension.Call(frames, *weights, *vectors, 1e-5 * scale**2, affine(mean, std), dtype, False)
            found, _ = _patch_extension.on_cuda(call, pack_for_cuda(*weights, call.factors))
            exact = [None if x is None else x.double() for x in (*weights, *vectors)]
            truth = patch_embed_ref(frames, *exact, call.eps, mean, std, torch.float64)
            plain = patch_embed_ref(frames, *weights, *vectors, call.eps, mean, std, dtype)
            assert (found - truth).norm() <= (plain - truth).norm()


@torch.inference_mode()
def test_no_sum_of_packed_weights_overflows() -> None:
    white, black = (torch.full((1, 16, 16, 3), value, dtype=torch.uint8) for value in (255, 0))
    for weight in (torch.full((8, 3, 16, 16), 1e30), torch.rand(8, 3, 16, 16), torch.full((8, 3, 16, 16), 1e-30)):
        packed = pack_for_cuda(weight.bfloat16(), torch.zeros(8), torch.zeros(2, 8), affine(CLIP_MEAN, CLIP_STD))
        for frames in (white, black):
            sums = emulated_rows(frames, 16, 0).double() @ packed.weight.double().T
            assert sums.abs().max() <= 2**15 * 1.001
        assert packed.weight.abs().max() >= 2**-6
    zeros = pack_for_cuda(torch.zeros(8, 3, 14, 14), torch.zeros(8), torch.ones(2, 8), affine(CLIP_MEAN, CLIP_STD))
    assert torch.equal(zeros.weight, torch.zeros(8, 592, dtype=torch.float16))
    assert torch.equal(zeros.table, torch.ones(2, 8))


def test_threads_share_what_was_made_first() -> None:
    values: dict[str, Tensor] = {}
    both = threading.Barrier(2)
    found = []

    def make() -> Tensor:
        both.wait()
        return torch.ones(1)

    threads = [threading.Thread(target=lambda: found.append(HALF.once(values, "grid", make))) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    # a graph may have been captured on it already
    assert found[0] is found[1] is values["grid"]
