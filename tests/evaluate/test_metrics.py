"""Each figure against a computation of its own: by hand, in loops, by SciPy and torchmetrics."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from scipy.stats import binomtest
from torchmetrics.functional.classification import multiclass_accuracy, multiclass_calibration_error

from xclip_fast.evaluate import (
    calibration,
    class_figures,
    confusion_matrix,
    harmonic_mean,
    mean_class_accuracy,
    retrieval,
    spread,
    top_k,
    wilson,
)

VIDEOS, CLASSES = 400, 12


@pytest.fixture
def scored() -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(0)
    labels = rng.integers(CLASSES - 1, size=VIDEOS)  # the last class has no video
    logits = rng.normal(size=(VIDEOS, CLASSES)) + 1.5 * np.eye(CLASSES)[labels]
    scores = np.exp(logits)
    return scores / scores.sum(axis=1, keepdims=True), labels


@pytest.mark.parametrize(("right", "total"), [(0, 1), (1, 1), (0, 50), (50, 50), (1, 50), (37, 81), (19999, 20000)])
def test_intervals_are_those_of_scipy(right: int, total: int) -> None:
    found, truth = wilson(right, total), binomtest(right, total).proportion_ci(0.95, method="wilson")
    assert found.value == right / total
    assert (found.right, found.total) == (right, total)
    assert found.low == pytest.approx(truth.low, abs=1e-12)
    assert found.high == pytest.approx(truth.high, abs=1e-12)
    assert 0 <= found.low <= found.value <= found.high <= 1


def test_a_known_interval() -> None:
    # Newcombe (1998), table I: 81 of 263
    found = wilson(81, 263)
    assert (round(found.low, 4), round(found.high, 4)) == (0.2553, 0.3662)


@pytest.mark.parametrize(("right", "total"), [(0, 0), (-1, 3), (4, 3)])
def test_a_share_of_nothing_is_refused(right: int, total: int) -> None:
    with pytest.raises(ValueError, match="a share needs"):
        wilson(right, total)


@pytest.mark.parametrize("count", [1, 5, CLASSES, 2 * CLASSES])
def test_top_k_counts(count: int, scored: tuple[np.ndarray, np.ndarray]) -> None:
    scores, labels = scored
    hits = [sum(other > row[label] for other in row) < count for row, label in zip(scores, labels, strict=True)]
    found = top_k(scores, labels, count)
    assert found.right == sum(hits)
    if count < CLASSES:
        truth = multiclass_accuracy(
            torch.tensor(scores), torch.tensor(labels), CLASSES, average="micro", top_k=count
        ).item()
        assert found.value == pytest.approx(truth, abs=1e-6)


def test_a_tie_goes_to_the_class_that_stands_first() -> None:
    scores = np.full((4, 4), 0.25)
    assert [top_k(scores, [0, 1, 2, 3], count).right for count in (1, 2, 3)] == [1, 2, 3]
    assert confusion_matrix(scores, [0, 1, 2, 3])[:, 0].tolist() == [1, 1, 1, 1]


def test_confusions_and_the_mean_over_classes(scored: tuple[np.ndarray, np.ndarray]) -> None:
    scores, labels = scored
    truth = np.zeros((CLASSES, CLASSES), int)
    for row, label in zip(scores, labels, strict=True):
        truth[label, list(row).index(max(row))] += 1
    found = confusion_matrix(scores, labels)
    assert np.array_equal(found, truth)
    assert np.trace(found) == top_k(scores, labels, 1).right
    accuracies = [truth[place, place] / truth[place].sum() for place in range(CLASSES - 1)]
    assert mean_class_accuracy(found) == pytest.approx(statistics.fmean(accuracies))
    # not the share of right videos: classes differ in size here
    assert mean_class_accuracy([[9, 1], [1, 0]]) == pytest.approx(0.45)
    with pytest.raises(ValueError, match="needs one with a video"):
        mean_class_accuracy(np.zeros((3, 3), int))


def test_the_figures_of_each_class() -> None:
    left, right, up = class_figures([[3, 1, 2], [0, 2, 0], [0, 0, 0]], ["left", "right", "up"])
    assert left.accuracy == wilson(3, 6)
    assert (left.answered, left.precision, left.mistaken_for) == (3, 1.0, ("up", 2))
    assert right.accuracy == wilson(2, 2)
    assert (right.answered, right.precision, right.mistaken_for) == (3, 2 / 3, None)
    assert (up.accuracy, up.answered, up.precision, up.mistaken_for) == (None, 2, 0.0, None)
    assert class_figures([[1, 0], [0, 0]], ["a", "b"])[1].precision is None
    with pytest.raises(ValueError, match="3 names do not fit"):
        class_figures([[1, 0], [0, 1]], ["a", "b", "c"])


@pytest.mark.parametrize("bins", [1, 10, 15])
def test_calibration_is_that_of_torchmetrics(bins: int, scored: tuple[np.ndarray, np.ndarray]) -> None:
    scores, labels = scored
    found = calibration(scores, labels, bins)
    truth = multiclass_calibration_error(torch.tensor(scores), torch.tensor(labels), CLASSES, n_bins=bins, norm="l1")
    assert found.ece == pytest.approx(truth.item(), abs=1e-6)
    assert len(found.bins) == bins
    assert sum(one.videos for one in found.bins) == VIDEOS


def test_calibration_by_hand() -> None:
    # bins of (0.4, 0.6] and (0.8, 1]: one edge from below, one video at 1
    scores = [[0.6, 0.4], [0.5, 0.5], [0.1, 0.9], [0.0, 1.0]]
    found = calibration(scores, [0, 1, 1, 0], bins=5)
    assert [one.videos for one in found.bins] == [0, 0, 2, 0, 2]
    assert found.bins[2].confidence == pytest.approx(0.55)
    assert found.bins[2].accuracy == 0.5
    assert found.bins[4].confidence == pytest.approx(0.95)
    assert found.bins[4].accuracy == 0.5
    assert (found.bins[0].confidence, found.bins[0].accuracy) == (None, None)
    assert found.ece == pytest.approx(0.5 * 0.05 + 0.5 * 0.45)


def test_what_is_sure_and_right_is_calibrated() -> None:
    assert calibration(np.eye(3), [0, 1, 2]).ece == 0
    assert calibration(np.eye(3), [1, 2, 0]).ece == 1


@pytest.mark.parametrize("scores", [[[2.0, 1.0]], [[-1.0, 2.0]], [[0.2, 0.2]]])
def test_calibration_of_no_probabilities_is_refused(scores: list[list[float]]) -> None:
    with pytest.raises(ValueError, match="needs probabilities"):
        calibration(scores, [0])
    with pytest.raises(ValueError, match="bins must be at least 1"):
        calibration([[0.5, 0.5]], [0], bins=0)


BAD = {
    "NaN": ([[0.5, float("nan")]], [0]),
    "infinite": ([[0.5, float("inf")]], [0]),
    "no row": (np.zeros((0, 3)), []),
    "another number of labels": ([[0.5, 0.5]], [0, 1]),
    "labels that are no whole numbers": ([[0.5, 0.5]], [0.0]),
    "a label that is no class": ([[0.5, 0.5]], [2]),
    "a label below 0": ([[0.5, 0.5]], [-1]),
    "no table": ([0.5, 0.5], [0]),
}


@pytest.mark.parametrize("figure", [lambda scores, labels: top_k(scores, labels, 1), confusion_matrix, calibration])
@pytest.mark.parametrize("kind", BAD)
def test_bad_scores_are_refused(kind: str, figure: Callable[[Any, Any], object]) -> None:
    with pytest.raises(ValueError, match=r"scores|labels"):
        figure(*BAD[kind])


def test_a_row_that_is_no_number_is_named() -> None:
    with pytest.raises(ValueError, match="first in row 1"):
        top_k([[1.0, 0.0], [float("nan"), 0.0]], [0, 0], 1)


def test_scores_of_torch_in_any_precision() -> None:
    scores = torch.tensor([[0.25, 0.75], [0.75, 0.25]])
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        assert top_k(scores.to(dtype), [1, 1], 1).value == 0.5


def test_mean_and_spread_of_splits() -> None:
    values = [44.6, 39.1, 51.0]
    found = spread(values)
    assert found.mean == pytest.approx(statistics.mean(values))
    assert found.std == pytest.approx(statistics.stdev(values))  # of a sample, n - 1
    assert found.values == tuple(values)
    assert spread([0.3]).std is None
    for bad in ([], [0.1, float("nan")]):
        with pytest.raises(ValueError, match="figures of splits"):
            spread(bad)


def test_harmonic_mean_is_that_of_the_library() -> None:
    assert harmonic_mean(0.2, 0.6) == pytest.approx(statistics.harmonic_mean([0.2, 0.6]))
    assert harmonic_mean(0.0, 0.6) == harmonic_mean(0.0, 0.0) == 0


def by_hand(scores: np.ndarray, owners: list[int]) -> tuple[list[int], list[int]]:
    """Ranks of captions and of videos, by sorting with all rivals of the same score in front."""
    captions = []
    for caption, owner in enumerate(owners):
        column = sorted(((-value, video == owner) for video, value in enumerate(scores[:, caption])))
        captions.append(1 + [own for _, own in column].index(True))
    videos = []
    for video, row in enumerate(scores):
        line = sorted(((-value, owners[caption] == video) for caption, value in enumerate(row)))
        videos.append(1 + [own for _, own in line].index(True))
    return captions, videos


@pytest.mark.parametrize("ties", [False, True])
@pytest.mark.parametrize("several", [False, True])
def test_retrieval_both_ways(ties: bool, several: bool) -> None:
    rng = np.random.default_rng(1)
    owners = [*range(30), *(rng.integers(30, size=20).tolist() if several else [])]
    scores = rng.normal(size=(30, len(owners))) + 2 * (np.arange(30)[:, None] == np.array(owners))
    scores = np.round(scores) if ties else scores
    found = retrieval(scores, owners)
    for ranks, truth in zip((found.text_to_video, found.video_to_text), by_hand(scores, owners), strict=True):
        assert ranks.median == statistics.median(truth)
        assert ranks.mean == pytest.approx(statistics.fmean(truth))
        for depth in (1, 5, 10):
            assert ranks.recall[depth] == wilson(sum(rank <= depth for rank in truth), len(truth))


def test_a_model_that_answers_the_same_to_everything_finds_nothing() -> None:
    found = retrieval(np.ones((20, 20)), list(range(20)))
    for ranks in (found.text_to_video, found.video_to_text):
        assert ranks.median == 20
        assert [rate.right for rate in ranks.recall.values()] == [0, 0, 0]


@pytest.mark.parametrize(
    ("scores", "owners"),
    [
        ([[1.0, 2.0]], [0]),
        ([[1.0, float("nan")]], [0, 0]),
        ([[1.0], [2.0]], [0]),  # a video without a caption
        ([[1.0, 2.0]], [0, 1]),
        (np.zeros((0, 0)), []),
    ],
)
def test_bad_retrieval_is_refused(scores: Any, owners: list[int]) -> None:
    with pytest.raises(ValueError, match=r"scores|owners"):
        retrieval(scores, np.array(owners, int))
