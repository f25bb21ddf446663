"""Accuracy on the validation videos after an epoch: one view each, as the official code has it."""

from __future__ import annotations

from typing import Any

import torch

from xclip_fast.data import Dataset
from xclip_fast.engine import Engine
from xclip_fast.evaluate import processes, score_files, top_k
from xclip_fast.model import XCLIP
from xclip_fast.train.config import DataSection


def validate(
    model: XCLIP, videos: Dataset, texts: list[str], section: DataSection, dtype: torch.dtype
) -> dict[str, Any]:
    """Top-1 and top-5 accuracy, from 0 to 1, and how many videos they are of and could not be used.

    Every process takes its share, and all have the figures of all.

    Args:
        model: whole, in evaluation mode.
        videos: with the classes that ``texts`` describe.
        texts: one a class.
        section: how to decode.
        dtype: of the engine that scores.
    """
    engine = Engine(model, dtype)
    with processes() as among:
        found = score_files(
            engine,
            [sample.source for sample in videos.samples],
            texts,
            among=among,
            workers=section.workers,
            timeout=section.timeout,
        )
    labels = [videos.samples[place].label for place in found.places]
    return {
        "top1": top_k(found.scores, labels, 1).value,
        "top5": top_k(found.scores, labels, 5).value,
        "validated": len(labels),
        "not_validated": len(found.failed),
    }
