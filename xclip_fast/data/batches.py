"""Batches for training, decoded ahead; a video that cannot be decoded is replaced, and the batch stays as large."""

from __future__ import annotations

from collections import deque
from collections.abc import Generator, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import chain
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from xclip_fast.data.augment import Augmentation
from xclip_fast.data.dataset import Dataset
from xclip_fast.data.quarantine import Quarantine
from xclip_fast.errors import InputError
from xclip_fast.video.jobs import DEADLINE_SECONDS, Answer, Candidate, decode_jobs
from xclip_fast.video.pool import check_backend, default_workers
from xclip_fast.video.preprocess import check_crops
from xclip_fast.video.sampling import Sampling

MOST_ATTEMPTS = 20
_REPLACEMENT = 2  # tells this use of a seed from those in ``load_clip``


class Draw(NamedTuple):
    """A video of an epoch: ``place`` in the order of the epoch, ``index`` into the samples of the data set.

    Example:
        >>> from xclip_fast.data import Draw
        >>> Draw(epoch=0, place=3, index=17).index
        17
    """

    epoch: int
    place: int
    index: int  # type: ignore[assignment]  # hides the method of tuples


@dataclass
class Batch:
    """Clips with their labels.

    videos: uint8 (B, T, H, W, 3), in memory of its own.
    labels: int64 (B,).
    paths: where each clip came from.
    seconds: that processes spent decoding and augmenting it.

    Example:
        >>> import torch
        >>> from xclip_fast.data import Batch
        >>> Batch(torch.zeros(1, 8, 32, 32, 3, dtype=torch.uint8), torch.tensor([2]), ["clip.mp4"], 0.1).paths
        ['clip.mp4']
    """

    videos: Tensor
    labels: Tensor
    paths: list[str]
    seconds: float


@dataclass(frozen=True)
class _Choice(Candidate):
    label: int = 0


def training_batches(
    dataset: Dataset,
    groups: Iterable[Sequence[Draw]],
    *,
    frames: int,
    size: int,
    augmentation: Augmentation,
    seed: int,
    workers: int | None = None,
    timeout: float = DEADLINE_SECONDS,
    quarantine: Quarantine,
    backend: str = "auto",
) -> Generator[Batch, None, None]:
    """One batch for each group, in their order, decoded and augmented in processes of their own.

    A clip depends on the seed and its draw alone: neither the number of workers nor where a run was begun changes a
    bit. A video that cannot be decoded goes onto the quarantine list, and another one, drawn by seed, epoch, place and
    attempt, takes its place with its own label. So a run that goes on without the list gets the same batches. A process
    that dies by itself is given the video once more before the video is held to be the reason.

    Args:
        dataset: the videos.
        groups: draws of a batch each, an empty one for a batch of no videos; read ahead by other threads.
        frames: frames of a clip, T: one at random from each of as many segments of a video.
        size: side of the clips in pixels.
        augmentation: what is done to the frames.
        seed: from 0.
        workers, timeout: as for ``decode_files``. Closing the iterator ends the processes.
        quarantine: the bad videos; its file is written when a batch brought new ones.
        backend: as for ``load_video``.

    Raises:
        InputError: torchvision or the backend is missing, there is no video, the processes do not start, or 20 videos
            in a row cannot be decoded.
        ValueError: a number is out of range.

    Example:
        >>> from xclip_fast.data import Augmentation, Dataset, Draw, Quarantine, Sample, training_batches
        >>> data = Dataset((Sample("clip.mp4", 0), Sample("moving_right.mp4", 1)), ("standing still", "moving right"))
        >>> groups = [[Draw(epoch=0, place=0, index=1), Draw(epoch=0, place=1, index=0)]]
        >>> options = dict(frames=4, size=32, augmentation=Augmentation(flip=0.0), seed=0, quarantine=Quarantine())
        >>> for batch in training_batches(data, groups, **options):
        ...     print(batch.videos.shape, batch.labels.tolist(), batch.paths)
        torch.Size([2, 4, 32, 32, 3]) [1, 0] ['moving_right.mp4', 'clip.mp4']
    """
    try:
        from xclip_fast.data.clips import load_clip
    except ImportError as error:
        raise InputError(
            f"augmentations need torchvision, found no {error.name}: pip install 'xclip-fast[train]'"
        ) from None
    Sampling(frames)
    check_crops(size, 1)
    check_backend(backend)
    if seed < 0:
        raise ValueError(f"seed must be 0 or more, found {seed}")
    if not dataset.samples:
        raise InputError("the data set has no video: name one that has")
    if workers is None:
        workers = default_workers(len(dataset.samples))
    clip = frames, size, size, 3
    waiting: deque[Sequence[Draw]] = deque()
    each = iter(groups)
    # how large batches are is known from the first
    first = next(each, None)
    answers = decode_jobs(
        _jobs(dataset, each if first is None else chain([first], each), seed, quarantine, waiting),
        load_clip,
        {"frames": frames, "size": size, "backend": backend, "augmentation": asdict(augmentation)},
        (1, *clip),
        workers=workers,
        timeout=timeout,
        ahead=2 * len(first or ()),
        failed=lambda source, error: quarantine.add(str(source), str(error)),
    )
    return _batches(answers, waiting, clip, quarantine)


