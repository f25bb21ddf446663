"""Which frames of a video a clip is made of: sparse, spread over the whole video (paper, section 4.1)."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np


def uniform_indices(total: int, frames: int, clip: int = 0, clips: int = 1) -> np.ndarray:
    """The middle frame of each of ``frames`` equal segments: ``int(i * N / T + N / (2T))``.

    Of several clips, each takes another place in the segments, the same in all: together they are the frames one clip
    of ``clips * frames`` would take. A video shorter than the clip repeats frames.

    Args:
        total: frames in the video, N.
        frames: frames in a clip, T.
        clip: which of the clips, from 0.
        clips: clips taken from the video.

    Returns:
        int64 (frames,), rising.
    """
    _check(total=total, frames=frames, clips=clips)
    offset = (2 * clip + 1) * total / (2 * clips * frames)
    # rounding must not step past the end
    return np.array([min(int(i * total / frames + offset), total - 1) for i in range(frames)], dtype=np.int64)


def segment_indices(total: int, frames: int, generator: np.random.Generator) -> np.ndarray:
    """One frame drawn at random from each of ``frames`` equal segments.

    Returns:
        int64 (frames,), rising; a video shorter than the clip repeats frames.
    """
    _check(total=total, frames=frames)
    edges = np.arange(frames + 1, dtype=np.int64) * total // frames
    return generator.integers(edges[:-1], np.maximum(edges[1:], edges[:-1] + 1))


@dataclass(frozen=True)
class Sampling:
    """How clips are taken from a video of any length.

    Without a ``generator`` this is test sampling, the same at every call; with one it is train sampling, and each clip
    is drawn anew.

    Raises:
        ValueError: ``frames`` or ``clips`` is not a positive integer.

    Example:
        >>> from xclip_fast.video import Sampling
        >>> Sampling(frames=4, clips=2).indices(total=16).tolist()
        [[1, 5, 9, 13], [3, 7, 11, 15]]
    """

    frames: int = 8
    clips: int = 1
    generator: np.random.Generator | None = None

    def __post_init__(self) -> None:
        _check(frames=self.frames, clips=self.clips)

    def indices(self, total: int) -> np.ndarray:
        """Frame numbers, int64 (clips, frames), for a video of ``total`` frames."""
        if self.generator is not None:
            return np.stack([segment_indices(total, self.frames, self.generator) for _ in range(self.clips)])
        return np.stack([uniform_indices(total, self.frames, clip, self.clips) for clip in range(self.clips)])


def _check(**sizes: int) -> None:
    for name, size in sizes.items():
        if not isinstance(size, int | np.integer) or isinstance(size, bool) or size < 1:
            raise ValueError(f"{name} must be a positive integer, found {size!r}")
