"""What training does to the frames of a clip, decided once for all of them."""

from __future__ import annotations

from dataclasses import dataclass, fields

import numpy as np

# of the official recipe: crops of these shares of the short side, at most one step longer than high or higher than long
SCALES = (1.0, 0.875, 0.75, 0.66)
_MOST_STEPS = 1
BRIGHTNESS, CONTRAST, SATURATION, HUE = 0.4, 0.4, 0.2, 0.1


@dataclass(frozen=True)
class Augmentation:
    """The official augmentations, each with its probability. One draw holds for all frames of a clip.

    multi_scale: cut out one of four scales, at a corner or the centre, and resize it to the size of the model. Without
        it the centre is cut out, as in tests.
    flip: probability to mirror left and right; 0 where these are different classes.
    color_jitter: probability to change brightness, contrast, saturation and hue.
    gray: probability to take the colours away.

    Source: official ``datasets/build.py``, but for one fault: there each frame has a colour jitter of its own.

    Raises:
        ValueError: a probability is not from 0 to 1.

    Example:
        >>> from xclip_fast.data import Augmentation
        >>> Augmentation(flip=0.0)
        Augmentation(multi_scale=True, flip=0.0, color_jitter=0.8, gray=0.2)
        >>> Augmentation.none()
        Augmentation(multi_scale=False, flip=0.0, color_jitter=0.0, gray=0.0)
    """

    multi_scale: bool = True
    flip: float = 0.5
    color_jitter: float = 0.8
    gray: float = 0.2

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if not 0 <= value <= 1:
                raise ValueError(f"{field.name} must be a probability from 0 to 1, found {value}")

    @classmethod
    def none(cls) -> Augmentation:
        """Frames as in tests: the centre crop."""
        return cls(multi_scale=False, flip=0.0, color_jitter=0.0, gray=0.0)


@dataclass(frozen=True)
class Decision:
    """What is done to one clip.

    scales: height and width of the crop over the short side, None for the centre crop of tests.
    corner: where the crop lies, down and right, in halves of the room there is.
    colors: the names of adjustments with their factors, in order.
    """

    scales: tuple[float, float] | None
    corner: tuple[int, int]
    flip: bool
    colors: tuple[tuple[str, float], ...]
    gray: bool

    def box(self, height: int, width: int) -> tuple[int, int, int, int]:
        """Top, left, height and width of the crop in a picture of this size."""
        assert self.scales is not None
        short = min(height, width)
        high, wide = (int(short * scale) for scale in self.scales)
        # the official places are multiples of a quarter of the room
        return (
            (height - high) // 4 * 2 * self.corner[0],
            (width - wide) // 4 * 2 * self.corner[1],
            high,
            wide,
        )


_PAIRS = [
    (high, wide)
    for row, high in enumerate(SCALES)
    for column, wide in enumerate(SCALES)
    if abs(row - column) <= _MOST_STEPS
]
_CORNERS = ((0, 0), (0, 2), (2, 0), (2, 2), (1, 1))


def decide(augmentation: Augmentation, generator: np.random.Generator) -> Decision:
    """Draw what is done to a clip; each part is drawn whether it is used or not, so that none changes another."""
    pair = _PAIRS[generator.integers(len(_PAIRS))]
    corner = _CORNERS[generator.integers(len(_CORNERS))]
    flip, jitter, gray = generator.random(3).tolist()
    colors = [
        ("brightness", generator.uniform(1 - BRIGHTNESS, 1 + BRIGHTNESS)),
        ("contrast", generator.uniform(1 - CONTRAST, 1 + CONTRAST)),
        ("saturation", generator.uniform(1 - SATURATION, 1 + SATURATION)),
        ("hue", generator.uniform(-HUE, HUE)),
    ]
    order = generator.permutation(len(colors)).tolist()
    return Decision(
        scales=pair if augmentation.multi_scale else None,
        corner=corner,
        flip=flip < augmentation.flip,
        colors=tuple(colors[place] for place in order) if jitter < augmentation.color_jitter else (),
        gray=gray < augmentation.gray,
    )