def _jobs(
    dataset: Dataset,
    groups: Iterable[Sequence[Draw]],
    seed: int,
    quarantine: Quarantine,
    waiting: deque[Sequence[Draw]],
) -> Iterator[Iterator[Candidate]]:
    for group in groups:
        for draw in group:
            if not 0 <= draw.index < len(dataset.samples) or min(draw.epoch, draw.place) < 0:
                raise ValueError(f"{draw} is no draw from {len(dataset.samples)} videos")
        waiting.append(group)
        for draw in group:
            yield _candidates(dataset, draw, seed, quarantine)


def _candidates(dataset: Dataset, draw: Draw, seed: int, quarantine: Quarantine) -> Iterator[Candidate]:
    for attempt in range(MOST_ATTEMPTS):
        place = [seed, draw.epoch, draw.place, attempt]
        index = draw.index
        if attempt:
            index = int(np.random.default_rng([*place, _REPLACEMENT]).integers(len(dataset.samples)))
        sample = dataset.samples[index]
        # one that is known to be bad is an attempt too: with the list or without, the next is the same
        if str(sample.source) not in quarantine.reasons:
            yield _Choice(sample.source, {"seed": place}, sample.label)


def _batches(
    answers: Generator[Answer, None, None],
    waiting: deque[Sequence[Draw]],
    clip: tuple[int, ...],
    quarantine: Quarantine,
) -> Generator[Batch, None, None]:
    batch, filled = None, 0
    try:
        for answer in answers:
            while batch is None:
                # a group is there before its first answer is, and so are the empty ones before it
                batch, filled = _empty(len(waiting.popleft()), clip), 0
                if not batch.paths:
                    yield batch
                    batch = None
            _put(batch, filled, answer, quarantine)
            filled += 1
            if filled == len(batch.paths):
                quarantine.save()
                yield batch
                batch = None
        for group in waiting:
            yield _empty(len(group), clip)
    finally:
        answers.close()
        quarantine.save()


def _empty(count: int, clip: tuple[int, ...]) -> Batch:
    videos = torch.empty((count, *clip), dtype=torch.uint8)
    return Batch(videos, torch.empty(count, dtype=torch.int64), [""] * count, 0.0)


def _put(batch: Batch, place: int, answer: Answer, quarantine: Quarantine) -> None:
    batch.seconds += answer.seconds
    if not isinstance(answer.used, _Choice) or answer.views is None:
        listed = "" if quarantine.path is None else f", those that {quarantine.path} lists among them"
        last = f", the last: {answer.failures[-1][1]}" if answer.failures else ""
        raise InputError(f"{MOST_ATTEMPTS} videos in a row cannot be decoded{listed}: check the data set{last}")
    batch.videos[place].copy_(answer.views[0])
    batch.labels[place] = answer.used.label
    batch.paths[place] = str(answer.used.source)
