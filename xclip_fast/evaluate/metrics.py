"""Figures of a classifier from its scores: accuracies with their intervals, confusions, calibration."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import sqrt
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

BINS = 15
NORMAL_95 = 1.959963984540054  # the 97.5 % point of the normal distribution

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]


@dataclass(frozen=True)
class Rate:
    """A share of a number of videos, with the Wilson interval that holds the true share 95 times of 100.

    Attributes:
        right, total: counts.
        value: right / total.
        low, high: the interval.

    Example:
        >>> from xclip_fast.evaluate import wilson
        >>> rate = wilson(8, 10)
        >>> rate.value, round(rate.low, 3), round(rate.high, 3)
        (0.8, 0.49, 0.943)
    """

    right: int
    total: int
    value: float
    low: float
    high: float


def wilson(right: int, total: int) -> Rate:
    """A share with its 95 % interval after Wilson (1927), which stays between 0 and 1 and is never empty.

    Raises:
        ValueError: there is nothing to count, or more than all are right.

    Example:
        >>> from xclip_fast.evaluate import wilson
        >>> wilson(0, 4).low
        0.0
    """
    if total < 1 or not 0 <= right <= total:
        raise ValueError(f"a share needs 0 to total right ones of at least one, found {right} of {total}")
    share, squared = right / total, NORMAL_95**2
    centre = share + squared / (2 * total)
    half = NORMAL_95 * sqrt(share * (1 - share) / total + squared / (4 * total**2))
    scale = 1 + squared / total
    # exact at the ends, where rounding would leave 1e-17
    low = 0.0 if right == 0 else (centre - half) / scale
    high = 1.0 if right == total else (centre + half) / scale
    return Rate(right, total, share, low, high)


@dataclass(frozen=True)
class Spread:
    """The mean of the figures of several splits, and how far they lie apart.

    Attributes:
        mean: their mean.
        std: the sample standard deviation, with n - 1; None for one split.
        values: the figures.

    Example:
        >>> from xclip_fast.evaluate import spread
        >>> spread([0.4, 0.5, 0.6]).mean
        0.5
    """

    mean: float
    std: float | None
    values: tuple[float, ...]


def spread(values: Sequence[float]) -> Spread:
    """Mean and sample standard deviation (n - 1) of the figures of several splits.

    Raises:
        ValueError: there is none, or one is not a number.

    Example:
        >>> from xclip_fast.evaluate import spread
        >>> round(spread([0.4, 0.5, 0.6]).std, 6)
        0.1
    """
    found = np.asarray(values, np.float64)
    if not found.size or not np.isfinite(found).all():
        raise ValueError(f"figures of splits must be numbers, at least one, found {list(values)}")
    return Spread(float(found.mean()), float(found.std(ddof=1)) if len(found) > 1 else None, tuple(found.tolist()))


def harmonic_mean(base: float, novel: float) -> float:
    """Of two accuracies, 0 where one is: what base-to-novel results are summed up in.

    Example:
        >>> from xclip_fast.evaluate import harmonic_mean
        >>> round(harmonic_mean(0.75, 0.5), 6)
        0.6
    """
    return 0.0 if base == 0 or novel == 0 else 2 * base * novel / (base + novel)


def checked_scores(scores: Any, labels: ArrayLike) -> tuple[Floats, Ints]:
    """Scores (N, K) as float64 and labels (N,) as int64.

    Raises:
        ValueError: shapes do not fit, a score is not a number, or a label is no class.
    """
    # torch's bfloat16 has no counterpart in numpy
    found = np.asarray(scores.detach().cpu().double() if hasattr(scores, "detach") else scores, np.float64)
    given = np.asarray(labels)
    if found.ndim != 2 or not found.size or given.shape != found.shape[:1] or given.dtype.kind not in "iu":
        raise ValueError(
            f"scores must be (N, K) and labels N whole numbers, at least one, found {found.shape} and {given.shape}"
        )
    if not np.isfinite(found).all():
        raise ValueError(f"scores hold values that are not numbers, first in row {_first_bad(found)}")
    if given.min() < 0 or given.max() >= found.shape[1]:
        raise ValueError(f"labels must be 0 to {found.shape[1] - 1}, found {given.min()} to {given.max()}")
    return found, given.astype(np.int64)


def _first_bad(scores: Floats) -> int:
    return int((~np.isfinite(scores)).any(axis=1).argmax())


def ranking(scores: ArrayLike, count: int) -> Ints:
    """The best ``count`` classes of each row (N, count), best first; of equal scores the class that stands first."""
    return np.argsort(-np.asarray(scores, np.float64), axis=1, kind="stable")[:, :count].astype(np.int64)


def top_k(scores: ArrayLike, labels: ArrayLike, count: int) -> Rate:
    """How often the label is among the best ``count`` classes; of equal scores the class that stands first wins.

    Args:
        scores: (N, K), of any scale.
        labels: (N,), whole numbers.
        count: k; more than there are classes counts as all of them.

    Raises:
        ValueError: as the scores or labels do not fit, or one of them is not a number.

    Example:
        >>> from xclip_fast.evaluate import top_k
        >>> top_k([[0.9, 0.1], [0.8, 0.2]], [0, 1], 1).value
        0.5
    """
    found, given = checked_scores(scores, labels)
    if count < 1:
        raise ValueError(f"k must be at least 1, found {count}")
    return wilson(int((ranking(found, count) == given[:, None]).any(axis=1).sum()), len(given))


def confusion_matrix(scores: ArrayLike, labels: ArrayLike) -> Ints:
    """Counts (K, K): the row is the label, the column what was answered.

    Raises:
        ValueError: as ``top_k``.

    Example:
        >>> from xclip_fast.evaluate import confusion_matrix
        >>> confusion_matrix([[0.9, 0.1], [0.8, 0.2]], [0, 1]).tolist()
        [[1, 0], [1, 0]]
    """
    found, given = checked_scores(scores, labels)
    classes = found.shape[1]
    cells = given * classes + found.argmax(axis=1)
    return np.bincount(cells, minlength=classes * classes).reshape(classes, classes).astype(np.int64)


def mean_class_accuracy(confusion: ArrayLike) -> float:
    """The mean of the accuracies of those classes that have videos, each class weighing the same.

    Raises:
        ValueError: there is no video at all.

    Example:
        >>> from xclip_fast.evaluate import mean_class_accuracy
        >>> mean_class_accuracy([[3, 1, 0], [0, 1, 1], [0, 0, 0]])  # the third class has no video
        0.625
    """
    counts = np.asarray(confusion, np.int64)
    videos = counts.sum(axis=1)
    if not videos.any():
        raise ValueError("a mean over classes needs one with a video")
    there = videos > 0
    return float((np.diag(counts)[there] / videos[there]).mean())


@dataclass(frozen=True)
class ClassFigures:
    """How one class fared.

    Attributes:
        name: of the class.
        accuracy: of its videos; None without any.
        answered: how often it was the answer.
        precision: the share of these answers that were right; None without any.
        mistaken_for: the class that its videos are taken for most often, and how often; None without a mistake.

    Example:
        >>> from xclip_fast.evaluate import class_figures
        >>> left = class_figures([[3, 1], [0, 2]], ["left", "right"])[0]
        >>> left.accuracy.value, left.precision, left.mistaken_for
        (0.75, 1.0, ('right', 1))
    """

    name: str
    accuracy: Rate | None
    answered: int
    precision: float | None
    mistaken_for: tuple[str, int] | None


def class_figures(confusion: ArrayLike, names: Sequence[str]) -> list[ClassFigures]:
    """The figures of each class, in the order of the names.

    Raises:
        ValueError: names and counts do not match.

    Example:
        >>> from xclip_fast.evaluate import class_figures
        >>> [one.answered for one in class_figures([[3, 1], [0, 2]], ["left", "right"])]
        [3, 3]
    """
    counts = np.asarray(confusion, np.int64)
    if counts.shape != (len(names), len(names)):
        raise ValueError(f"{len(names)} names do not fit counts of shape {counts.shape}")
    found = []
    for place, name in enumerate(names):
        row, right = counts[place], int(counts[place, place])
        videos, answered = int(row.sum()), int(counts[:, place].sum())
        others = row.copy()
        others[place] = 0
        most = int(others.argmax())
        found.append(
            ClassFigures(
                name,
                wilson(right, videos) if videos else None,
                answered,
                right / answered if answered else None,
                (names[most], int(others[most])) if others[most] else None,
            )
        )
    return found


@dataclass(frozen=True)
class Bin:
    """The videos whose best class has a probability in (low, high].

    Attributes:
        low, high: of the bin.
        videos: how many there are.
        confidence: the mean of these probabilities; None without a video.
        accuracy: the share of right answers; None without a video.

    Example:
        >>> from xclip_fast.evaluate import calibration
        >>> calibration([[0.9, 0.1]], [0]).bins[-2].videos
        1
    """

    low: float
    high: float
    videos: int
    confidence: float | None
    accuracy: float | None


@dataclass(frozen=True)
class Calibration:
    """Whether the probabilities can be trusted.

    Attributes:
        ece: expected calibration error: the mean gap between confidence and accuracy over the bins, by their videos.
        bins: as many as were asked for, of equal width.

    Example:
        >>> from xclip_fast.evaluate import calibration
        >>> len(calibration([[0.9, 0.1]], [0]).bins)
        15
    """

    ece: float
    bins: tuple[Bin, ...]


def calibration(probabilities: ArrayLike, labels: ArrayLike, bins: int = BINS) -> Calibration:
    """Expected calibration error over bins of equal width, as Guo et al. (2017) define it.

    Args:
        probabilities: (N, K), each row adding up to 1.
        labels: (N,), whole numbers.
        bins: their number.

    Raises:
        ValueError: a row is no distribution, or as ``top_k``.

    Example:
        >>> from xclip_fast.evaluate import calibration
        >>> round(calibration([[0.9, 0.1], [0.9, 0.1]], [0, 1]).ece, 6)  # right half of the time, at 90 %
        0.4
    """
    found, given = checked_scores(probabilities, labels)
    if bins < 1:
        raise ValueError(f"bins must be at least 1, found {bins}")
    if found.min() < -1e-3 or abs(found.sum(axis=1) - 1).max() > 1e-3:
        raise ValueError("calibration needs probabilities: rows between 0 and 1 that add up to 1")
    sure, right = found.max(axis=1), found.argmax(axis=1) == given
    edges = np.arange(bins + 1) / bins
    # (low, high]: a probability on an edge belongs to the bin below
    places = np.clip(np.searchsorted(edges, sure, side="left") - 1, 0, bins - 1)
    made, gap = [], 0.0
    for place in range(bins):
        inside = places == place
        videos = int(inside.sum())
        confidence = float(sure[inside].mean()) if videos else None
        accuracy = float(right[inside].mean()) if videos else None
        if confidence is not None and accuracy is not None:
            gap += videos / len(given) * abs(confidence - accuracy)
        made.append(Bin(float(edges[place]), float(edges[place + 1]), videos, confidence, accuracy))
    return Calibration(gap, tuple(made))
