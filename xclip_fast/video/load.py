"""From a file to its frames, or to the views a model takes."""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from xclip_fast.errors import InputError
from xclip_fast.video.backends import select_backend
from xclip_fast.video.backends.base import Keep, Request, VideoInfo, log
from xclip_fast.video.members import Member, opened
from xclip_fast.video.preprocess import check_crops, get_preset, preprocess
from xclip_fast.video.sampling import Sampling
from xclip_fast.video.source import CheckedFile

MAX_DECODED_BYTES = 4 * 1024**3


def probe(path: str | os.PathLike[str] | Member, *, backend: str = "auto") -> VideoInfo:
    """What a video file holds, found by counting its packets and decoding at most one frame.

    Raises:
        InputError: the file is missing, no video, damaged or beyond the caps, or the backend can't be used.

    Example:
        >>> from xclip_fast.video import probe
        >>> probe("clip.mp4").frames
        12
    """
    with opened(path) as source:
        return select_backend(backend, source).probe(source)


def read_frames(
    path: str | os.PathLike[str] | Member,
    indices: Sequence[int] | np.ndarray | None = None,
    *,
    sample: Sampling | None = None,
    backend: str = "auto",
) -> np.ndarray:
    """Decode frames of a video at their full size.

    Frames are numbered in the order they are shown, whatever time lies between them. A rotation in the file's metadata
    is applied, so frames come upright. A file cut short is used, with a warning, as far as it can be decoded, when one
    clip's frames are left. Each frame is decoded once, however often it is asked for.

    Args:
        path: a local file: mp4, mov, mkv, webm, avi, mpg or ts.
        indices: frame numbers in any order, repeats allowed; without them and ``sample``, every frame.
        sample: takes the frames of one or several clips instead; a video shorter than a clip repeats frames.
        backend: "auto" (the first usable one of the following), "pyav", "torchcodec" or "decord".

    Returns:
        uint8 (n, H, W, 3) RGB; n is ``len(indices)``, or clips x frames, one clip after the other.

    Raises:
        InputError: the file is missing, no video, too damaged or beyond the caps; an index lies past its end; the
            frames would take more than 4 GiB; the backend can't be used.
        ValueError: both ``indices`` and ``sample``, or indices that are not whole numbers from 0.

    Example:
        >>> from xclip_fast.video import read_frames
        >>> read_frames("clip.mp4", [0, 11]).shape
        (2, 48, 64, 3)
    """
    room = MAX_DECODED_BYTES

    def keep(frame: np.ndarray) -> np.ndarray:
        nonlocal room
        room -= frame.nbytes
        if room < 0:
            limit = MAX_DECODED_BYTES // 1024**3
            raise InputError(f"{source.name}: the frames take more than {limit} GiB; ask for fewer, or use load_video")
        return frame

    with opened(path) as source:
        request = _request(source, indices, sample)
        decoded = select_backend(backend, source).read(source, request, keep)
    if len({frame.shape for frame in decoded.frames.values()}) > 1:
        raise InputError(f"{source.name}: its picture size changes; use load_video, which resizes each frame")
    return np.stack([decoded.frames[number] for number in decoded.picks.ravel().tolist()])


def load_video(
    path: str | os.PathLike[str] | Member,
    *,
    frames: int = 8,
    size: int = 224,
    preset: str = "official",
    clips: int = 1,
    crops: int = 1,
    backend: str = "auto",
) -> torch.Tensor:
    """The views of a video that ``encode_video`` takes as a batch; average their logits. The paper's full test is
    ``clips=4, crops=3``.

    Each frame is resized as soon as it is decoded, once for all views, so memory does not grow with the video's size.

    Args:
        path: a local file: mp4, mov, mkv, webm, avi, mpg or ts.
        frames: frames in a view, T; a shorter video repeats frames, with a warning.
        size: side of the square views in pixels.
        preset: "official", "hf" or "clip", see ``preprocess``.
        clips: clips spread over the video's length; the same ones at every call.
        crops: 1 or 3 crops of each frame.
        backend: as in ``read_frames``.

    Returns:
        uint8 (clips * crops, T, size, size, 3) RGB; the crops of a clip follow each other.

    Raises:
        InputError: as in ``read_frames``, or no preset has this name.
        ValueError: a number is out of range.

    Example:
        >>> from xclip_fast.video import load_video
        >>> load_video("clip.mp4", clips=4, crops=3).shape
        torch.Size([12, 8, 224, 224, 3])
    """
    sampling = Sampling(frames=frames, clips=clips)
    get_preset(preset)
    check_crops(size, crops)

    def keep(frame: np.ndarray) -> torch.Tensor:
        return preprocess(frame[None], preset, size, crops)[:, 0]

    views = torch.stack(sampled_frames(path, sampling, keep, backend))
    return views.unflatten(0, (clips, frames)).transpose(1, 2).flatten(0, 1).contiguous()


def sampled_frames(path: str | os.PathLike[str] | Member, sampling: Sampling, keep: Keep, backend: str) -> list[Any]:
    """What ``keep`` makes of each frame that ``sampling`` takes, one clip after the other; each is decoded once."""
    with opened(path) as source:
        decoded = select_backend(backend, source).read(source, _request(source, None, sampling), keep)
    return [decoded.frames[number] for number in decoded.picks.ravel().tolist()]


def _request(source: CheckedFile, indices: Sequence[int] | np.ndarray | None, sample: Sampling | None) -> Request:
    if indices is not None and sample is not None:
        raise ValueError("give either indices or sample, not both")
    if sample is not None:
        return Request(lambda count: _sampled(source, sample, count), least=sample.frames)
    if indices is None:
        return Request(lambda count: np.arange(count))
    wanted = np.asarray(indices)
    if wanted.ndim != 1 or not wanted.size or wanted.dtype.kind not in "iu" or wanted.min() < 0:
        raise ValueError(f"indices must be whole numbers from 0, at least one, found {indices!r}")
    return Request(lambda count: _listed(source, wanted, count))


def _sampled(source: CheckedFile, sample: Sampling, count: int) -> np.ndarray:
    if count < sample.frames:
        # a short video is drawn again and again in training
        log.log(
            logging.WARNING if sample.generator is None else logging.DEBUG,
            "%s: %d of the %d frames of a clip, frames repeat",
            source.name,
            count,
            sample.frames,
        )
    return sample.indices(count)


def _listed(source: CheckedFile, wanted: np.ndarray, count: int) -> np.ndarray:
    if wanted.max() >= count:
        raise InputError(f"{source.name}: frame {wanted.max()} was asked for, the last one is {count - 1}")
    return wanted
