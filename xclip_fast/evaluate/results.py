"""What an evaluation found, ready for the terminal, JSON and a page."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from xclip_fast.data import Dataset
from xclip_fast.errors import InputError
from xclip_fast.evaluate.metrics import (
    Calibration,
    ClassFigures,
    Ints,
    Rate,
    Spread,
    calibration,
    class_figures,
    confusion_matrix,
    harmonic_mean,
    mean_class_accuracy,
    ranking,
    spread,
    top_k,
)
from xclip_fast.evaluate.ranks import Retrieval, retrieval
from xclip_fast.evaluate.scoring import Scored, shown_path
from xclip_fast.video.pool import Source

SHOWN = 5  # classes of a prediction


@dataclass(frozen=True)
class Predicted:
    """What was answered for one video.

    Attributes:
        file: the video.
        label: its class, by number.
        best: the numbers of the likeliest classes, best first.
        probabilities: theirs.

    Example:
        >>> from xclip_fast.evaluate import Predicted
        >>> Predicted("a.mp4", label=1, best=(1, 0), probabilities=(0.75, 0.25)).best[0]
        1
    """

    file: str
    label: int
    best: tuple[int, ...]
    probabilities: tuple[float, ...]


@dataclass(frozen=True)
class Classified:
    """The figures of one list of videos. Those that could not be used are counted, and count in no figure.

    Attributes:
        name: of the list.
        classes: names as the texts have them.
        files: videos of the list.
        failed: of these, file to reason, those that could not be used.
        top1, top5: accuracies; with less than 5 classes top5 is 1.
        mean_class_accuracy: the mean over the classes that have videos.
        calibration: of the probabilities.
        per_class: figures of each class.
        confusion: counts (K, K): row label, column answer.
        predictions: of each video that could be used.

    Example:
        >>> import numpy as np
        >>> from xclip_fast.data import Dataset, Sample
        >>> from xclip_fast.evaluate import Scored, classified
        >>> data = Dataset((Sample("a.mp4", 0), Sample("b.mp4", 1)), ("left", "right"))
        >>> scored = Scored(np.array([[0.9, 0.1]], np.float32), np.array([0]), {1: "b.mp4: damaged"})
        >>> found = classified("val.txt", data, data.classes, scored)
        >>> found.top1.value, found.top1.total, found.failed
        (1.0, 1, {'b.mp4': 'b.mp4: damaged'})
    """

    name: str
    classes: tuple[str, ...]
    files: int
    failed: Mapping[str, str]
    top1: Rate
    top5: Rate
    mean_class_accuracy: float
    calibration: Calibration
    per_class: tuple[ClassFigures, ...]
    confusion: Ints
    predictions: tuple[Predicted, ...]

    def to_dict(self, predictions: bool = False) -> dict[str, Any]:
        """Ready for JSON; every prediction where they are asked for."""
        found = {**vars(self), "confusion": self.confusion.tolist()}
        if not predictions:
            del found["predictions"]
        return {key: _plain(value) for key, value in found.items()}


def classified(name: str, dataset: Dataset, texts: Sequence[str], scored: Scored) -> Classified:
    """The figures of a list of videos from their scores.

    Args:
        name: what results call the list.
        dataset: the list.
        texts: the names that the classes were given to the model by.
        scored: the class probabilities.

    Raises:
        ValueError: scores and classes do not match.

    Example:
        >>> import numpy as np
        >>> from xclip_fast.data import Dataset, Sample
        >>> from xclip_fast.evaluate import Scored, classified
        >>> data = Dataset((Sample("a.mp4", 0), Sample("b.mp4", 1)), ("left", "right"))
        >>> scored = Scored(np.array([[0.9, 0.1], [0.8, 0.2]], np.float32), np.array([0, 1]), {})
        >>> classified("val.txt", data, data.classes, scored).top1.value
        0.5
    """
    labels = np.array([dataset.samples[place].label for place in scored.places], np.int64)
    scores, names = scored.scores, tuple(texts)
    files = [shown_path(sample.source) for sample in dataset.samples]
    confusion = confusion_matrix(scores, labels)
    best = ranking(scores, SHOWN)
    predictions = tuple(
        Predicted(files[place], int(label), tuple(order.tolist()), tuple(row[order].astype(float).tolist()))
        for place, label, order, row in zip(scored.places, labels, best, scores, strict=True)
    )
    return Classified(
        name,
        names,
        len(files),
        {files[place]: error for place, error in scored.failed.items()},
        top_k(scores, labels, 1),
        top_k(scores, labels, 5),
        mean_class_accuracy(confusion),
        calibration(scores, labels),
        tuple(class_figures(confusion, names)),
        confusion,
        predictions,
    )


@dataclass(frozen=True)
class Retrieved:
    """The figures of one list of captions.

    Attributes:
        name: of the list.
        files: videos of the list.
        failed: of these, file to reason, those that could not be used; their captions are left out with them.
        captions: that were searched with.
        figures: both directions.

    Example:
        >>> import numpy as np
        >>> from xclip_fast.evaluate import Scored, retrieved
        >>> scored = Scored(np.array([[2.0, 1.0], [0.0, 3.0]], np.float32), np.array([0, 1]), {})
        >>> retrieved("captions.txt", ["a.mp4", "b.mp4"], [0, 1], scored).figures.text_to_video.median
        1.0
    """

    name: str
    files: int
    failed: Mapping[str, str]
    captions: int
    figures: Retrieval

    def to_dict(self) -> dict[str, Any]:
        """Ready for JSON."""
        return {key: _plain(value) for key, value in vars(self).items()}


def retrieved(name: str, sources: Sequence[Source], owners: Sequence[int], scored: Scored) -> Retrieved:
    """The figures of retrieval from the logits of videos and captions.

    Args:
        name: what results call the list.
        sources: the videos, each once.
        owners: the place of the video of each caption.
        scored: the logits (N, C), a column for each caption.

    Raises:
        ValueError: scores and captions do not match.

    Example:
        >>> import numpy as np
        >>> from xclip_fast.evaluate import Scored, retrieved
        >>> scored = Scored(np.array([[2.0, 1.0]], np.float32), np.array([1]), {0: "a.mp4: damaged"})
        >>> retrieved("captions.txt", ["a.mp4", "b.mp4"], [0, 1], scored).captions
        1
    """
    rows = {int(place): row for row, place in enumerate(scored.places)}
    used = [column for column, owner in enumerate(owners) if owner in rows]
    figures = retrieval(scored.scores[:, used], [rows[owners[column]] for column in used])
    files = [shown_path(source) for source in sources]
    failed = {files[place]: error for place, error in scored.failed.items()}
    return Retrieved(name, len(files), failed, len(used), figures)


# what is summed up over splits, as JSON, terminal and page name it
SUMMED: dict[str, tuple[str, Callable[[Classified], float]]] = {
    "top1": ("top-1", lambda one: one.top1.value),
    "top5": ("top-5", lambda one: one.top5.value),
    "mean_class_accuracy": ("mean class", lambda one: one.mean_class_accuracy),
    "ece": ("ECE", lambda one: one.calibration.ece),
}


def summary(splits: Sequence[Classified]) -> dict[str, Spread]:
    """Mean and sample standard deviation of the figures over the splits.

    Example:
        >>> import numpy as np
        >>> from xclip_fast.data import Dataset, Sample
        >>> from xclip_fast.evaluate import Scored, classified, summary
        >>> data = Dataset((Sample("a.mp4", 0),), ("left", "right"))
        >>> scores = [np.array([row], np.float32) for row in ([0.9, 0.1], [0.2, 0.8])]
        >>> splits = [classified("val.txt", data, data.classes, Scored(one, np.array([0]), {})) for one in scores]
        >>> summary(splits)["top1"].mean
        0.5
    """
    return {key: spread([figure(one) for one in splits]) for key, (_, figure) in SUMMED.items()}


def base_and_novel(splits: Sequence[Classified]) -> dict[str, float]:
    """Top-1 of the base and the novel classes, in this order, and their harmonic mean.

    Raises:
        InputError: there are not two splits, or they have a class in common.

    Example:
        >>> import numpy as np
        >>> from xclip_fast.data import Dataset, Sample
        >>> from xclip_fast.evaluate import Scored, base_and_novel, classified
        >>> scored = Scored(np.array([[0.9, 0.1], [0.8, 0.2]], np.float32), np.array([0, 1]), {})
        >>> halves = [("left", "right"), ("up", "down")]
        >>> samples = Sample("a.mp4", 0), Sample("b.mp4", 1)
        >>> splits = [classified("val.txt", Dataset(samples, two), two, scored) for two in halves]
        >>> base_and_novel(splits)
        {'base': 0.5, 'novel': 0.5, 'harmonic_mean': 0.5}
    """
    check_halves([one.classes for one in splits])
    base, novel = (one.top1.value for one in splits)
    return {"base": base, "novel": novel, "harmonic_mean": harmonic_mean(base, novel)}


def check_halves(classes: Sequence[Sequence[str]]) -> None:
    """Find out before any work whether class lists are those of base and novel classes.

    Raises:
        InputError: there are not two, or they have a class in common.
    """
    if len(classes) != 2:
        raise InputError(f"base-novel takes two lists, of base and of novel classes, found {len(classes)}")
    both = [name for name in classes[0] if name in set(classes[1])]
    if both:
        raise InputError(f"base and novel classes have {both[0]!a} in common: give each list labels of its own")


def _plain(value: Any) -> Any:
    if hasattr(value, "__dataclass_fields__"):
        return asdict(value)
    if isinstance(value, tuple):
        return [_plain(one) for one in value]
    return dict(value) if isinstance(value, Mapping) else value
