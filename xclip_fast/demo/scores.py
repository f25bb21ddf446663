"""How often a model is right: over all classes, and between a class and its reversal."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from xclip_fast.demo.clips import CLASSES, PAIRS
from xclip_fast.demo.models import MODELS


@dataclass(frozen=True)
class Score:
    """Accuracies of one model, from 0 to 1.

    top1: among all classes.
    pairs: for each pair, among its two classes alone, where chance is a half.
    pair_accuracy: the mean of ``pairs``.
    """

    model: str
    title: str
    top1: float
    pair_accuracy: float
    pairs: dict[str, float]


def score(model: str, scores: Tensor, labels: Tensor) -> Score:
    """The accuracies of a model.

    Args:
        model: a key of ``MODELS``.
        scores: (B, K) logits or probabilities of the classes.
        labels: (B,), with clips of each pair among them.
    """
    right = scores.argmax(dim=1) == labels
    ours = scores.gather(1, labels[:, None])
    partners = scores.gather(1, (labels ^ 1)[:, None])
    # a tie is half right
    between = ((ours > partners).double() + (ours == partners).double() / 2).squeeze(1)
    pairs = {
        f"{CLASSES[2 * pair]} / {CLASSES[2 * pair + 1]}": between[labels // 2 == pair].mean().item()
        for pair in range(len(PAIRS))
    }
    return Score(model, MODELS[model], right.double().mean().item(), sum(pairs.values()) / len(pairs), pairs)
