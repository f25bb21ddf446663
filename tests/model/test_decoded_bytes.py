"""Decoded bytes reach the patch embedding as they are: no copy of floats on the way, the same answers."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from numerics import TOLERANCES, assert_within, randomise_parameters
from torch import Tensor

from xclip_fast import XCLIPConfig, create_model, layers, pipeline
from xclip_fast.video.preprocess import preprocess

CONFIG = XCLIPConfig(
    image_size=48,
    patch_size=16,
    vision_width=128,
    vision_layers=2,
    embed_dim=64,
    vocab_size=64,
    text_width=64,
    text_layers=1,
    frames=4,
    pixel_mean=(0.3, 0.5, 0.6),
    pixel_std=(0.2, 0.3, 0.25),
)
LIMIT = TOLERANCES[torch.float32].model


@pytest.fixture
def model() -> Any:
    return randomise_parameters(create_model(CONFIG))


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> list[Tensor]:
    """The frames that reach the op."""
    found: list[Tensor] = []

    def spy(frames: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        found.append(frames)
        return original(frames, *args, **kwargs)

    original = layers.vision.patch_embed
    monkeypatch.setattr(layers.vision, "patch_embed", spy)
    return found


def test_bytes_and_normalised_frames_give_the_same_answers(model: Any) -> None:
    video = torch.randint(0, 256, (2, 4, 48, 48, 3), dtype=torch.uint8)
    normalised = model.normalise(video)
    for name, found, expected in zip(
        ("video", "patches"), model.encode_video(video), model.encode_video(normalised), strict=True
    ):
        assert_within(found, expected, LIMIT, what=f"model {name} from bytes")


def test_the_model_hands_on_the_memory_it_is_given(model: Any, seen: list[Tensor]) -> None:
    wide = torch.randint(0, 256, (2, 4, 60, 70, 3), dtype=torch.uint8)
    crop = wide[:, :, 5:53, 9:57]
    expected = model.encode_video(crop.contiguous())
    found = model.encode_video(crop)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    assert seen[1].dtype == torch.uint8
    assert seen[1].data_ptr() == crop.data_ptr()


@pytest.mark.parametrize("crops", [1, 3])
def test_from_decoded_frames_to_features_in_bytes(crops: int, model: Any, seen: list[Tensor]) -> None:
    decoded = np.random.default_rng(0).integers(0, 256, (4, 90, 60, 3), dtype=np.uint8)
    views = preprocess(decoded, "clip", size=48, crops=crops)
    features = pipeline.embed(model, views)
    assert {frames.dtype for frames in seen} == {torch.uint8}
    normalised = [model.encode_video(model.normalise(view[None])).video for view in views]
    assert_within(features.video, torch.cat(normalised).mean(0), LIMIT, what="pipeline from bytes")


def test_gradients_flow_from_bytes_to_every_parameter_of_the_patches(model: Any) -> None:
    video = torch.randint(0, 256, (2, 4, 48, 48, 3), dtype=torch.uint8)
    names = [name for name, _ in model.visual.named_parameters() if not name.startswith(("transformer", "ln_post"))]
    names.remove("proj")
    leaves = [model.visual.get_parameter(name) for name in names]
    assert len(leaves) == 5
    found = torch.autograd.grad(model.encode_video(video).video.square().sum(), leaves)
    expected = torch.autograd.grad(model.encode_video(model.normalise(video)).video.square().sum(), leaves)
    for name, grad, exact in zip(names, found, expected, strict=True):
        assert_within(grad, exact, 10 * LIMIT, what=f"d {name} from bytes")


def test_patch_embed_takes_bytes_and_refuses_what_does_not_fit() -> None:
    layer = randomise_parameters(layers.PatchEmbed(24, 16, 48))
    frames = torch.randint(0, 256, (2, 48, 48, 3), dtype=torch.uint8)
    assert layer(frames).shape == (2, 10, 24)
    assert torch.equal(layer(frames.permute(0, 3, 1, 2)), layer(frames))
    for wrong, message in (
        (frames[:, :40], "multiples of 16, found 40x48"),
        (frames[:, :8, :8], "multiples of 16, found 8x8"),
        (frames[0], r"frames must be uint8 \(F, H, W, 3\)"),
    ):
        with pytest.raises(ValueError, match=message):
            layer(wrong)
