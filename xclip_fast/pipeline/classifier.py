"""From videos to class probabilities: ``xclip-fast classify`` as a library."""

from __future__ import annotations

import os
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor

from xclip_fast.classes import class_logits
from xclip_fast.errors import InputError, is_out_of_memory
from xclip_fast.pipeline.batches import BATCH_SIZE, VIEWS_AT_ONCE, check_finite, device_of, is_engine, run_files
from xclip_fast.text import TextCache, Tokenizer, apply_template, clean_labels
from xclip_fast.video.pool import DEADLINE_SECONDS, Source

MAX_LABEL_BYTES = 16 << 20

Result = TypeVar("Result")


@dataclass(frozen=True)
class Prediction:
    """One class of a video: its label, its place in the label list, and the probability the model gives it.

    Example:
        >>> from xclip_fast.pipeline import Prediction
        >>> Prediction("cooking", index=1, probability=0.9).label
        'cooking'
    """

    label: str
    index: int
    probability: float


class Classifier:
    """Class probabilities of videos; the label texts are encoded once.

    Args:
        model: an ``Engine``, or what ``create_model`` or ``load_model`` returns.
        labels: class names; blank and repeated ones are refused.
        tokenizer: the one the model was trained with, from ``get_tokenizer``.
        template: a sentence with ``{}`` in the label's place.
        text_cache: a folder that keeps the encoded texts of a model for the next run, see ``TextFolder``. An engine
            brings its own: ``Engine(model, text_cache=...)``.

    Raises:
        InputError: the labels, the template or the folder cannot be used.
        ValueError: a folder was given beside an engine.

    Example:
        >>> import torch
        >>> from xclip_fast import Engine, XCLIPConfig, create_model
        >>> from xclip_fast.pipeline import Classifier
        >>> from xclip_fast.text import get_tokenizer
        >>> config = XCLIPConfig(image_size=32, patch_size=16, vision_width=64, vision_layers=1, embed_dim=64,
        ...                      text_width=64, text_layers=1, vocab_size=514)
        >>> engine = Engine(create_model(config, seed=0))
        >>> classifier = Classifier(engine, ["cooking", "riding a bike"], get_tokenizer(config))
        >>> views = torch.zeros(4, 8, 32, 32, 3, dtype=torch.uint8)  # of one video, as load_video returns them
        >>> classifier.probabilities(views).shape
        torch.Size([2])
        >>> [prediction.index for prediction in classifier.top(views, count=1)] in ([0], [1])
        True
    """

    def __init__(
        self,
        model: Any,
        labels: Sequence[str],
        tokenizer: Tokenizer,
        template: str = "{}",
        text_cache: str | None = None,
    ) -> None:
        self.model = model
        self.labels = clean_labels(labels)
        tokens = tokenizer(apply_template(self.labels, template), model.config.context_length)
        if is_engine(model):
            if text_cache is not None:
                raise ValueError("text_cache was given beside an engine: give it to Engine(model, text_cache=...)")
            self.text: Any = model.encode_texts(tokens)
        else:
            self.text = TextCache(folder=text_cache).encode(model, tokens)

    @torch.inference_mode()
    def probabilities(self, views: Tensor) -> Tensor:
        """float32 (K,): the softmax over the labels of each view, averaged over the views as the official code does.

        Args:
            views: uint8 (views, T, H, W, 3) of one video.

        Raises:
            InputError: the model gave something that is not a number.
        """
        total = torch.zeros(len(self.labels))
        for some in views.to(device_of(self.model)).split(VIEWS_AT_ONCE):
            total += _scores(self.model, some, self.text, logits=False).sum(dim=0).cpu()
        return check_finite(total / len(views))

    def top(self, views: Tensor, count: int = 5) -> list[Prediction]:
        """The likeliest ``count`` labels of one video, best first; ties keep the order of the labels."""
        probabilities, order = self.probabilities(views).sort(descending=True, stable=True)
        best = zip(order[:count].tolist(), probabilities[:count].tolist(), strict=True)
        return [Prediction(self.labels[index], index, probability) for index, probability in best]


@dataclass(frozen=True)
class FileScores:
    """What became of one file.

    path: as given.
    scores: float32 (K,) on the CPU, the mean over the views; None for a file that cannot be used.
    error: why the file cannot be used.

    Example:
        >>> from xclip_fast import InputError
        >>> from xclip_fast.pipeline import FileScores
        >>> FileScores("none.mp4", error=InputError("none.mp4: cannot be read")).scores is None
        True
    """

    path: Source
    scores: Tensor | None = None
    error: InputError | None = None


