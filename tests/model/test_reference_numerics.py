"""The reference in every dtype, from both kinds of video, under autocast, and its gradients."""

from __future__ import annotations

import pytest
import torch
from numerics import EXACT, TOLERANCES, assert_within, randomise_parameters, relative_error
from torch import Tensor
from torch.nn.functional import cross_entropy

from xclip_fast.config import CLIP_MEAN, CLIP_STD, XCLIPConfig
from xclip_fast.reference import XCLIP

CONFIG = XCLIPConfig(
    image_size=32,
    patch_size=8,
    vision_width=128,
    vision_layers=2,
    embed_dim=64,
    context_length=12,
    vocab_size=50,
    text_width=64,
    text_layers=1,
    frames=4,
    pixel_mean=CLIP_MEAN,
    pixel_std=CLIP_STD,
)
TOKENS = torch.tensor([[1, 49, 0, 0], [2, 3, 49, 0], [4, 5, 6, 49]])
REDUCED = [torch.float32, torch.float16, torch.bfloat16]


def build(dtype: torch.dtype) -> XCLIP:
    return randomise_parameters(XCLIP(CONFIG)).to(dtype).eval()


def pixels(batch: int = 2, frames: int = 4, side: int = 32) -> Tensor:
    return torch.randint(256, (batch, frames, side, side, 3), dtype=torch.uint8)


@pytest.mark.parametrize("dtype", REDUCED, ids=str)
@pytest.mark.parametrize(("frames", "side"), [(4, 32), (6, 40)], ids=["trained size", "interpolated"])
@torch.inference_mode()
def test_parity_of_dtypes(dtype: torch.dtype, frames: int, side: int) -> None:
    video = pixels(frames=frames, side=side)
    model, truth = build(dtype), build(torch.float64)
    features, logits = model.encode_video(video), model(video, TOKENS)
    expected = truth.encode_video(video)
    limit = TOLERANCES[dtype].model
    assert {x.dtype for x in (*features, logits, model.encode_text(TOKENS))} == {dtype}
    assert_within(features.video, expected.video, limit, what="model: video feature against float64")
    assert_within(features.patches, expected.patches, limit, what="model: patch features against float64")
    assert_within(logits, truth(video, TOKENS), limit, what="model: logits against float64")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@torch.inference_mode()
def test_uint8_frames_equal_normalised_frames(dtype: torch.dtype) -> None:
    model, video = build(dtype), pixels()
    mean, std = torch.tensor(CLIP_MEAN, dtype=torch.float64), torch.tensor(CLIP_STD, dtype=torch.float64)
    normalised = ((video.double() / 255 - mean) / std).permute(0, 1, 4, 2, 3)
    limit = EXACT if dtype == torch.float64 else TOLERANCES[dtype].model
    assert relative_error(model(video, TOKENS), model(normalised.to(dtype), TOKENS)) < limit
    assert not video.is_floating_point()


@torch.inference_mode()
def test_float_video_of_another_dtype_is_cast_to_the_weights() -> None:
    model = build(torch.float32)
    video = torch.randn(2, 4, 3, 32, 32)
    assert torch.equal(model(video.double(), TOKENS), model(video, TOKENS))


@torch.inference_mode()
def test_layout_of_the_video_does_not_matter() -> None:
    model, video = build(torch.float64), pixels(frames=8)
    strided = video[:, ::2]
    turned = video[:, :4].transpose(2, 3)
    for view in (strided, turned, strided.flip(1)):
        assert relative_error(model(view, TOKENS), model(view.contiguous(), TOKENS)) < EXACT


def test_inputs_stay_as_they_were() -> None:
    model, video = build(torch.float32), torch.randn(2, 4, 3, 32, 32)
    tokens, copies = TOKENS.clone(), (video.clone(), TOKENS.clone())
    model(video, tokens)
    assert torch.equal(video, copies[0])
    assert torch.equal(tokens, copies[1])


@torch.inference_mode()
def test_autocast_runs_close_to_float32() -> None:
    model, video = build(torch.float32), pixels()
    with torch.autocast("cpu", torch.bfloat16):
        reduced = model(video, TOKENS)
    error = relative_error(reduced, model(video, TOKENS))
    assert 1e-5 < error < TOLERANCES[torch.bfloat16].model


def loss_of(model: XCLIP, video: Tensor) -> Tensor:
    return cross_entropy(model(video, TOKENS), torch.tensor([2, 0]))


def test_every_parameter_has_a_gradient() -> None:
    model = build(torch.float64)
    loss_of(model, pixels()).backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name
        assert parameter.grad.abs().max() > 1e-9, name


def test_gradients_equal_finite_differences() -> None:
    model, video = build(torch.float64), pixels()
    loss_of(model, video).backward()
    parameters, step = list(model.parameters()), 1e-6
    for _ in range(3):
        directions = [torch.randn_like(parameter) * parameter.abs().mean() for parameter in parameters]
        losses = []
        with torch.no_grad():
            for move in (step, -2 * step):
                torch._foreach_add_(parameters, directions, alpha=move)
                losses.append(loss_of(model, video).item())
            torch._foreach_add_(parameters, directions, alpha=step)
        slope = sum((p.grad * d).sum().item() for p, d in zip(parameters, directions, strict=True))
        assert (losses[0] - losses[1]) / (2 * step) == pytest.approx(slope, rel=1e-6)


def test_gradient_reaches_the_pixels() -> None:
    model = build(torch.float64)
    video = torch.randn(2, 4, 3, 32, 32, dtype=torch.float64, requires_grad=True)
    model.encode_video(video).video[0].sum().backward()
    assert video.grad is not None
    assert video.grad[0].abs().amax(dim=(1, 2, 3)).min() > 0
    # and no other video's
    assert not video.grad[1].any()
