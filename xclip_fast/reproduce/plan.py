"""What is run: the recipe of a reproduction, and its runs."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from xclip_fast.reproduce.models import MODELS

# what a run starts from: X-CLIP after zero-shot training on the videos of other classes, the tiny CLIP, or nothing
VIDEOS, CLIP, SCRATCH = "videos", "clip", "scratch"
STARTS = {
    VIDEOS: "after videos of other classes",
    CLIP: "expanded from the tiny CLIP",
    SCRATCH: "from scratch",
}

PRETRAINING, LADDER, ZERO_SHOT, FEW_SHOT = "pretraining", "ladder", "zero_shot", "few_shot"


@dataclass(frozen=True)
class Recipe:
    """How much is run.

    Attributes:
        seeds: of the ladder and of zero-shot training; each gives other weights, clips and order.
        few_shot_seeds: of few-shot training, some of ``seeds``.
        pretraining_steps: of the tiny CLIP, which all runs start from.
        steps: of a run on videos without end.
        few_shot_steps: of a run on a few videos.
        shots: clips of each class, K.
        tested: clips that every run is tested on.
    """

    seeds: tuple[int, ...]
    few_shot_seeds: tuple[int, ...]
    pretraining_steps: int
    steps: int
    few_shot_steps: int
    shots: tuple[int, ...]
    tested: int

    def to_dict(self) -> dict[str, Any]:
        """Ready for JSON."""
        return {name: list(value) if isinstance(value, tuple) else value for name, value in asdict(self).items()}


FULL = Recipe(
    seeds=(0, 1, 2),
    few_shot_seeds=(0, 1, 2),
    pretraining_steps=500,
    steps=1000,
    few_shot_steps=120,
    shots=(2, 4, 8, 16),
    tested=2400,
)
QUICK = Recipe(
    seeds=(0,),
    few_shot_seeds=(0,),
    pretraining_steps=400,
    steps=500,
    few_shot_steps=80,
    shots=(2, 16),
    tested=600,
)


@dataclass(frozen=True)
class Job:
    """One run.

    Attributes:
        kind: PRETRAINING, LADDER, ZERO_SHOT or FEW_SHOT.
        model: a key of ``MODELS``.
        seed: of weights, clips and order.
        steps: of the optimiser.
        shots: clips of each class; None for clips without end.
        start: what it starts from, one of ``STARTS``.
    """

    kind: str
    model: str
    seed: int
    steps: int
    shots: int | None = None
    start: str = CLIP

    @property
    def name(self) -> str:
        """What its file is called."""
        if self.kind == FEW_SHOT:
            return f"{self.kind}-{self.shots}-{self.start}-{self.seed}"
        return f"{self.kind}-{self.model}-{self.seed}"


def stages(recipe: Recipe) -> tuple[list[Job], list[Job], list[Job]]:
    """All runs: each stage starts from weights that one before it made."""
    ladder = [Job(LADDER, model, seed, recipe.steps) for seed in recipe.seeds for model in reversed(MODELS)]
    zero_shot = [Job(ZERO_SHOT, "full", seed, recipe.steps) for seed in recipe.seeds]
    few_shot = [
        Job(FEW_SHOT, "full", seed, recipe.few_shot_steps, shots, start)
        for seed in recipe.few_shot_seeds
        for shots in recipe.shots
        for start in STARTS
    ]
    return [pretraining(recipe)], [*zero_shot, *ladder], few_shot


def jobs(recipe: Recipe) -> list[Job]:
    """All runs, in the order of their stages."""
    return [job for stage in stages(recipe) for job in stage]


def pretraining(recipe: Recipe) -> Job:
    """The run that makes the tiny CLIP."""
    return Job(PRETRAINING, "mean", 0, recipe.pretraining_steps, start=SCRATCH)
