"""Augmentations: the official crops, one decision for all frames of a clip, and clips as tests take them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from xclip_fast.data import Augmentation
from xclip_fast.data.augment import Decision, decide
from xclip_fast.demo.mp4 import write_mp4
from xclip_fast.video import Sampling, preprocess, read_frames

pytest.importorskip("torchvision")
pytest.importorskip("av")

from xclip_fast.data.clips import _colored, _cropped, load_clip

ALWAYS = Augmentation(flip=1.0, color_jitter=1.0, gray=0.0)


def decisions(augmentation: Augmentation, count: int) -> list[Decision]:
    return [decide(augmentation, np.random.default_rng(number)) for number in range(count)]


@pytest.fixture(scope="module")
def picture_clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A clip of 12 frames of 60 x 80 that change with time, and from left to right."""
    y, x = np.mgrid[:60, :80]
    frames = np.stack([np.stack([x * 3, y * 2 + 5 * time, x + y], -1) for time in range(12)])
    path = tmp_path_factory.mktemp("pictures") / "clip.mp4"
    write_mp4(path, frames.astype(np.uint8))
    return path


@pytest.mark.parametrize(("height", "width"), [(256, 340), (455, 256), (256, 256), (36, 48)])
def test_crops_are_those_of_the_official_recipe(height: int, width: int) -> None:
    short = min(height, width)
    sizes = [int(short * scale) for scale in (1, 0.875, 0.75, 0.66)]
    expected = set()
    for row, high in enumerate(sizes):
        for column, wide in enumerate(sizes):
            if abs(row - column) <= 1:
                down, right = (height - high) // 4, (width - wide) // 4
                places = [(0, 0), (0, 4 * right), (4 * down, 0), (4 * down, 4 * right), (2 * down, 2 * right)]
                expected |= {(top, left, high, wide) for top, left in places}
    found = {one.box(height, width) for one in decisions(Augmentation(), 1000)}
    assert found == expected


def test_crops_are_drawn_alike_often_and_the_rest_as_often_as_asked() -> None:
    count = 4000
    drawn = decisions(Augmentation(), count)
    pairs = Counter((one.scales, one.corner) for one in drawn)
    assert len(pairs) == 50
    assert max(pairs.values()) < 2 * count / 50
    for share, seen in ((0.5, [one.flip for one in drawn]), (0.8, [bool(one.colors) for one in drawn])):
        assert sum(seen) / count == pytest.approx(share, abs=0.03)
    assert sum(one.gray for one in drawn) / count == pytest.approx(0.2, abs=0.03)
    orders = Counter(tuple(name for name, _ in one.colors) for one in drawn if one.colors)
    assert len(orders) == 24
    factors = [dict(one.colors) for one in drawn if one.colors]
    for name, low, high in (("brightness", 0.6, 1.4), ("contrast", 0.6, 1.4), ("saturation", 0.8, 1.2)):
        seen = [one[name] for one in factors]
        assert (min(seen), max(seen)) == (pytest.approx(low, abs=0.01), pytest.approx(high, abs=0.01))
    hues = [one["hue"] for one in factors]
    assert (min(hues), max(hues)) == (pytest.approx(-0.1, abs=0.01), pytest.approx(0.1, abs=0.01))


def test_one_probability_changes_nothing_else() -> None:
    for one, other in zip(decisions(Augmentation(), 50), decisions(Augmentation(flip=0.0), 50), strict=True):
        assert (one.scales, one.corner, one.colors, one.gray) == (other.scales, other.corner, other.colors, other.gray)
        assert not other.flip


def test_all_frames_of_a_clip_are_treated_alike() -> None:
    frame = torch.randint(0, 256, (1, 60, 80, 3), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    seen = set()
    for number, decision in enumerate(decisions(Augmentation(gray=0.3), 40)):
        clip = _colored(torch.cat([_cropped(frame, 32, decision) for _ in range(5)]), decision)
        assert clip.shape == (5, 32, 32, 3)
        assert (clip == clip[:1]).all(), number
        seen.add(clip[0].numpy().tobytes())
        gray = (clip[..., :1] == clip).all()
        assert bool(gray) == decision.gray
    assert len(seen) == 40


def test_without_augmentation_it_is_the_centre_crop_of_tests(picture_clip: Path) -> None:
    options = {"frames": 4, "size": 32, "backend": "auto"}
    found = load_clip(str(picture_clip), **options, augmentation=vars(Augmentation.none()), seed=[1, 2, 3, 0])
    frames = read_frames(picture_clip, sample=Sampling(4, generator=np.random.default_rng([1, 2, 3, 0, 0])))
    assert torch.equal(found, preprocess(frames, size=32))


def test_frames_are_drawn_one_from_each_segment(picture_clip: Path) -> None:
    def greens(seed: int) -> list[float]:
        options = {"frames": 4, "size": 32, "backend": "auto", "augmentation": vars(Augmentation.none())}
        return load_clip(str(picture_clip), **options, seed=[seed])[0, ..., 1].float().mean((1, 2)).tolist()

    # green grows by five with each frame
    start = read_frames(picture_clip)[..., 1].mean((1, 2))
    numbers = [[int(np.abs(start - value).argmin()) for value in greens(seed)] for seed in range(30)]
    for place in range(4):
        assert {one[place] for one in numbers} == set(range(3 * place, 3 * place + 3))


def test_mirrored_always_or_never(picture_clip: Path) -> None:
    options = {"frames": 2, "size": 32, "backend": "auto"}
    for flip in (0.0, 1.0):
        augmentation = vars(Augmentation(flip=flip, color_jitter=0.0, gray=0.0))
        for seed in range(12):
            red = load_clip(str(picture_clip), **options, augmentation=augmentation, seed=[seed])[..., 0].float()
            # it grows from left to right
            assert (red[..., :8].mean() < red[..., -8:].mean()) == (flip == 0.0)


def test_the_number_of_threads_changes_nothing(picture_clip: Path) -> None:
    options = {"frames": 4, "size": 224, "backend": "auto", "augmentation": vars(ALWAYS)}
    before = torch.get_num_threads()
    found = []
    try:
        for threads in (1, 3):
            torch.set_num_threads(threads)
            found.append(load_clip(str(picture_clip), **options, seed=[5]))
            assert torch.get_num_threads() == threads
    finally:
        torch.set_num_threads(before)
    assert torch.equal(*found)


def test_tiny_pictures_and_tiny_sizes(grey_clip: Callable[[int], Path]) -> None:
    for size in (1, 2):
        for seed in range(10):
            found = load_clip(
                str(grey_clip(90)), frames=2, size=size, backend="auto", augmentation=vars(ALWAYS), seed=[seed]
            )
            assert found.shape == (1, 2, size, size, 3)


@pytest.mark.parametrize("wrong", [{"flip": 1.5}, {"color_jitter": -0.1}, {"gray": float("nan")}])
def test_probabilities_are_checked(wrong: dict[str, float]) -> None:
    with pytest.raises(ValueError, match="must be a probability from 0 to 1"):
        Augmentation(**wrong)
