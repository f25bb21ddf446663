"""The published settings of X-CLIP as training runs, each with its source."""

from __future__ import annotations

from typing import Any, NamedTuple

_CONFIGS = "microsoft/VideoX, X-CLIP/configs"
_CLIP = {
    "B/32": "ViT-B-32/openai",
    "B/16": "ViT-B-16/openai",
    "L/14": "ViT-L-14/openai",
    "L/14-336": "ViT-L-14-336/openai",
}


class Recipe(NamedTuple):
    """A published setting.

    Attributes:
        what: the experiment.
        source: where its numbers stand.
        top1: published top-1 accuracy in percent, or None.
        settings: what of ``TrainConfig`` differs from its defaults.

    Example:
        >>> from xclip_fast.train import RECIPES
        >>> RECIPES["k400-b32-8"].top1
        80.4
    """

    what: str
    source: str
    top1: float | None
    settings: dict[str, Any]


def _recipe(
    what: str,
    file: str,
    variant: str,
    frames: int,
    top1: float | None,
    *,
    model: dict[str, Any] | None = None,
    **optimizer: Any,
) -> Recipe:
    weights = {"variant": variant, "weights": _CLIP[variant], "frames": frames, **(model or {})}
    # the official code trains in half precision by apex, which is gone: autocast in bfloat16 has its place
    return Recipe(what, file, top1, {"model": weights, "optimizer": optimizer, "run": {"precision": "bfloat16"}})


def _few_shot(dataset: str, file: str, k: int, top1: float) -> Recipe:
    # batch 64: 8 processes of 4 videos in 2 rounds
    return _recipe(
        f"{dataset}, few-shot, K = {k}",
        f"{_CONFIGS}/{file}.yaml; accuracy: X-CLIP/README.md",
        "B/16",
        32,
        top1,
        lr=2e-6,
        epochs=50,
        batch_size=64,
    )


# accuracies: X-CLIP/README.md of the same repository, the official models with 4 x 3 views where supervised fully
RECIPES: dict[str, Recipe] = {
    "k400-b32-8": _recipe("Kinetics-400", f"{_CONFIGS}/k400/32_8.yaml", "B/32", 8, 80.4),
    "k400-b32-16": _recipe("Kinetics-400", f"{_CONFIGS}/k400/32_16.yaml", "B/32", 16, 81.1),
    "k400-b16-8": _recipe("Kinetics-400", f"{_CONFIGS}/k400/16_8.yaml", "B/16", 8, 83.8),
    "k400-b16-16": _recipe("Kinetics-400", f"{_CONFIGS}/k400/16_16.yaml", "B/16", 16, 84.7),
    "k400-l14-8": _recipe("Kinetics-400", f"{_CONFIGS}/k400/14_8.yaml", "L/14", 8, 87.1),
    "k400-l14-336-16": _recipe(
        "Kinetics-400",
        f"{_CONFIGS}/k400/14_16_336.yaml",
        "L/14-336",
        16,
        87.7,
        model={"gradient_checkpointing": True},
    ),
    "k600-b16-8": _recipe("Kinetics-600", f"{_CONFIGS}/k600/16_8.yaml", "B/16", 8, 85.3),
    "k600-b16-16": _recipe("Kinetics-600", f"{_CONFIGS}/k600/16_16.yaml", "B/16", 16, 85.8),
    "k600-l14-8": _recipe("Kinetics-600", f"{_CONFIGS}/k600/14_8.yaml", "L/14", 8, 88.3),
    **{
        f"hmdb51-{k}-shot": _few_shot("HMDB-51", "hmdb51/16_32", k, top1)
        for k, top1 in ((2, 53.0), (4, 57.3), (8, 62.8), (16, 64.0))
    },
    **{
        f"ucf101-{k}-shot": _few_shot("UCF-101", "ucf101/16_32", k, top1)
        for k, top1 in ((2, 76.4), (4, 83.4), (8, 88.3), (16, 91.4))
    },
    "zero-shot": _recipe(
        "Kinetics-400 for zero-shot HMDB-51 (44.6), UCF-101 (72.0), Kinetics-600 (65.2)",
        f"{_CONFIGS}/k400/16_32.yaml; 10 epochs: paper, section 4",
        "B/16",
        32,
        None,
        epochs=10,
    ),
}
