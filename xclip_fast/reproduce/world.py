"""A world of shapes, colours, motions and patterns, in which each part of X-CLIP has something of its own to do.

A **clip** begins with a frame that shows one disc, the cue. The later frames show one to four shapes, of different
kinds and colours, and one tile of each pattern, all in other cells in each frame, but for one tile, which stays. The
class says three things, and what it takes to know them:

- the kind of the shape that has the cue's colour. A frame alone can't know which of its shapes is meant: it has to be
  told by another one, or to describe all of them in its one feature;
- whether the shapes grow or shrink. Played backwards the one is the other, frame for frame, so whatever ignores the
  order of the frames can't tell;
- the pattern that stays in its place. Every frame shows all patterns: only patch tokens averaged over time tell.

A **still** shows one shape and one tile, and its caption names them as captions do: not everything each time.
"""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

CELL = 8  # pixels: the side of a cell, and of a patch
GRID = 4
CELLS = GRID * GRID
SIZE = CELL * GRID
FRAMES = 4  # of a clip: the cue, and three in which shapes grow or shrink

SHAPES = ("disc", "square", "cross", "ring")
COLOURS = ("red", "green", "blue", "yellow", "pink", "cyan")
MOTIONS = ("grows", "shrinks")
PATTERNS = ("stripes", "columns", "checks")
MOST = len(SHAPES)  # shapes of a clip, all of different kinds

CUE = SHAPES.index("disc")
NOT_A_SHAPE = -1

# the first word of a seed: nothing is in two sets. The recipe was chosen on the second, the third is reported
TRAINING, VALIDATION, TEST = range(3)

_PAINT = np.array(
    [(230, 50, 50), (60, 200, 70), (70, 90, 240), (235, 215, 60), (220, 80, 220), (70, 215, 220)], dtype=np.float32
)
_RADII = (2.0, 2.4, 2.8, 3.2, 3.6)
_SIZE_WORDS = ("small", "small", None, "big", "big")
_OFFSETS = tuple((dx, dy) for dx in (-0.5, 0.0, 0.5) for dy in (-0.5, 0.0, 0.5))
_CONTRAST = 50.0  # of a tile
_NOISE = 8.0
_CUE_SIZE = 3


class Class(NamedTuple):
    """What a clip is about; indices into ``SHAPES``, ``MOTIONS`` and ``PATTERNS``."""

    shape: int
    motion: int
    pattern: int

    @property
    def text(self) -> str:
        """Its name, composed of words."""
        return f"a {SHAPES[self.shape]} {MOTIONS[self.motion]} beside {PATTERNS[self.pattern]}"

    @property
    def unseen(self) -> bool:
        """Whether zero-shot training leaves it out: one class of three, and each word is in others that it sees."""
        return (self.shape + self.motion + self.pattern) % 3 == 0


CLASSES = tuple(Class(s, m, p) for s in range(len(SHAPES)) for m in range(len(MOTIONS)) for p in range(len(PATTERNS)))
WORDS = ("a", "big", "small", "beside", *SHAPES, *COLOURS, *MOTIONS, *PATTERNS)


class Layout(NamedTuple):
    """What is where: all int64, of B clips (or stills), T frames, S shapes and P tiles.

    Attributes:
        kinds: (B, T, S) indices into ``SHAPES``, ``NOT_A_SHAPE`` where there is none.
        colours: (B, S) indices into ``COLOURS``.
        sizes: (B, T) of the shapes of a frame, from 0 to 4.
        places: (B, T, S) cells of the shapes.
        patterns: (B, P) indices into ``PATTERNS``.
        tiles: (B, T, P) cells of the tiles.
    """

    kinds: NDArray[np.int64]
    colours: NDArray[np.int64]
    sizes: NDArray[np.int64]
    places: NDArray[np.int64]
    patterns: NDArray[np.int64]
    tiles: NDArray[np.int64]


def make_clips(labels: NDArray[np.int64], rng: np.random.Generator, least: int = 1) -> NDArray[np.uint8]:
    """One random clip of each label.

    Args:
        labels: (B,) indices into ``CLASSES``.
        rng: decides all the rest.
        least: shapes of a clip, up to ``MOST``. Training begins to tell shapes apart on clips of few.

    Returns:
        uint8 (B, FRAMES, SIZE, SIZE, 3) RGB.
    """
    return _render(lay_out(labels, rng, least), rng)


def lay_out(labels: NDArray[np.int64], rng: np.random.Generator, least: int = 1) -> Layout:
    """What random clips of these labels show; the first shape of each is the one that the cue means."""
    count = len(labels)
    shape, motion, pattern = np.array(CLASSES)[labels].T
    shown = rng.integers(least, MOST + 1, size=count)
    # colours of one clip differ, so that the cue means one shape
    colours = _shuffled(rng, (count, len(COLOURS)))[:, :MOST]
    # the shape of the class first, then the others
    draws = rng.random((count, len(SHAPES)))
    np.put_along_axis(draws, shape[:, None], -1.0, axis=1)
    kinds = draws.argsort(axis=1)
    kinds[np.arange(MOST) >= shown[:, None]] = NOT_A_SHAPE
    kinds = np.repeat(kinds[:, None], FRAMES, axis=1)
    kinds[:, 0] = NOT_A_SHAPE
    kinds[:, 0, 0] = CUE
    growing = np.linspace(0, len(_RADII) - 1, FRAMES - 1).round().astype(np.int64)
    sizes = np.stack([growing, growing[::-1]])[motion]
    sizes = np.concatenate([np.full((count, 1), _CUE_SIZE), sizes], axis=1)
    # the cells of a frame in random order, the one that stays first
    draws = rng.random((count, FRAMES, CELLS))
    np.put_along_axis(draws, rng.integers(CELLS, size=(count, 1, 1)), -1.0, axis=2)
    cells = draws.argsort(axis=2)
    patterns = (pattern[:, None] + np.arange(len(PATTERNS))) % len(PATTERNS)
    tiles, places = cells[:, :, : len(PATTERNS)], cells[:, :, len(PATTERNS) : len(PATTERNS) + MOST]
    return Layout(kinds, colours, sizes, places, patterns, tiles)


