"""The demo: real video files in, classes out, by X-CLIP and by models that lack a part of it."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor

from xclip_fast.demo.clips import CLASSES, FRAMES, SAMPLED, SIZE, make_clip
from xclip_fast.demo.models import CONFIG, MODELS, load_trained
from xclip_fast.demo.mp4 import write_mp4
from xclip_fast.demo.scores import Score, score
from xclip_fast.errors import InputError
from xclip_fast.pipeline import Classifier, Prediction, embed
from xclip_fast.text import get_tokenizer
from xclip_fast.video import load_video

Progress = Callable[[str, int, int], None]

NOTES = (
    "Each class is another one played backwards: single frames tell nothing, chance within a pair is 50 %.",
    "Averaging over frames gives a clip and its reversal one answer, so it stays at 50 % whatever it learns.",
    "CFA lets frames see each other; their order enters by MIT's temporal positions.",
)
VIDEO_NOTE = "This model knows nothing but moving shapes: its labels for a real video mean nothing."


@dataclass(frozen=True)
class RealVideo:
    """What the demo's X-CLIP makes of a video file: the shape it was read as, the feature, and the likeliest labels."""

    path: str
    shape: tuple[int, ...]
    embedding_size: int
    embedding_norm: float
    top: list[Prediction]
    note: str = VIDEO_NOTE


@dataclass(frozen=True)
class DemoResult:
    """All there is to print.

    clips: held-out clips classified, each from its own mp4 file of ``frames`` frames.
    folder: where the mp4 files are, if they were kept.
    scores: of each model, X-CLIP first.
    seconds: the whole demo took.
    """

    clips: int
    frames: int
    folder: str | None
    classes: tuple[str, ...]
    scores: tuple[Score, ...]
    video: RealVideo | None
    seconds: float
    notes: tuple[str, ...] = NOTES

    def to_dict(self) -> dict[str, Any]:
        """The same as dictionaries, lists, strings and numbers: ready for JSON."""
        return asdict(self)


def run(
    video: str | Path | None = None,
    out: Path | None = None,
    clips_per_class: int = 16,
    progress: Progress | None = None,
) -> DemoResult:
    """Write held-out clips as mp4 files, read them back, classify them with each model, and encode a real video.

    Args:
        video: a real video of any kind, which is read first: a bad file ends the demo before the work.
        out: folder for the mp4 files, made if needed; by default they are written to a temporary one and removed.
        clips_per_class: of each of the classes in ``xclip_fast.demo.clips.CLASSES``.
        progress: called with what is being done, how many files of it are done, and how many there are.

    Raises:
        InputError: the video or the folder can't be used, the number is not positive, or PyAV is missing.
    """
    if clips_per_class < 1:
        raise InputError(f"the demo needs at least one clip per class, found {clips_per_class}")
    start = time.perf_counter()
    report = progress or (lambda stage, done, total: None)
    classifiers = {name: Classifier(load_trained(name), CLASSES, get_tokenizer(CONFIG)) for name in MODELS}
    real = None if video is None else _encode(video, classifiers["xclip"])
    labels = torch.arange(len(CLASSES)).repeat_interleave(clips_per_class)
    with _folder(out) as folder:
        files = _write_clips(folder, clips_per_class, report)
        answers = _classify(files, classifiers, report)
    return DemoResult(
        clips=len(files),
        frames=FRAMES,
        folder=None if out is None else str(out),
        classes=CLASSES,
        scores=tuple(score(name, answers[name], labels) for name in MODELS),
        video=real,
        seconds=time.perf_counter() - start,
    )


def _write_clips(folder: Path, clips_per_class: int, report: Progress) -> list[Path]:
    files = []
    for label, text in enumerate(CLASSES):
        for number in range(clips_per_class):
            path = folder / f"{text.replace(',', '').replace(' ', '_')}_{number:03}.mp4"
            write_mp4(path, make_clip(label, number))
            files.append(path)
            report("writing mp4 files", len(files), clips_per_class * len(CLASSES))
    return files


def _classify(files: list[Path], classifiers: dict[str, Classifier], report: Progress) -> dict[str, Tensor]:
    answers: dict[str, list[Tensor]] = {name: [] for name in classifiers}
    for done, path in enumerate(files, start=1):
        views = _load(path)
        for name, classifier in classifiers.items():
            answers[name].append(classifier.probabilities(views))
        report("classifying", done, len(files))
    return {name: torch.stack(rows) for name, rows in answers.items()}


def _load(path: str | Path) -> Tensor:
    # this preset leaves frames of the model's own size as they are
    return load_video(path, frames=SAMPLED, size=SIZE, preset="hf")


def _encode(video: str | Path, classifier: Classifier) -> RealVideo:
    views = _load(video)
    feature = embed(classifier.model, views).video
    return RealVideo(
        path=os.fspath(video),
        shape=tuple(views.shape[1:]),
        embedding_size=len(feature),
        embedding_norm=feature.norm().item(),
        top=classifier.top(views, count=3),
    )


@contextmanager
def _folder(out: Path | None) -> Iterator[Path]:
    if out is None:
        with TemporaryDirectory() as name:
            yield Path(name)
        return
    try:
        Path(out).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"cannot make the folder {str(out)!r}: {error.strerror}: choose another one") from error
    yield Path(out)
