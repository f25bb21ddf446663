"""Mixup and CutMix of whole clips, as bytes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import sqrt

import numpy as np
import torch
from torch import Tensor

_STREAM = 2  # keeps these random numbers apart from those of the order and of the clips


@dataclass(frozen=True)
class Mixing:
    """How pairs of videos are mixed; the defaults are the official recipe's.

    Attributes:
        mixup: alpha of the Beta distribution of Mixup (Zhang et al., 2018); 0 for none.
        cutmix: alpha of that of CutMix (Yun et al., 2019); 0 for none.
        switch: how likely a pair is for CutMix, where there are both.

    Example:
        >>> from xclip_fast.train import Mixing
        >>> Mixing().mixup, Mixing(mixup=0, cutmix=0).is_off
        (0.8, True)
    """

    mixup: float = 0.8
    cutmix: float = 1.0
    switch: float = 0.5

    @property
    def is_off(self) -> bool:
        """Whether nothing is mixed."""
        return not (self.mixup or self.cutmix)


def mix(videos: Tensor, targets: Tensor, mixing: Mixing, seeds: Sequence[tuple[int, ...]]) -> tuple[Tensor, Tensor]:
    """Mix each video with its neighbour: first with second, third with fourth; a last one without neighbour stays.

    The official code mixes a batch with a shuffled copy of itself. In batches that are shuffled anyway neighbours are
    as good, and a pair stays the same however many processes share the batch.

    Args:
        videos: uint8 (B, T, H, W, 3).
        targets: floating point (B, K).
        mixing: what to do; a pair gets Mixup or CutMix, both with one random share for its two videos.
        seeds: of each video; a pair is mixed by that of its first one.

    Returns:
        videos, uint8, Mixup rounded to bytes, and targets mixed in the same shares; the inputs stay as they are.

    Example:
        >>> import torch
        >>> from xclip_fast.train import Mixing, mix
        >>> videos = torch.tensor([0, 200], dtype=torch.uint8)[:, None, None, None, None].expand(2, 8, 4, 4, 3)
        >>> mixed, targets = mix(videos, torch.eye(2), Mixing(cutmix=0), seeds=[(0, 0), (0, 1)])
        >>> bool((mixed[0] == (200 * targets[0, 1]).round()).all())
        True
    """
    videos, targets = videos.clone(), targets.clone()
    if mixing.is_off:
        return videos, targets
    for first in range(0, len(videos) - 1, 2):
        pair = slice(first, first + 2)
        rng = np.random.default_rng([_STREAM, *seeds[first]])
        cuts = rng.random() < (mixing.switch if mixing.mixup and mixing.cutmix else float(mixing.cutmix > 0))
        alpha = mixing.cutmix if cuts else mixing.mixup
        share = float(rng.beta(alpha, alpha))
        swapped = videos[pair].flip(0)
        if cuts:
            rows, columns = _box(videos.shape[2], videos.shape[3], share, rng)
            # in place and together: what is written has been copied by flip
            videos[pair, :, rows, columns] = swapped[:, :, rows, columns]
            area = (rows.stop - rows.start) * (columns.stop - columns.start)
            share = 1 - area / (videos.shape[2] * videos.shape[3])
        else:
            videos[pair] = torch.lerp(swapped.float(), videos[pair].float(), share).round_().byte()
        targets[pair] = torch.lerp(targets[pair].flip(0), targets[pair], share)
    return videos, targets


def _box(height: int, width: int, share: float, rng: np.random.Generator) -> tuple[slice, slice]:
    """A box of ``1 - share`` of the picture around a random centre, cut at the borders."""
    side = sqrt(1 - share)
    ranges = []
    for length in (height, width):
        cut, centre = int(length * side), int(rng.integers(length))
        ranges.append(slice(max(0, centre - cut // 2), min(length, centre + cut // 2)))
    return ranges[0], ranges[1]
