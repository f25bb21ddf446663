"""Synthetic clips in which only time tells the classes apart.

Classes come in pairs: a clip of the second class is a clip of the first one played backwards, frame for frame. Both
classes have the same frames, so whatever ignores their order gives both the same answer: half of its answers within a
pair are right, whatever it learned. The frames that test sampling takes mirror too, because N / T = 5 is odd.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

SIZE = 64  # pixels: the side of a clip, and of the model's input
FRAMES = 40  # in a clip, N
SAMPLED = 8  # of them the model sees, T

PAIRS = (
    ("a shape moving right", "a shape moving left"),
    ("a shape moving down", "a shape moving up"),
    ("a shape growing", "a shape shrinking"),
    ("a disc, then a ring", "a ring, then a disc"),
)
CLASSES = tuple(text for pair in PAIRS for text in pair)

# the first word of a clip's seed: no clip is in two sets. The recipe was chosen on the second, the demo shows the third
TRAINING, VALIDATION, HELD_OUT = range(3)

_DISC, _SQUARE, _DIAMOND, _RING = range(4)
_MARGIN = 12  # pixels between the centre of a shape and the border
_NOISE_ROOM = 32  # pixels the noise of two frames may be apart


class Track(NamedTuple):
    """What the shape does in each frame: its centre and radius in pixels, and its kind; all (N,)."""

    x: NDArray[np.float64]
    y: NDArray[np.float64]
    radius: NDArray[np.float64]
    kind: NDArray[np.int64]


def make_clip(label: int, seed: int, split: int = HELD_OUT, frames: ArrayLike | None = None) -> NDArray[np.uint8]:
    """One clip; the same arguments give the same bytes.

    Position, size, speed, shape, colours, texture and noise are random, and none depends on the direction of time.

    Args:
        label: index in ``CLASSES``. With equal seeds, the clips of two partners are each other's reversal.
        seed: number of the clip in its set.
        split: ``TRAINING``, ``VALIDATION`` or ``HELD_OUT``.
        frames: numbers of the frames to draw, (F,); by default all.

    Returns:
        uint8 (F, SIZE, SIZE, 3) RGB.
    """
    pair, backwards = divmod(label, 2)
    rng = np.random.default_rng([split, pair, seed])
    track = draw_track(pair, rng)
    wanted = np.arange(FRAMES) if frames is None else np.asarray(frames)
    return _render(track, rng, FRAMES - 1 - wanted if backwards else wanted)


def draw_track(pair: int, rng: np.random.Generator) -> Track:
    """What happens in a random clip of the first class of a pair."""
    time = np.linspace(-0.5, 0.5, FRAMES)
    radius = np.full(FRAMES, rng.uniform(6, 11))
    kind = np.full(FRAMES, rng.integers(_RING))
    # a drift that tells nothing: one direction is as likely as the other
    travel = rng.uniform(-4, 4, size=2)
    if pair in (0, 1):
        travel[pair] = rng.uniform(20, SIZE - 2 * _MARGIN)
    elif pair == 2:
        radius = rng.uniform(9, 11) + time * rng.uniform(7, 11)
    else:
        before = time < rng.uniform(-0.2, 0.2)
        first, second = rng.uniform(7, 12, size=2)
        radius = np.where(before, first, second)
        kind = np.where(before, _DISC, _RING)
    reach = SIZE / 2 - _MARGIN - abs(travel) / 2
    x, y = (SIZE / 2 + rng.uniform(-reach, reach) + travel * time[:, None]).T
    return Track(x, y, radius, kind)


def _render(track: Track, rng: np.random.Generator, frames: NDArray[np.int64]) -> NDArray[np.uint8]:
    # dark behind bright: a model this small learns it in minutes
    dark, bright = rng.uniform(20, 95, size=3), rng.uniform(150, 245, size=3)
    background = dark.astype(np.float32) + _texture(rng)
    paint = bright.astype(np.float32)
    noise = rng.normal(scale=5, size=(SIZE + _NOISE_ROOM, SIZE + _NOISE_ROOM, 1)).astype(np.float32)
    # each frame shows another window of one noise
    corners = rng.integers(_NOISE_ROOM, size=(FRAMES, 2))[frames]
    windows = np.stack([noise[row : row + SIZE, column : column + SIZE] for row, column in corners])
    cover = _cover(track, frames)[..., None]
    return np.clip(background * (1 - cover) + paint * cover + windows, 0, 255).astype(np.uint8)


def _cover(track: Track, frames: NDArray[np.int64]) -> NDArray[np.float32]:
    """How much of each pixel the shape covers, (F, SIZE, SIZE); its edges are soft, so that it moves smoothly."""
    pixels = np.arange(SIZE, dtype=np.float32) + 0.5
    # [F, 1, 1]
    x, y, radius = (values[frames, None, None].astype(np.float32) for values in track[:3])
    kind = track.kind[frames, None, None]
    dx, dy = abs(pixels - x), abs(pixels[:, None] - y)
    circle = np.hypot(dx, dy)
    # shapes of one radius have similar areas
    distance = np.choose(kind, [circle, 1.13 * np.maximum(dx, dy), 0.8 * (dx + dy), circle])
    hole = np.where(kind == _RING, 0.6 * radius, -1)
    return np.clip(radius - distance + 0.5, 0, 1) - np.clip(hole - distance + 0.5, 0, 1)


def _texture(rng: np.random.Generator, cells: int = 8) -> NDArray[np.float32]:
    """A still texture (SIZE, SIZE, 3): coarse noise, interpolated."""
    places = np.linspace(0, cells, SIZE)[:, None]
    weights = np.clip(1 - abs(places - np.arange(cells + 1)), 0, 1)
    coarse = rng.normal(scale=14, size=(3, cells + 1, cells + 1))
    return (weights @ coarse @ weights.T).transpose(1, 2, 0).astype(np.float32)
