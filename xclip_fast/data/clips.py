"""A clip for training, from a file to augmented frames: what the processes of ``training_batches`` run."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torchvision.transforms.v2 import functional

from xclip_fast.data.augment import Augmentation, Decision, decide
from xclip_fast.video.load import sampled_frames
from xclip_fast.video.pool import Source
from xclip_fast.video.preprocess import PRESETS, preprocess, resize
from xclip_fast.video.sampling import Sampling

_OFFICIAL = PRESETS["official"]


def load_clip(
    source: Source, *, frames: int, size: int, backend: str, augmentation: dict[str, Any], seed: list[int]
) -> Tensor:
    """One frame drawn from each of ``frames`` segments of a video, augmented alike.

    Args:
        source: the video.
        frames, size, backend: as for ``load_video``.
        augmentation: the fields of an ``Augmentation``.
        seed: what is drawn depends on nothing else.

    Returns:
        uint8 (1, T, size, size, 3).

    Raises:
        InputError: as ``load_video``.
    """
    decision = decide(Augmentation(**augmentation), np.random.default_rng([*seed, 1]))
    sampling = Sampling(frames, generator=np.random.default_rng([*seed, 0]))

    def keep(frame: np.ndarray) -> Tensor:
        return _cropped(torch.from_numpy(frame)[None], size, decision)[0]

    # sums over a picture are rounded otherwise on other numbers of threads
    with _one_thread():
        clip = torch.stack(sampled_frames(source, sampling, keep, backend))
        return _colored(clip, decision)[None]


def _cropped(frames: Tensor, size: int, decision: Decision) -> Tensor:
    if decision.scales is None:
        return preprocess(frames, size=size)[0]
    height, width = _OFFICIAL.resized(frames.shape[1], frames.shape[2], size, crops=1)
    top, left, high, wide = decision.box(height, width)
    # a small crop of few pixels still has one
    high, wide = max(high, 1), max(wide, 1)
    resized = resize(frames, height, width, _OFFICIAL)[:, top : top + high, left : left + wide]
    return resize(resized, size, size, _OFFICIAL)


def _colored(clip: Tensor, decision: Decision) -> Tensor:
    # (T, 3, H, W), whose planes one after the other are quicker to compute with
    pixels = clip.permute(0, 3, 1, 2)
    if decision.colors or decision.gray:
        pixels = pixels.contiguous()
    if decision.flip:
        pixels = functional.horizontal_flip(pixels)
    for name, factor in decision.colors:
        pixels = getattr(functional, f"adjust_{name}")(pixels, factor)
    if decision.gray:
        pixels = functional.rgb_to_grayscale(pixels, num_output_channels=3)
    return pixels.permute(0, 2, 3, 1)


@contextmanager
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    if threads == 1:
        yield
        return
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
