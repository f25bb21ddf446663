import numpy as np
import pytest
import torch
from PIL import Image
from transformers import VideoMAEImageProcessor

from xclip_fast import InputError
from xclip_fast.config import CLIP_MEAN, CLIP_STD, IMAGENET_MEAN, IMAGENET_STD
from xclip_fast.video import PRESETS, normalise, preprocess

SIZES = [(240, 320), (340, 256), (97, 131), (225, 301), (60, 80), (224, 224), (17, 1), (1, 1), (131, 97)]


def frames(height, width, count=2):
    rng = np.random.default_rng(0)
    coarse = rng.integers(0, 256, (count, height // 5 + 1, width // 5 + 1, 3), dtype=np.uint8)
    return coarse.repeat(5, 1).repeat(5, 2)[:, :height, :width].copy()


def bilinear(picture, height, width):
    """The plain formula: each pixel from the four around it, sample points at pixel centres, edges repeated."""

    def places(new, old):
        position = np.clip((np.arange(new) + 0.5) * old / new - 0.5, 0, old - 1)
        low = np.floor(position).astype(int)
        return low, np.minimum(low + 1, old - 1), position - low

    y0, y1, fy = places(height, picture.shape[0])
    x0, x1, fx = places(width, picture.shape[1])
    rows = picture[y0] * (1 - fy)[:, None, None] + picture[y1] * fy[:, None, None]
    return rows[:, x0] * (1 - fx)[:, None] + rows[:, x1] * fx[:, None]


@pytest.mark.parametrize(("height", "width"), SIZES)
def test_official_is_bilinear_without_antialias(height, width):
    video = frames(height, width)
    found = preprocess(video, "official", 224)[0].numpy().astype(float)
    short = min(height, width)
    new_h, new_w = (int(side * 256 / short + 0.5) for side in (height, width))
    top, left = (new_h - 224) // 2, (new_w - 224) // 2
    for one, picture in zip(found, video, strict=True):
        expected = bilinear(picture.astype(float), new_h, new_w)[top : top + 224, left : left + 224]
        # half a grey level of rounding, and float32
        assert np.abs(one - expected).max() < 0.51


@pytest.mark.parametrize(("height", "width"), SIZES)
def test_hf_is_what_the_hf_processor_gives(height, width):
    processor = VideoMAEImageProcessor(
        size={"shortest_edge": 224},
        crop_size={"height": 224, "width": 224},
        image_mean=list(IMAGENET_MEAN),
        image_std=list(IMAGENET_STD),
    )
    video = frames(height, width)
    expected = processor(list(video), return_tensors="pt", input_data_format="channels_last")["pixel_values"][0]
    found = normalise(preprocess(video, "hf", 224), "hf")[0]
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize(("height", "width"), SIZES)
def test_clip_is_the_bicubic_resize_of_pillow(height, width):
    video = frames(height, width)
    short = min(height, width)
    new_h, new_w = int(224 * height / short), int(224 * width / short)
    top, left = round((new_h - 224) / 2), round((new_w - 224) / 2)
    found = preprocess(video, "clip", 224)[0].numpy().astype(int)
    for one, picture in zip(found, video, strict=True):
        expected = np.asarray(Image.fromarray(picture).resize((new_w, new_h), Image.Resampling.BICUBIC))
        # both round their filter weights, to other numbers of bits
        assert np.abs(one - expected[top : top + 224, left : left + 224].astype(int)).max() <= 2


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize(("height", "width"), SIZES)
@pytest.mark.parametrize("crops", [1, 3])
def test_shapes_and_types(preset, height, width, crops):
    found = preprocess(frames(height, width), preset, 64, crops)
    assert found.shape == (crops, 2, 64, 64, 3)
    assert found.dtype == torch.uint8
    assert found.is_contiguous()


@pytest.mark.parametrize("preset", PRESETS)
def test_three_crops_lie_left_middle_right_or_top_middle_bottom(preset):
    # already as large as the resize makes it: crops must be pixels of the video
    wide = frames(64, 101)
    assert (preprocess(wide, preset, 64, 3).numpy() == np.stack([wide[:, :, x : x + 64] for x in (0, 18, 36)])).all()
    tall = frames(101, 64)
    assert (preprocess(tall, preset, 64, 3).numpy() == np.stack([tall[:, y : y + 64] for y in (0, 18, 36)])).all()


@pytest.mark.parametrize(("size", "margin"), [(224, 256), (336, 384), (64, 73)])
def test_official_margin_grows_with_the_crop(size, margin):
    assert PRESETS["official"].short_side(size, 1) == margin
    assert PRESETS["official"].short_side(size, 3) == size
    assert PRESETS["hf"].short_side(size, 1) == size


def test_a_frame_alone_gives_what_it_gives_in_company():
    video = frames(90, 120, count=5)
    for preset in PRESETS:
        alone = torch.cat([preprocess(frame[None], preset, 64, 3) for frame in video], dim=1)
        assert torch.equal(preprocess(video, preset, 64, 3), alone)
        assert torch.equal(preprocess(torch.from_numpy(video), preset, 64, 3), alone)


def test_frames_are_left_as_they_were():
    video = frames(64, 64)
    before = video.copy()
    for preset in PRESETS:
        preprocess(video, preset, 32)[:] = 0
        preprocess(video, preset, 64)[:] = 0
    assert (video == before).all()


@pytest.mark.parametrize(
    ("preset", "mean", "std"),
    [("official", IMAGENET_MEAN, IMAGENET_STD), ("hf", IMAGENET_MEAN, IMAGENET_STD), ("clip", CLIP_MEAN, CLIP_STD)],
)
def test_normalise(preset, mean, std):
    video = torch.from_numpy(frames(12, 10, count=6)).reshape(2, 3, 12, 10, 3)
    found = normalise(video, preset)
    assert found.shape == (2, 3, 3, 12, 10)
    assert found.dtype == torch.float32
    assert found.is_contiguous()
    expected = (video.double() / 255 - torch.tensor(mean).double()) / torch.tensor(std).double()
    torch.testing.assert_close(found.double(), expected.permute(0, 1, 4, 2, 3), rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    "wrong",
    [
        np.zeros((2, 8, 8, 3), np.float32),
        np.zeros((8, 8, 3), np.uint8),
        np.zeros((2, 3, 8, 8), np.uint8),
        np.zeros((0, 8, 8, 3), np.uint8),
        np.zeros((2, 0, 8, 3), np.uint8),
    ],
)
def test_other_frames_are_refused(wrong):
    with pytest.raises(ValueError, match=r"frames must be uint8 \(T, H, W, 3\), found"):
        preprocess(wrong)


def test_other_options_are_refused():
    video = frames(8, 8)
    with pytest.raises(InputError, match="no preprocessing preset 'timm'; choose official, hf, clip"):
        preprocess(video, "timm")
    with pytest.raises(InputError, match="no preprocessing preset"):
        normalise(torch.from_numpy(video), "timm")
    with pytest.raises(ValueError, match="crops must be 1 or 3"):
        preprocess(video, crops=2)
    with pytest.raises(ValueError, match="size must be a positive integer"):
        preprocess(video, size=0)
    with pytest.raises(ValueError, match="frames must be uint8"):
        normalise(torch.zeros(2, 8, 8, 3))
