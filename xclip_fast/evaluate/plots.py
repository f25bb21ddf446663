"""The plots of an evaluation, as SVG: which classes are taken for which, and whether probabilities can be trusted."""

from __future__ import annotations

import warnings
from typing import Any

import numpy as np

from xclip_fast.evaluate.metrics import Calibration
from xclip_fast.evaluate.results import Classified
from xclip_fast.pages import COLOURS, INK, svg

MOST_NAMED = 60  # classes whose names can be read beside the plot
_LONGEST = 32  # letters of a name there


def confusion_plot(found: Classified) -> str:
    """Row: the class of the videos; column: the answer; colour: the share of the row's videos."""
    counts = np.asarray(found.confusion, np.float64)
    videos = counts.sum(axis=1, keepdims=True)
    shares = np.divide(counts, videos, out=np.zeros_like(counts), where=videos > 0)

    def paint(axes: Any) -> None:
        # as an image: a mesh of 600 x 600 cells would be tens of megabytes of paths
        image = axes.imshow(shares, cmap="Blues", vmin=0, vmax=1, interpolation="nearest", aspect="equal")
        axes.figure.colorbar(image, ax=axes, shrink=0.6, label="share of the videos of the class")
        axes.set_xlabel("answer")
        axes.set_ylabel("class")
        for spine in axes.spines.values():
            spine.set_visible(True)
        if len(found.classes) <= MOST_NAMED:
            names = [_cut(name) for name in found.classes]
            size = 8 if len(names) <= 30 else 5
            axes.set_xticks(range(len(names)), names, rotation=90, fontsize=size)
            axes.set_yticks(range(len(names)), names, fontsize=size)

    with warnings.catch_warnings():
        # a reader's browser draws what the fonts of this machine lack
        warnings.filterwarnings("ignore", message="Glyph")
        return svg(paint, 6.4)


def reliability_plot(found: Calibration) -> str:
    """Accuracy against confidence, with the share of the videos in each bin below it."""
    used = [one for one in found.bins if one.videos]
    total = sum(one.videos for one in used)

    def paint(axes: Any) -> None:
        centres = [(one.low + one.high) / 2 for one in used]
        width = 0.9 * (used[0].high - used[0].low)
        axes.bar(centres, [one.videos / total for one in used], width, color=COLOURS[6], alpha=0.35, label="videos")
        axes.plot([0, 1], [0, 1], "--", color=INK, lw=1, label="calibrated")
        sure, right = [one.confidence for one in used], [one.accuracy for one in used]
        axes.plot(sure, right, "o-", color=COLOURS[0], label="accuracy", clip_on=False)
        axes.set_xlim(0, 1)
        axes.set_ylim(0, 1)
        axes.set_xlabel("probability of the best class")
        axes.set_ylabel("share")
        axes.legend(frameon=False, loc="upper left")

    return svg(paint, 3.6)


def _cut(name: str) -> str:
    shown = "".join(letter if letter.isprintable() else "?" for letter in name)
    return shown if len(shown) <= _LONGEST else shown[: _LONGEST - 3] + "..."
