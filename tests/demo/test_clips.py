"""The synthetic clips: reproducible, what their class says, and the same frames in both classes of a pair."""

from __future__ import annotations

import numpy as np
import pytest

from xclip_fast.demo.clips import (
    CLASSES,
    FRAMES,
    HELD_OUT,
    PAIRS,
    SAMPLED,
    SIZE,
    TRAINING,
    VALIDATION,
    draw_track,
    make_clip,
)
from xclip_fast.video.sampling import uniform_indices

EACH_PAIR = pytest.mark.parametrize("pair", range(len(PAIRS)), ids=[pair[0].replace(" ", "-") for pair in PAIRS])
SEEDS = range(12)


def shape_pixels(frame: np.ndarray) -> np.ndarray:
    """Where the shape is: paint is at least 150 in each channel, the dark behind it at most 110 and a texture."""
    return frame.mean(axis=-1) > 135


def test_clip_is_uint8_frames() -> None:
    clip = make_clip(0, 0)
    assert clip.shape == (FRAMES, SIZE, SIZE, 3)
    assert clip.dtype == np.uint8


def test_same_arguments_same_bytes() -> None:
    for label in range(len(CLASSES)):
        assert np.array_equal(make_clip(label, 5), make_clip(label, 5))


def test_seed_and_set_make_another_clip() -> None:
    clips = [make_clip(0, seed, split) for split in (TRAINING, VALIDATION, HELD_OUT) for seed in (0, 1, 2)]
    assert len({clip.tobytes() for clip in clips}) == len(clips)


def test_some_frames_are_those_of_the_whole_clip() -> None:
    wanted = [39, 0, 7, 7]
    for label in range(len(CLASSES)):
        assert np.array_equal(make_clip(label, 3, frames=wanted), make_clip(label, 3)[wanted])


def test_sampled_frames_mirror() -> None:
    frames = uniform_indices(FRAMES, SAMPLED)
    assert np.array_equal(frames, FRAMES - 1 - frames[::-1])


@EACH_PAIR
def test_partner_is_the_reversal(pair: int) -> None:
    for seed in SEEDS:
        assert np.array_equal(make_clip(2 * pair + 1, seed), make_clip(2 * pair, seed)[::-1])


@EACH_PAIR
def test_partners_show_the_model_the_same_frames(pair: int) -> None:
    frames = uniform_indices(FRAMES, SAMPLED)
    for seed in SEEDS:
        one, other = (make_clip(label, seed, frames=frames) for label in (2 * pair, 2 * pair + 1))
        assert sorted(map(bytes, one)) == sorted(map(bytes, other))
        assert not np.array_equal(one, other)


@EACH_PAIR
def test_only_the_event_of_the_pair_has_a_direction(pair: int) -> None:
    # the drift that tells nothing: over many clips it goes either way about as often
    tracks = [draw_track(pair, np.random.default_rng([99, seed])) for seed in range(400)]
    travels = {
        0: [track.x[-1] - track.x[0] for track in tracks],
        1: [track.y[-1] - track.y[0] for track in tracks],
        2: [track.radius[-1] - track.radius[0] for track in tracks],
    }
    for what, travel in travels.items():
        if what == pair:
            assert min(travel) >= 7
        else:
            # four standard deviations around a half, for 400 throws
            assert abs(np.mean(np.sign(travel))) < 0.2


def test_motion_is_what_the_class_says() -> None:
    for seed in SEEDS:
        for pair, axis in ((0, 1), (1, 0)):
            first, last = (np.nonzero(shape_pixels(frame))[axis].mean() for frame in make_clip(2 * pair, seed)[[0, -1]])
            assert last - first > 10
        first, last = (shape_pixels(frame).sum() for frame in make_clip(4, seed)[[0, -1]])
        assert last > 1.5 * first


def test_disc_comes_before_ring() -> None:
    for seed in SEEDS:
        for frame, filled in zip(make_clip(6, seed)[[0, -1]], (True, False), strict=True):
            rows, columns = np.nonzero(shape_pixels(frame))
            assert shape_pixels(frame)[int(rows.mean()), int(columns.mean())] == filled


def test_shape_stays_in_the_picture() -> None:
    for pair in range(len(PAIRS)):
        for seed in range(200):
            track = draw_track(pair, np.random.default_rng(seed))
            assert min(track.x.min(), track.y.min()) > 11
            assert max(track.x.max(), track.y.max()) < SIZE - 11
            assert track.radius.min() > 3
