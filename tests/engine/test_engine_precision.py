"""What the engine errs in each precision, and what it does about GEMMs that err too much."""

from __future__ import annotations

import copy
import logging
from dataclasses import replace

import numpy as np
import pytest
import torch
from engine_cases import random_tokens, random_video, small_model
from numerics import PUBLISHED, assert_within, model_allowance, relative_error
from torch import Tensor
from torch.nn.functional import cosine_similarity, linear

from xclip_fast.demo.clips import CLASSES, FRAMES, HELD_OUT, SAMPLED, make_clip
from xclip_fast.demo.models import load_trained
from xclip_fast.engine import Engine, budget, cpu
from xclip_fast.engine.budget import BUDGETS, check_gemms
from xclip_fast.engine.cpu import CpuTower
from xclip_fast.engine.linears import PlainLinear, int8_linear
from xclip_fast.engine.packing import CPU_REWRITES, Packing
from xclip_fast.reference import XCLIP
from xclip_fast.reference.model import VideoFeatures
from xclip_fast.text import get_tokenizer
from xclip_fast.video.sampling import uniform_indices

HALVES = [torch.bfloat16, torch.float16]
needs_int8 = pytest.mark.skipif(int8_linear() is None, reason="this PyTorch multiplies no bytes on this processor")
INT8 = pytest.param(torch.int8, marks=needs_int8)


@pytest.fixture(scope="module")
def model() -> XCLIP:
    return small_model()


@torch.inference_mode()
def test_parity_float32(model: XCLIP) -> None:
    video, tokens = random_video(), random_tokens()
    engine = Engine(model, torch.float32)
    truth = copy.deepcopy(model).double()
    assert_within(engine.encode_video(video).video, truth.encode_video(video).video, PUBLISHED, what="engine: float32")
    assert_within(
        engine.encode_video(video).patches, truth.encode_video(video).patches, PUBLISHED, what="engine: float32"
    )
    assert_within(engine(video, tokens), truth(video, tokens), PUBLISHED, what="engine: float32")


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@torch.inference_mode()
def test_half_precision_errs_at_most_twice_as_much_as_the_model(model: XCLIP, dtype: torch.dtype) -> None:
    video, tokens = random_video(4), random_tokens()
    truth, eager, engine = model.double(), copy.deepcopy(model).to(dtype), Engine(model, dtype)
    for found, same, exact in [
        (engine.encode_video(video).video, eager.encode_video(video).video, truth.encode_video(video).video),
        (engine.embed_video(video), eager.encode_video(video).video, truth.encode_video(video).video),
        (engine(video, tokens), eager(video, tokens), truth(video, tokens)),
    ]:
        assert relative_error(found, exact) <= model_allowance(relative_error(same, exact), dtype)


@pytest.mark.parametrize("dtype", [*HALVES, INT8], ids=str)
def test_report_of_a_well_behaved_model(model: XCLIP, dtype: torch.dtype) -> None:
    report = Engine(model, dtype).report(random_video(3))
    name = str(dtype).removeprefix("torch.")
    assert {gemm.place for gemm in report.products} == {
        f"blocks.{block}.{gemm}" for block in range(3) for gemm in ("qkv", "out", "fc", "projection")
    }
    assert all(0 < gemm.error < BUDGETS[name] and not gemm.fell_back for gemm in report.products)
    assert report.video_cosine is not None
    assert report.video_cosine >= 0.999
    assert 0 < report.video_error < 0.05  # type: ignore[operator]
    assert name in str(report)
    assert "blocks.2.fc" in str(report)


@pytest.fixture(scope="module")
def demo() -> tuple[XCLIP, Tensor, Tensor, Tensor]:
    """The trained model, clips that it never saw, their class texts and the model's answers."""
    model, frames = load_trained("xclip"), uniform_indices(FRAMES, SAMPLED)
    clips = [
        make_clip(label, 1000 + label * 24 + i, HELD_OUT, frames) for label in range(len(CLASSES)) for i in range(24)
    ]
    video, tokens = torch.from_numpy(np.stack(clips)), get_tokenizer(model.config)(CLASSES)
    with torch.inference_mode():
        return model, video, tokens, model(video, tokens).argmax(dim=-1)


@pytest.mark.parametrize("dtype", [torch.float32, *HALVES, INT8], ids=str)
def test_top1_is_the_models_on_the_demos_test_set(
    demo: tuple[XCLIP, Tensor, Tensor, Tensor], dtype: torch.dtype
) -> None:
    model, video, tokens, best = demo
    assert torch.equal(Engine(model, dtype)(video, tokens).argmax(dim=-1), best)


