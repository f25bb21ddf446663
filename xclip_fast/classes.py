"""Large label sets: video-specific prompts in chunks of classes, never a buffer of videos x classes x width."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from xclip_fast.reference.model import VideoFeatures

CHUNK_BYTES = {"cpu": 64 << 20, "cuda": 2 << 30}
_ROW_FLOATS = 16  # times the width: what the prompt layers hold at once for one video and one class


def class_chunks(classes: int, videos: int, width: int, device: torch.device) -> Iterator[slice]:
    """Slices of a class set, in order, each as large as the chunk memory of the device allows; one if it is empty.

    Args:
        classes: size of the set, K.
        videos: videos that the classes are adapted to at once, B.
        width: of the text features, E.
        device: where the logits are computed.
    """
    room = CHUNK_BYTES.get(device.type, CHUNK_BYTES["cpu"])
    size = max(1, room // (4 * _ROW_FLOATS * width * max(1, videos)))
    for first in range(0, max(1, classes), size):
        yield slice(first, first + size)


def class_logits(model: Any, features: VideoFeatures, text: Tensor) -> Tensor:
    """``model.logits(features, text)`` without a buffer of videos x classes x width, the same but for rounding.

    Args:
        model: what ``create_model`` or ``load_model`` returns.
        features: of B videos, from ``model.encode_video``.
        text: (K, E), from ``model.encode_text``, on the device of the model.

    Returns:
        (B, K) in the dtype of the model.
    """
    chunks = class_chunks(len(text), len(features.video), text.shape[-1], text.device)
    return torch.cat([model.logits(features, text[chunk]) for chunk in chunks], dim=1)
