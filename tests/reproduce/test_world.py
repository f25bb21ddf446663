"""Each word of a class is in the clip, and only where it should be."""

from __future__ import annotations

import numpy as np
import pytest

from xclip_fast.reproduce import world
from xclip_fast.reproduce.world import CLASSES, CUE, FRAMES, NOT_A_SHAPE, PATTERNS, SHAPES

LABELS = np.arange(20 * len(CLASSES)) % len(CLASSES)
TARGETS = np.array(CLASSES)[LABELS]


@pytest.fixture(scope="module")
def layout() -> world.Layout:
    return world.lay_out(LABELS, np.random.default_rng(3))


def test_one_shape_of_each_later_frame_has_the_cues_colour_and_the_classs_kind(layout: world.Layout) -> None:
    assert (layout.kinds[:, 0, 0] == CUE).all()
    assert (layout.kinds[:, 0, 1:] == NOT_A_SHAPE).all()
    for clip in range(len(LABELS)):
        shown = layout.kinds[clip, 1:] != NOT_A_SHAPE
        for frame in range(FRAMES - 1):
            meant = shown[frame] & (layout.colours[clip] == layout.colours[clip, 0])
            assert layout.kinds[clip, 1 + frame, meant].tolist() == [TARGETS[clip, 0]]


def test_without_the_cue_any_of_the_shapes_could_be_meant(layout: world.Layout) -> None:
    several = (layout.kinds[:, 1] != NOT_A_SHAPE).sum(axis=1)
    assert sorted(set(several.tolist())) == [1, 2, 3, 4]
    # nothing but the cue sets the shape that is meant apart: the colour, as random as all others
    assert len(np.unique(layout.colours[:, 0])) == len(world.COLOURS)


def test_a_clip_that_shrinks_has_the_sizes_of_one_that_grows_backwards(layout: world.Layout) -> None:
    growing, shrinking = layout.sizes[TARGETS[:, 1] == 0, 1:], layout.sizes[TARGETS[:, 1] == 1, 1:]
    assert (np.diff(growing, axis=1) > 0).all()
    assert (growing == growing[0]).all()
    assert (shrinking == growing[0, ::-1]).all()
    assert (layout.sizes[:, 0] == layout.sizes[0, 0]).all()


def test_every_frame_shows_all_patterns_and_the_classs_alone_stays(layout: world.Layout) -> None:
    assert (np.sort(layout.patterns, axis=1) == np.arange(len(PATTERNS))).all()
    assert (layout.patterns[:, 0] == TARGETS[:, 2]).all()
    stays = (layout.tiles == layout.tiles[:, :1]).all(axis=1)
    assert stays[:, 0].all()
    # by chance a tile is where it was in all frames once in 3,375 times
    assert stays[:, 1:].mean() < 0.01


def test_nothing_hides_anything(layout: world.Layout) -> None:
    cells = np.concatenate([layout.places, layout.tiles], axis=2)
    assert all(len(set(frame)) == len(frame) for frame in cells.reshape(-1, cells.shape[2]).tolist())


def test_the_same_seed_gives_the_same_bytes_and_another_one_others() -> None:
    first, again, other = (world.make_clips(LABELS[:4], np.random.default_rng(seed)) for seed in (1, 1, 2))
    assert first.shape == (4, FRAMES, world.SIZE, world.SIZE, 3)
    assert first.dtype == np.uint8
    assert np.array_equal(first, again)
    assert not np.array_equal(first, other)


def test_pixels_show_what_the_layout_says() -> None:
    """A cell with a shape is as bright as its paint in the middle, and the cells around keep the background."""
    red, square = world.COLOURS.index("red"), SHAPES.index("square")
    one = np.zeros((1, 1, 1), dtype=np.int64)
    layout = world.Layout(one + square, one[0] + red, one[0] + 4, one + 5, one[0], one + 10)
    frame = world._render(layout, np.random.default_rng(0))[0, 0].astype(int)
    middle = frame[10:14, 10:14].mean(axis=(0, 1))
    assert abs(middle - (230, 50, 50)).max() < 30
    corner = frame[:8, :8]
    assert 20 < corner.mean() < 90
    tile = frame[16:24, 16:24].mean(axis=2)
    # stripes: bright and dark pairs of rows
    assert tile[:2].mean() - tile[2:4].mean() > 60
    assert abs(tile[:, :2].mean() - tile[:, 2:4].mean()) < 15


def test_unseen_classes_are_a_third_and_each_of_their_words_is_seen() -> None:
    unseen = [one for one in CLASSES if one.unseen]
    assert 3 * len(unseen) == len(CLASSES)
    for part, words in zip(range(3), (SHAPES, world.MOTIONS, PATTERNS), strict=True):
        for values in ({one[part] for one in unseen}, {one[part] for one in CLASSES if not one.unseen}):
            assert values == set(range(len(words)))


def test_captions_name_what_a_still_shows() -> None:
    stills, captions = world.make_stills(400, np.random.default_rng(0), share=1.0)
    assert stills.shape == (400, world.SIZE, world.SIZE, 3)
    words = set(" ".join(captions).split())
    assert words == set(world.WORDS) - set(world.MOTIONS)
    assert {len(caption.split()) for caption in captions} == {5, 6}
    _, shorter = world.make_stills(400, np.random.default_rng(0))
    assert {len(caption.split()) for caption in shorter} == {2, 3, 4, 5, 6}
    red = [" red " in caption for caption in captions]
    brightest = stills.reshape(400, -1, 3).astype(int)
    redness = (brightest[:, :, 0] - brightest[:, :, 1:].max(axis=2)).max(axis=1)
    assert redness[red].min() > redness[[not one for one in red]].mean()