@pytest.mark.parametrize("dtype", [*HALVES, INT8], ids=str)
@torch.inference_mode()
def test_answers_of_a_video_do_not_depend_on_its_neighbours(model: XCLIP, dtype: torch.dtype) -> None:
    engine, video = Engine(model, dtype), random_video(3)
    alone = torch.cat([engine.encode_video(one[None]).video for one in video])
    video[1] = 255
    together = engine.encode_video(video).video
    assert cosine_similarity(together[::2].float(), alone[::2].float()).min() > 0.9999


def outliers(model: XCLIP, factor: float) -> XCLIP:
    """The model with hidden units of its second block that dwarf all others, and count for little."""
    mlp = model.visual.transformer.resblocks[1].mlp
    mlp.c_fc.bias[:8] += factor
    mlp.c_proj.weight[:, :8] /= factor
    return model


@pytest.mark.parametrize(
    ("dtype", "factor"), [(torch.float16, 1e6), pytest.param(*[torch.int8, 1e5], marks=INT8.marks)]
)
def test_gemm_beyond_its_budget_falls_back(dtype: torch.dtype, factor: float, caplog: pytest.LogCaptureFixture) -> None:
    model, video = outliers(small_model(), factor), random_video()
    with caplog.at_level(logging.WARNING, "xclip_fast"):
        engine = Engine(model, dtype)
    report = engine.report(video)
    fallen = {gemm.place for gemm in report.products if gemm.fell_back}
    assert "blocks.1.projection" in fallen
    assert fallen < {gemm.place for gemm in report.products}
    assert all(f"{place}: error" in caplog.text for place in fallen)
    assert "instead" in str(report)
    truth = model.double().encode_video(video).video
    assert relative_error(engine.encode_video(video).video, truth) < 0.05


@needs_int8
def test_outlier_channels_cost_int8_little(monkeypatch: pytest.MonkeyPatch) -> None:
    model = small_model()
    model.visual.ln_pre.weight[1:3] *= 64
    smooth = {gemm.place: gemm for gemm in Engine(model, torch.int8).report().products}
    monkeypatch.setattr(budget, "_smoothing", lambda seen, weight: torch.ones(weight.shape[1]))
    rough = {gemm.place: gemm for gemm in Engine(model, torch.int8).report().products}
    after_norms = [f"blocks.{block}.{gemm}" for block in range(3) for gemm in ("qkv", "fc")]
    assert not any(gemm.fell_back for gemm in smooth.values())
    assert sum(smooth[place].error for place in after_norms) < sum(rough[place].error for place in after_norms) / 2


def test_smoothing_is_of_powers_of_two() -> None:
    rows = [torch.tensor([[16.0, 0.0, 1.0, float("inf")]]), torch.tensor([[-64.0, 0.0, 1.0, 1.0]])]
    weight = torch.tensor([[1.0, 1.0, 0.0, 1.0], [-4.0, 1.0, 0.0, 1.0]], dtype=torch.float64)
    # a channel of nothing, or of what is not a number, stays as it is
    assert budget._smoothing(rows, weight).tolist() == [4, 1, 1, 1]


def test_budget_is_checked_on_the_clips_given() -> None:
    model = small_model()
    black = torch.zeros_like(random_video())
    errors = [
        [gemm.error for gemm in Engine(model, torch.bfloat16, clips=clips).report().products] for clips in (None, black)
    ]
    assert errors[0] != errors[1]


def test_report_without_its_model() -> None:
    engine = Engine(small_model(), torch.bfloat16)
    report = engine.report()
    assert report.products
    assert report.video_error is report.video_cosine is report.top1_agreement is None


def test_report_of_float32_names_no_gemm(model: XCLIP) -> None:
    report = Engine(model, torch.float32).report()
    assert report.products == ()
    assert report.video_error == 0
    assert report.top1_agreement == 1


@torch.inference_mode()
def test_report_counts_the_answers_that_agree() -> None:
    model, video, labels = small_model(vocab_size=514), random_video(6), ["a cat", "a dog", "two dogs"]
    engine, tokens = Engine(model, torch.bfloat16), get_tokenizer(514)(["a cat", "a dog", "two dogs"], 20)
    with torch.no_grad():
        # another model by now: some answers differ
        model.mit.resblocks[0].mlp.c_proj.weight.mul_(-4)
    agree = (engine(video, tokens).argmax(-1) == model(video, tokens).argmax(-1)).float().mean().item()
    assert agree < 1
    for classes in (labels, tokens):
        assert engine.report(video, classes).top1_agreement == pytest.approx(agree)
    assert engine.report(video).video_cosine < 0.99  # type: ignore[operator]


