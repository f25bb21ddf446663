"""Figures of retrieval: how high a caption's video stands among all videos, and the other way round."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from xclip_fast.evaluate.metrics import Floats, Ints, Rate, wilson

DEPTHS = (1, 5, 10)


@dataclass(frozen=True)
class Ranks:
    """One direction of retrieval.

    Attributes:
        recall: for each depth k, how often the right one is among the best k (R@k), with its 95 % interval.
        median: of the ranks, where 1 is the best.
        mean: of the ranks.

    Example:
        >>> from xclip_fast.evaluate import retrieval
        >>> retrieval([[2.0, 1.0], [0.0, 3.0]], [0, 1]).text_to_video.recall[1].value
        1.0
    """

    recall: Mapping[int, Rate]
    median: float
    mean: float


@dataclass(frozen=True)
class Retrieval:
    """Both directions.

    Attributes:
        text_to_video: each caption looks for its video.
        video_to_text: each video looks for one of its captions.

    Example:
        >>> from xclip_fast.evaluate import retrieval
        >>> retrieval([[2.0, 1.0], [0.0, 3.0]], [0, 1]).video_to_text.median
        1.0
    """

    text_to_video: Ranks
    video_to_text: Ranks


def retrieval(scores: Any, owners: ArrayLike) -> Retrieval:
    """R@1, R@5, R@10, median and mean rank of both directions.

    Ties are counted pessimistically: whatever scores as high as the right one stands before it, so that a model which
    answers the same to everything finds nothing. A video with several captions has found one when the best of them is.

    Args:
        scores: (V, C), of each video and each caption.
        owners: (C,), the number of the video that each caption belongs to.

    Raises:
        ValueError: shapes do not fit, a score is not a number, or a video has no caption.

    Example:
        >>> from xclip_fast.evaluate import retrieval
        >>> found = retrieval([[2.0, 1.0, 0.0], [0.0, 0.5, 3.0]], [0, 1, 1])
        >>> found.text_to_video.recall[1].right, found.video_to_text.recall[1].right
        (2, 2)
    """
    found = np.asarray(scores.detach().cpu().double() if hasattr(scores, "detach") else scores, np.float64)
    given = np.asarray(owners)
    if found.ndim != 2 or not found.size or given.shape != found.shape[1:] or given.dtype.kind not in "iu":
        raise ValueError(
            f"scores must be (V, C) and owners C whole numbers, at least one, found {found.shape} and {given.shape}"
        )
    if not np.isfinite(found).all():
        raise ValueError("scores hold values that are not numbers")
    if not np.array_equal(np.unique(given), np.arange(len(found))):
        raise ValueError(f"owners must name each of the {len(found)} videos at least once, and no other")
    own = given == np.arange(len(found))[:, None]
    of_caption = found[given, np.arange(len(given))]
    # the right one itself is among those that score as high
    caption_ranks = (found >= of_caption).sum(axis=0)
    best = np.where(own, found, -np.inf).max(axis=1)
    video_ranks = 1 + ((found >= best[:, None]) & ~own).sum(axis=1)
    return Retrieval(_ranks(caption_ranks), _ranks(video_ranks))


def _ranks(ranks: Ints | Floats) -> Ranks:
    recall = {depth: wilson(int((ranks <= depth).sum()), len(ranks)) for depth in DEPTHS}
    return Ranks(recall, float(np.median(ranks)), float(np.mean(ranks)))
