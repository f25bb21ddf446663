"""What every decode backend offers, and the decisions they share."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from xclip_fast.errors import InputError
from xclip_fast.video.source import MAX_FRAMES, CheckedFile

log = logging.getLogger("xclip_fast")

# fewer frames than this share of what the file declares: it was cut short, not merely rounded
_WHOLE = 0.9

Keep = Callable[[np.ndarray], Any]


def undecodable(source: CheckedFile, reason: object) -> InputError:
    """The error for a file whose frames can't be had; only the first line of ``reason`` is shown."""
    line = next(iter(str(reason).splitlines()), "")[:160] or "no reason given"
    return InputError(
        f"{source.name}: cannot be decoded ({line.strip()}); "
        "it is damaged, has no moving pictures, or is of an unknown kind: give another file"
    )


@dataclass(frozen=True)
class VideoInfo:
    """What a file holds: ``frames`` counts stored frames (not the header's word), ``duration`` is in seconds.

    ``width`` and ``height`` are those of the upright picture, after the rotation the file asks for.

    Example:
        >>> from xclip_fast.video import probe
        >>> info = probe("clip.mp4")
        >>> info.width, info.height
        (64, 48)
    """

    frames: int
    fps: float
    width: int
    height: int
    codec: str
    duration: float


@dataclass(frozen=True)
class Request:
    """Which frames are wanted: ``pick`` maps the number of frames in the video to an integer array of indices.

    ``least`` is the number of frames below which a damaged file is refused.
    """

    pick: Callable[[int], np.ndarray]
    least: int = 1

    def settle(self, source: CheckedFile, count: int, declared: int) -> np.ndarray:
        """The indices to read from a video in which ``count`` frames can be found and the header declares others.

        A file that was cut short is used, with a warning, when it still holds the frames that one clip needs.

        Raises:
            InputError: no frame was found, or too few of those the header declares.
        """
        declared = min(declared, MAX_FRAMES)
        if count < 1:
            raise undecodable(source, "no frame comes out")
        if count < _WHOLE * declared:
            found = f"{source.name}: only {count} of about {declared} frames can be read, the file is damaged"
            if count < self.least:
                raise InputError(f"{found}; {self.least} are needed, give another file")
            log.warning("%s; going on with these", found)
        return self.pick(count)


@dataclass(frozen=True)
class Decoded:
    """The frames a request asked for.

    ``frames`` maps an index to what ``keep`` made of that frame; ``picks`` are the indices, in the shape asked for.
    """

    frames: dict[int, Any]
    picks: np.ndarray


def gather(
    source: CheckedFile,
    request: Request,
    count: int,
    declared: int,
    first: Callable[[set[int]], dict[int, Any]],
    in_order: Callable[[set[int]], tuple[dict[int, Any], int]],
) -> Decoded:
    """Get the frames of a request in the quickest way that turns out to be right.

    ``first`` reads wanted frames and may leave some out. Then ``in_order`` decodes from the start, and says how many
    frames came out when the video ended too early: the request chooses again among those.

    Raises:
        InputError: too few frames can be decoded.
    """
    picks = request.settle(source, count, declared)
    frames = first(_distinct(picks))
    while not _distinct(picks) <= frames.keys():
        frames, seen = in_order(_distinct(picks))
        if not _distinct(picks) <= frames.keys():
            picks = request.settle(source, seen, declared)
    return Decoded(frames, picks)


def _distinct(picks: np.ndarray) -> set[int]:
    return set(np.unique(picks).tolist())


class Backend(Protocol):
    """One decoder. ``containers`` are those in which it finds every frame exactly, by FFmpeg's names.

    Frames are numbered in the order they are shown and handed to ``keep`` as uint8 RGB (H, W, 3), upright, each once.
    """

    name: str
    containers: frozenset[str]

    def unavailable(self) -> str | None:
        """Why this backend can't be used here, or None when it can."""

    def probe(self, source: CheckedFile) -> VideoInfo:
        """What the file holds, with one frame decoded at most.

        Raises:
            InputError: there is no video in it, or it is beyond the caps.
        """

    def read(self, source: CheckedFile, request: Request, keep: Keep) -> Decoded:
        """Decode the frames of ``request`` and hand each to ``keep``.

        Raises:
            InputError: there is no video in it, it is beyond the caps, or too damaged.
        """