def test_smoothing_parts_the_range_of_a_channel_evenly() -> None:
    seen = [torch.tensor([[16.0, 1.0, 0.0, 4.0], [-2.0, 0.0, 0.0, 1.0]]), torch.tensor([[1.0, -4.0, 0.0, 4.0]])]
    weight = torch.tensor([[1.0, 1.0, 1.0, 0.0], [-0.25, 0.5, 0.0, 0.0]], dtype=torch.float64)
    # a channel without numbers on one of the sides stays as it is
    assert budget._smoothing(seen, weight).tolist() == [4.0, 2.0, 1.0, 1.0]


def test_error_of_a_gemm_is_that_of_its_worst_rows() -> None:
    weight, low = torch.randn(32, 16), torch.randn(32, 16)
    recorder = budget._Recorder(PlainLinear(weight, None))
    rows = [torch.randn(5, 16), torch.randn(7, 16)]
    truth = [recorder(x) for x in rows]
    errors = [((linear(x, low) - exact).norm() / exact.norm()).item() for x, exact in zip(rows, truth, strict=True)]
    found = budget._largest_error(recorder, PlainLinear(low, None), torch.float32, None)
    assert found == pytest.approx(max(errors), rel=1e-4)
    assert max(errors) > 1.01 * min(errors)


@needs_int8
def test_calibration_sees_every_clip(monkeypatch: pytest.MonkeyPatch) -> None:
    # in parts of one video
    monkeypatch.setattr(cpu, "CHUNK_ROWS", 4 * 17)
    model, clips = small_model(), random_video(2)
    clips[1] = 255
    found = []
    for order in (clips, clips.flip(0), clips[:1]):
        packing = Packing(torch.device("cpu"), torch.float32, CPU_REWRITES, "int8")
        check_gemms(model, packing, order)
        found.append({place: share.tolist() for place, share in packing.smoothing.items()})
    assert found[0] == found[1] != found[2]


@pytest.mark.parametrize("dtype", [torch.bfloat16, INT8], ids=str)
def test_engine_is_calibrated_on_the_clips_it_is_given(dtype: torch.dtype) -> None:
    model = small_model()
    clips = torch.full((1, 3, 32, 32, 3), 200, dtype=torch.uint8)
    clips[:, :, ::2] = 10
    engine = Engine(model, dtype, clips=clips)
    errors, _ = check_gemms(model, replace(engine._packing, fallback={}, smoothing={}), clips)
    assert engine.report().products == tuple(errors) != Engine(model, dtype).report().products


@torch.inference_mode()
def test_report_is_of_all_clips_and_of_the_worst() -> None:
    model, clips = small_model(), random_video(5)
    engine = Engine(model, torch.bfloat16)
    report, truth = engine.report(clips), model.encode_video(clips).video
    found = engine.encode_video(clips).video.float()
    cosines = cosine_similarity(found, truth, dim=-1)
    assert report.video_error == pytest.approx(((found - truth).norm() / truth.norm()).item(), rel=1e-2)
    assert 1 - report.video_cosine == pytest.approx(1 - cosines.min().item(), rel=5e-2)


@needs_int8
def test_bytes_share_a_scale_with_no_other_video() -> None:
    model, packing = small_model(), Packing(torch.device("cpu"), torch.float32, CPU_REWRITES, "int8")
    for frames in (1, 4):
        parts = CpuTower(model.visual, model.config, packing).embed(random_video(3, frames))
        assert [part.shape[:2] for part in parts] == [(1, frames)] * 3


def test_both_gemms_of_an_mlp_leave_float16_together() -> None:
    # hidden rows that one gives in float16 would not reach the other in float32
    model = small_model()
    model.visual.transformer.resblocks[1].mlp.c_proj.weight[0, 0] = 1e6
    report = Engine(model, torch.float16).report()
    assert [product.place for product in report.products if product.fell_back] == ["blocks.1.fc", "blocks.1.projection"]


@torch.inference_mode()
def test_prompts_are_exact_in_half_precision_on_the_cpu() -> None:
    model, engine = small_model(), Engine(small_model(), torch.bfloat16)
    features, texts = engine.encode_video(random_video()), engine.encode_texts(random_tokens())
    exact = VideoFeatures(*(part.double() for part in features))
    truth = model.double().logits(exact, texts.features.double())
    assert relative_error(engine.logits(features, texts), truth) < 1e-5