def classify_files(
    model: Any,
    paths: Iterable[Source | os.PathLike[str]],
    texts: Any,
    *,
    logits: bool = False,
    ends: Collection[int] = (),
    batch_size: int = BATCH_SIZE,
    clips: int = 1,
    crops: int = 1,
    preset: str = "official",
    backend: str = "auto",
    workers: int | None = None,
    timeout: float = DEADLINE_SECONDS,
) -> Iterator[FileScores]:
    """The class probabilities of each file, in the order of the files; one that cannot be used comes with its error.

    The softmax over the classes of each view, averaged over the views as the official code does. All views of a file
    come from one decoding of it, and views of several files share a batch. What shares a batch may change the rounding
    of a GEMM, see ``embed_files``: ``ends`` says where batches end.

    Args:
        model: an ``Engine``, or what ``create_model`` or ``load_model`` returns.
        paths: what ``decode_files`` takes.
        texts: for an engine what its ``encode_texts`` returns or takes, for a model features (K, E) of ``encode_text``.
        logits: the mean of the logits instead of the probabilities.
        ends: no batch goes on past the files whose places are in it.
        batch_size: views in a batch.
        clips, crops, preset, backend: as for ``load_video``; frames and size are the model's.
        workers, timeout: as for ``decode_files``. Ending the iterator ends the processes.

    Raises:
        InputError: an option cannot be used, the memory is too small for the batch, or the processes do not start.
        ValueError: a number is out of range, or ``paths`` is one path.

    Example:
        >>> import xclip_fast
        >>> from xclip_fast.demo.models import load_trained
        >>> from xclip_fast.pipeline import classify_files
        >>> engine = xclip_fast.Engine(load_trained("xclip"))
        >>> labels = ["a shape moving right", "a shape moving left"]
        >>> for found in classify_files(engine, ["moving_right.mp4", "none.mp4"], labels, preset="hf"):
        ...     print(found.path, "unusable" if found.error else labels[found.scores.argmax()])
        moving_right.mp4 a shape moving right
        none.mp4 unusable
    """
    if isinstance(paths, str | os.PathLike):
        raise ValueError(f"paths must be a list of files, found the one path {os.fspath(paths)!r}")
    if is_engine(model):
        # once, not for each batch
        texts = model.encode_texts(texts) if not hasattr(texts, "engine") else texts

    @torch.inference_mode()
    def encode(views: Tensor) -> Sequence[Tensor]:
        return [_scores(model, views, texts, logits)]

    options = {"clips": clips, "crops": crops, "preset": preset, "backend": backend}
    sources = [os.fsdecode(path) if isinstance(path, os.PathLike) else path for path in paths]
    files = run_files(model, encode, sources, ends, batch_size=batch_size, workers=workers, timeout=timeout, **options)
    return _file_scores(files)


def _file_scores(files: Any) -> Iterator[FileScores]:
    # whoever closes this ends the processes that decode
    with closing(files):
        for file in files:
            yield FileScores(file.source, file.means[0] if file.means else None, file.error)


def _scores(model: Any, views: Tensor, texts: Any, logits: bool) -> Tensor:
    """Float32 (views, K): probabilities, or logits."""
    if is_engine(model):
        found: Tensor = model(views, texts) if logits else model.classify(views, texts)
        return found
    found = class_logits(model, model.encode_video(views), texts).float()
    return found if logits else found.softmax(dim=-1)


def each_file(
    paths: Iterable[str], work: Callable[[str], Result]
) -> Iterator[tuple[str, Result | None, InputError | None]]:
    """Do the work on each file: (path, result, None), or (path, None, error) for a file that cannot be used.

    Example:
        >>> from xclip_fast.pipeline import each_file, read_labels
        >>> [(path, str(error)) for path, _, error in each_file(["none.txt"], read_labels)]
        [('none.txt', 'cannot read label file none.txt: No such file or directory')]
    """
    for path in paths:
        result = error = None
        try:
            result = work(path)
        except InputError as refused:
            error = refused
        except (MemoryError, RuntimeError) as failed:
            if not is_out_of_memory(failed):
                raise
            error = InputError(f"{path}: not enough memory: use fewer views or frames, or another device")
        yield path, result, error


def read_labels(path: str) -> list[str]:
    """The lines of a UTF-8 text file that are not blank.

    Raises:
        InputError: the file cannot be read, is not text, or is larger than 16 MiB.

    Example:
        >>> from pathlib import Path
        >>> from xclip_fast.pipeline import read_labels
        >>> _ = Path("labels.txt").write_text("riding a bike")
        >>> read_labels("labels.txt")
        ['riding a bike']
    """
    try:
        with open(path, "rb") as file:
            data = file.read(MAX_LABEL_BYTES + 1)
        if len(data) > MAX_LABEL_BYTES:
            raise InputError(f"label file {path} is larger than {MAX_LABEL_BYTES >> 20} MiB: give one label a line")
        text = data.decode("utf-8-sig")
    except OSError as error:
        raise InputError(f"cannot read label file {path}: {error.strerror}") from None
    except UnicodeDecodeError:
        raise InputError(f"label file {path} is not UTF-8 text: give one label a line") from None
    labels = [line.strip() for line in text.splitlines() if line.strip()]
    if not labels:
        raise InputError(f"label file {path} holds no label: give one label a line")
    return labels