def _shuffled(rng: np.random.Generator, shape: tuple[int, ...]) -> NDArray[np.int64]:
    return rng.random(shape).argsort(axis=-1)


def make_stills(count: int, rng: np.random.Generator, share: float = 0.5) -> tuple[NDArray[np.uint8], list[str]]:
    """Random stills and their captions.

    Args:
        count: B.
        rng: decides all.
        share: of the captions that say a thing that can be left out: size, colour and pattern, each by itself.

    Returns:
        uint8 (B, SIZE, SIZE, 3) RGB, and B texts.
    """
    kinds, colours, sizes, patterns = (
        rng.integers(many, size=(count, 1)) for many in (len(SHAPES), len(COLOURS), len(_RADII), len(PATTERNS))
    )
    cells = _shuffled(rng, (count, 1, CELLS))
    stills = _render(Layout(kinds[:, None], colours, sizes, cells[:, :, :1], patterns, cells[:, :, 1:2]), rng)
    said = rng.random((count, 3)) < share
    facts = zip(kinds[:, 0], colours[:, 0], sizes[:, 0], patterns[:, 0], said, strict=True)
    return stills[:, 0], [_caption(*fact) for fact in facts]


def _caption(kind: int, colour: int, size: int, pattern: int, said: NDArray[np.bool_]) -> str:
    words = ["a", _SIZE_WORDS[size] if said[0] else None, COLOURS[colour] if said[1] else None, SHAPES[kind]]
    words += ["beside", PATTERNS[pattern]] if said[2] else []
    return " ".join(word for word in words if word)


def _render(layout: Layout, rng: np.random.Generator) -> NDArray[np.uint8]:
    """Frames (B, T, SIZE, SIZE, 3) over a plain dark background."""
    kinds, colours, sizes, places, patterns, tiles = layout
    count, frames = sizes.shape
    background = rng.uniform(30, 80, size=(count, 1, 1, 1, 1, 3)).astype(np.float32)
    # every cell by itself: [B, T, cells, row, column, channel]
    image = np.broadcast_to(background, (count, frames, CELLS, CELL, CELL, 3)).copy()
    every, frame = np.arange(count)[:, None], np.arange(frames)
    for tile in range(tiles.shape[2]):
        drawn = _CONTRAST * _tile_masks()[patterns[:, tile]]
        image[every, frame, tiles[:, :, tile]] += drawn[:, None, :, :, None]
    clip, frame, shape = np.nonzero(kinds != NOT_A_SHAPE)
    offsets = rng.integers(len(_OFFSETS), size=len(clip))
    cover = _shape_masks()[kinds[clip, frame, shape], sizes[clip, frame], offsets][..., None]
    paint = _PAINT[colours[clip, shape]] + rng.uniform(-20, 20, size=(len(clip), 3)).astype(np.float32)
    cell = places[clip, frame, shape]
    image[clip, frame, cell] = image[clip, frame, cell] * (1 - cover) + paint[:, None, None] * cover
    image += _noise(rng, image.size).reshape(image.shape)
    pixels = np.clip(image, 0, 255).astype(np.uint8).reshape(count, frames, GRID, GRID, CELL, CELL, 3)
    return np.ascontiguousarray(pixels.swapaxes(3, 4)).reshape(count, frames, SIZE, SIZE, 3)


@lru_cache(maxsize=1)
def _noise_bank() -> NDArray[np.float32]:
    return _NOISE * np.random.default_rng(0).standard_normal(1 << 22, dtype=np.float32)


def _noise(rng: np.random.Generator, size: int) -> NDArray[np.float32]:
    # a stretch of one long row of numbers: drawing new ones would take half the time of a clip
    bank = _noise_bank()
    places = (int(rng.integers(len(bank))) + np.arange(size)) % len(bank)
    return bank[places]


@lru_cache(maxsize=1)
def _shape_masks() -> NDArray[np.float32]:
    """How much of each pixel of its cell a shape covers, (shapes, radii, offsets, CELL, CELL)."""
    masks = [[[_cover(kind, r, *offset) for offset in _OFFSETS] for r in _RADII] for kind in SHAPES]
    return np.array(masks, dtype=np.float32)


def _cover(kind: str, radius: float, right: float, down: float) -> NDArray[np.float64]:
    pixels = np.arange(CELL) + 0.5 - CELL / 2
    dx, dy = abs(pixels - right), abs(pixels - down)[:, None]
    circle = np.hypot(dx, dy)
    inside = {
        "disc": radius - circle,
        "square": 0.9 * radius - np.maximum(dx, dy),
        "cross": np.maximum(np.minimum(radius - dx, 0.33 * radius - dy), np.minimum(radius - dy, 0.33 * radius - dx)),
        "ring": np.minimum(radius - circle, circle - 0.5 * radius),
    }[kind]
    return np.clip(inside + 0.5, 0, 1)


@lru_cache(maxsize=1)
def _tile_masks() -> NDArray[np.float32]:
    """Brighter and darker pixels of the patterns, from -1 to 1: (patterns, CELL, CELL)."""
    row, column = np.mgrid[:CELL, :CELL] // 2 % 2
    return np.stack([1 - 2 * row, 1 - 2 * column, 1 - 2 * (row ^ column)]).astype(np.float32)
