"""Float8 GEMMs and the CUDA tower on them, with ``torch._scaled_mm`` emulated: only newer GPUs have it."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from typing import Any

import pytest
import torch
from configs import SMALL
from engine_cases import random_video, small_model
from numerics import relative_error
from torch import Tensor
from torch.nn.functional import cosine_similarity, linear

from xclip_fast.bench.launches import count
from xclip_fast.engine import cuda, linears
from xclip_fast.engine.budget import check_gemms
from xclip_fast.engine.cuda import CudaTower
from xclip_fast.engine.linears import Float8Linear
from xclip_fast.engine.packing import CUDA_REWRITES, Packing
from xclip_fast.ops._quantize_rows import activate, quantize_rows
from xclip_fast.reference import XCLIP

EXACT = Packing(torch.device("cpu"), torch.float32, CUDA_REWRITES)
HALF = replace(EXACT, dtype=torch.bfloat16)
# as the engine has it for a model of three blocks
ENDS = {f"blocks.{block}.{name}": torch.bfloat16 for block in (0, 2) for name in ("qkv", "out", "fc", "projection")}
FLOAT8 = replace(HALF, narrow="float8_e4m3fn", fallback=ENDS)


@pytest.fixture(autouse=True)
def scaled_mm(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """The GEMM that reads rows of float8 and scales, as strict about them as a GPU; whether each was to be fast."""
    asked: list[bool] = []

    def emulated(
        a: Tensor,
        b: Tensor,
        *,
        scale_a: Tensor,
        scale_b: Tensor,
        bias: Tensor | None,
        out_dtype: torch.dtype,
        use_fast_accum: bool,
    ) -> Tensor:
        asked.append(use_fast_accum)
        assert a.dtype is b.dtype is torch.float8_e4m3fn
        assert a.is_contiguous()
        assert b.t().is_contiguous()
        assert (scale_a.shape, scale_b.shape) == ((a.shape[0], 1), (1, b.shape[1]))
        assert scale_a.dtype is scale_b.dtype is torch.float32
        assert scale_a.is_contiguous()
        assert scale_b.is_contiguous()
        out = (a.float() @ b.float()) * scale_a * scale_b
        return (out if bias is None else out + bias.float()).to(out_dtype)

    monkeypatch.setattr(torch, "_scaled_mm", emulated)
    return asked


@pytest.fixture
def quantised(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """How often rows were quantised, by what was done with them on the way."""
    calls: Counter[str] = Counter()

    def counted(x: Tensor, **options: Any) -> tuple[Tensor, Tensor, Tensor]:
        mode = "norm" if options.get("weight") is not None else options.get("activation", "plain")
        calls[f"{mode} {x.dtype}".replace("torch.", "")] += 1
        return quantize_rows(x, **options)

    for module in (cuda, linears):
        monkeypatch.setattr(module, "quantize_rows", counted)
    return calls


@pytest.fixture(scope="module")
def model() -> XCLIP:
    return small_model()


def features(model: XCLIP, packing: Packing, video: Tensor) -> tuple[Tensor, Tensor]:
    """Frame features and tokens after the last block."""
    found, (tokens,) = CudaTower(model.visual, model.config, packing)(video, patches=True)
    return found.float(), tokens.float()


@pytest.mark.parametrize("activation", ["silu", "quick_gelu", "gelu"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_linear_agrees(activation: str, dtype: torch.dtype) -> None:
    x, weight = (torch.randn(40, 128) + 0.3).to(dtype), (torch.randn(64, 128) / 128**0.5).to(dtype)
    bias, stream = torch.randn(64).to(dtype), torch.randn(40, 64).to(dtype)
    layer = Float8Linear(weight.double(), bias.double(), activation, dtype)
    truth = linear(x.double(), weight.double(), bias.double())
    for found, wanted in [
        (layer(x), truth),
        (layer.multiply(*quantize_rows(x)[:2]), truth),
        (layer.activated(x), activate(truth.clone(), activation)),
        (layer.add(stream.clone(), x), stream + truth),
    ]:
        assert found.dtype is dtype
        assert 1e-3 < relative_error(found, wanted) < 0.08


def test_sums_are_fast_unless_told_otherwise(scaled_mm: list[bool]) -> None:
    weight = torch.randn(64, 128)
    for options in ({}, {"fast": True}, {"fast": False}):
        Float8Linear(weight, None, "silu", torch.bfloat16, **options)(torch.randn(4, 128).bfloat16())
    assert scaled_mm == [True, True, False]


@torch.inference_mode()
def test_fast_sums_that_err_too_much_are_kept_out(model: XCLIP, monkeypatch: pytest.MonkeyPatch) -> None:
    exact = torch._scaled_mm

    def short(*args: Any, use_fast_accum: bool, **options: Any) -> Tensor:
        found = exact(*args, use_fast_accum=use_fast_accum, **options)
        return 1.2 * found if use_fast_accum and args[0].shape[1] == 4 * SMALL.vision_width else found

    monkeypatch.setattr(torch, "_scaled_mm", short)
    packing = replace(FLOAT8, fallback={})
    errors, _ = check_gemms(model, packing, random_video())
    assert packing.fallback == ENDS | {"blocks.1.projection": torch.bfloat16}
    broken = [error for error in errors if error.error > error.budget]
    assert {error.place.split(".")[2] for error in broken} == {"projection"}


@pytest.mark.parametrize("patches", [False, True])
@torch.inference_mode()
def test_tower_is_near_the_exact_one(model: XCLIP, patches: bool) -> None:
    video = random_video()
    packings = EXACT, HALF, FLOAT8, replace(FLOAT8, fallback={})
    towers = [CudaTower(model.visual, model.config, packing) for packing in packings]
    exact, *others = (tower.project(tower(video, patches=patches)[0]).float() for tower in towers)
    half, inner, all_of_it = (relative_error(found, exact) for found in others)
    assert half < inner < all_of_it < 0.1
    assert cosine_similarity(others[1], exact).min() > 0.999


@torch.inference_mode()
def test_norms_and_activations_are_quantised_on_their_way(model: XCLIP, quantised: Counter[str]) -> None:
    tower = CudaTower(model.visual, model.config, FLOAT8)
    # the four weights of the block in the middle
    assert quantised == {"plain float32": 4}
    quantised.clear()
    tower(random_video(), patches=True)
    assert quantised == {"norm bfloat16": 2, "plain bfloat16": 1, "quick_gelu bfloat16": 1}


@pytest.mark.parametrize(
    ("kept", "calls"),
    [
        ("fc", {"norm": 1, "plain": 2}),
        ("projection", {"norm": 2, "plain": 1}),
        ("qkv", {"norm": 1, "plain": 1, "quick_gelu": 1}),
        ("out", {"norm": 2, "quick_gelu": 1}),
    ],
)
@pytest.mark.parametrize("activation", ["quick_gelu", "gelu"])
@torch.inference_mode()
def test_one_gemm_in_a_higher_precision(
    kept: str, calls: dict[str, int], activation: str, quantised: Counter[str]
) -> None:
    model, video = small_model(activation=activation), random_video()
    packing = replace(FLOAT8, fallback=ENDS | {f"blocks.1.{kept}": torch.bfloat16})
    tower = CudaTower(model.visual, model.config, packing)
    quantised.clear()
    found, _ = tower(video, patches=True)
    assert quantised == {f"{name} bfloat16".replace("quick_gelu", activation): n for name, n in calls.items()}
    assert relative_error(found.float(), features(model, EXACT, video)[0]) < 0.1


@pytest.mark.parametrize("stream", [True, False])
@torch.inference_mode()
def test_block_does_what_its_gemms_do_alone(stream: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    model = small_model()
    for block in model.visual.transformer.resblocks:
        block.ln_1.eps = block.ln_2.eps = 0.5
    video, rewrites = random_video(), CUDA_REWRITES if stream else CUDA_REWRITES - {"stream"}
    # in float32 a norm that is stored is the norm that is quantised
    packing = replace(FLOAT8, dtype=torch.float32, rewrites=rewrites, fallback={})
    fused = features(model, packing, video)
    monkeypatch.setattr(cuda, "Float8Linear", type("Absent", (), {}))
    for one, other in zip(features(model, packing, video), fused, strict=True):
        # a number at a tie may fall to the other side
        assert relative_error(one, other) < 3e-3


def test_launches_of_a_block(model: XCLIP, monkeypatch: pytest.MonkeyPatch) -> None:
    # PyTorch's own says what it would give
    monkeypatch.undo()
    video = torch.empty(1, 4, 32, 32, 3, dtype=torch.uint8, device="meta")
    counts = []
    for packing in (HALF, FLOAT8):
        tower = CudaTower(model.visual, model.config, replace(packing, device=torch.device("meta")))
        counts.append(count(lambda tower=tower: tower(video, patches=True)))
    half, float8 = counts
    changed = {name: float8[name] - half[name] for name in half | float8 if float8[name] != half[name]}
    gemms = {"_scaled_mm": 4, "linear": -1, "linear_quick_gelu": -1, "addmm_": -2}
    # four kernels quantise, two of them are the norms, and the norms add what the GEMMs give; of the last branch
    # the class rows are added for the message of the next block
    assert changed == gemms | {"quantize_rows": 4, "layer_norm": -2, "add": 1}


@pytest.mark.parametrize("message", [True, False], ids=["second block", "first block"])
@pytest.mark.parametrize("class_row", [False, True])
@torch.inference_mode()
def test_a_branch_is_as_good_as_added(model: XCLIP, class_row: bool, message: bool) -> None:
    for packing in (replace(FLOAT8, dtype=torch.float32, fallback={}), HALF, EXACT):
        tower = CudaTower(model.visual, model.config, packing)
        block = tower.blocks[int(message)]
        tokens = tower._embed(random_video())
        branch = torch.randn_like(tokens)
        kept = tokens.clone(), branch.clone()
        found = block(cuda._ResidualStream(tokens, branch.flatten(0, 2)), tower.side, class_row)
        assert torch.equal(tokens, kept[0])
        assert torch.equal(branch, kept[1])
        assert (found.pending is not None) == (packing.narrow is not None)
        wanted = block(cuda._ResidualStream(tokens + branch), tower.side, class_row)
        limit = 2e-2 if packing is HALF else 1e-6
        assert relative_error(found.whole().float(), wanted.whole().float()) < limit
