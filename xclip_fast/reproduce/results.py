"""The figures of all runs: means over seeds with their intervals, and whether the paper's claims hold in them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from itertools import pairwise
from math import sqrt
from statistics import fmean, stdev
from typing import Any

from xclip_fast.reproduce.models import MODELS, RUNGS, TITLES
from xclip_fast.reproduce.plan import FEW_SHOT, LADDER, SCRATCH, STARTS, VIDEOS, ZERO_SHOT
from xclip_fast.reproduce.world import CLASSES, Class

FORMAT = "xclip_fast reproduction 1"

# the 97.5 % quantile of Student's t with 1, 2, ... degrees of freedom
_STUDENT = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262)
WORDS = Class._fields  # of an answer
LEAST_OVER_CHANCE = 5.0  # of zero-shot accuracy


@dataclass(frozen=True)
class Interval:
    """The mean over seeds and its 95 % interval by Student's t; of one seed there is no interval.

    Example:
        >>> from xclip_fast.reproduce import Interval
        >>> Interval.of([0.5, 0.6, 0.7])
        Interval(mean=0.6, low=0.3516, high=0.8484, values=(0.5, 0.6, 0.7))
    """

    mean: float
    low: float | None
    high: float | None
    values: tuple[float, ...]

    @classmethod
    def of(cls, values: Iterable[float]) -> Interval:
        """Of one value a seed, at most ten."""
        found = tuple(values)
        mean = fmean(found)
        if len(found) == 1:
            return cls(mean, None, None, found)
        half = _STUDENT[len(found) - 2] * stdev(found) / sqrt(len(found))
        # no share is above 1
        return cls(round(mean, 4), round(mean - half, 4), min(1.0, round(mean + half, 4)), found)

    def above(self, other: Interval) -> bool:
        """Whether the whole interval lies above the other one; without intervals, whether the mean does."""
        return (self.mean if self.low is None else self.low) > (other.mean if other.high is None else other.high)


@dataclass(frozen=True)
class Claim:
    """A claim of the paper in miniature, and whether the figures bear it out."""

    text: str
    holds: bool
    figures: str


@dataclass(frozen=True)
class Summary:
    """What the runs amount to.

    Attributes:
        ladder: accuracy of each of ``MODELS`` by its name.
        words: of each of them, how often each word of the answer is right.
        gain: accuracy of X-CLIP over X-CLIP without CFA, seed by seed.
        zero_shot: accuracy on classes never seen in training: "unseen" among those alone, "among_all" classes, and
            "seen", of the other classes among all.
        chance: of each of those three.
        few_shot: accuracy on unseen classes among themselves by K, for each of ``STARTS``.
        claims: the paper's, with what was found.
    """

    ladder: dict[str, Interval]
    words: dict[str, dict[str, Interval]]
    gain: Interval
    zero_shot: dict[str, Interval]
    chance: dict[str, float]
    few_shot: dict[str, dict[int, Interval]]
    claims: tuple[Claim, ...]

    def to_dict(self) -> dict[str, Any]:
        """Ready for JSON."""
        return asdict(self)


def summarise(runs: Sequence[Mapping[str, Any]]) -> Summary:
    """The summary of all runs of a recipe, as ``run_job`` and their jobs give them."""

    def over_seeds(figure: Callable[[Mapping[str, Any]], float], **wanted: Any) -> Interval:
        found = [run for run in runs if all(run["job"][name] == value for name, value in wanted.items())]
        return Interval.of(figure(run) for run in sorted(found, key=lambda run: run["job"]["seed"]))

    def top1(run: Mapping[str, Any]) -> float:
        return run["top1"]

    ladder = {model: over_seeds(top1, kind=LADDER, model=model) for model in MODELS}
    words = {
        model: {word: over_seeds(partial(_word, word), kind=LADDER, model=model) for word in WORDS} for model in MODELS
    }
    pairs = zip(ladder["full"].values, ladder["no_cfa"].values, strict=True)
    gain = Interval.of(ours - without for ours, without in pairs)
    zero_shot = {
        "unseen": over_seeds(top1, kind=ZERO_SHOT),
        "among_all": over_seeds(lambda run: run["among_all"], kind=ZERO_SHOT),
        "seen": over_seeds(lambda run: run["seen"], kind=ZERO_SHOT),
    }
    everything = 1 / len(CLASSES)
    chance = {"unseen": 1 / sum(one.unseen for one in CLASSES), "among_all": everything, "seen": everything}
    shots = sorted({run["job"]["shots"] for run in runs if run["job"]["kind"] == FEW_SHOT})
    few_shot = {start: {k: over_seeds(top1, kind=FEW_SHOT, shots=k, start=start) for k in shots} for start in STARTS}
    claims = _claims(ladder, gain, zero_shot["unseen"], chance["unseen"], few_shot)
    return Summary(ladder, words, gain, zero_shot, chance, few_shot, claims)


def _word(word: str, run: Mapping[str, Any]) -> float:
    return run["words"][word]


def _claims(
    ladder: Mapping[str, Interval],
    gain: Interval,
    unseen: Interval,
    chance: float,
    few_shot: Mapping[str, Mapping[int, Interval]],
) -> tuple[Claim, ...]:
    rungs = [ladder[name] for name in RUNGS]
    single = gain.low is None
    apart = "" if single else ", with intervals that do not overlap"
    return (
        Claim(
            f"Each part raises the accuracy, in the paper's order{apart}.",
            all(higher.above(lower) for lower, higher in pairwise(rungs)),
            "; ".join(f"{TITLES[name]}: {shown(ladder[name])}" for name in RUNGS),
        ),
        Claim(
            f"Cross-frame attention has a gain of its own: without it the other parts reach less{apart}.",
            ladder["full"].above(ladder["no_cfa"]),
            f"X-CLIP: {shown(ladder['full'])}; without: {shown(ladder['no_cfa'])}; seed by seed {shown(gain)}",
        ),
        Claim(
            f"Zero-shot, on combinations of words never seen, {LEAST_OVER_CHANCE:g} times chance or more.",
            (unseen.mean if unseen.low is None else unseen.low) >= LEAST_OVER_CHANCE * chance,
            f"{shown(unseen)}, chance {percent(chance)}: {unseen.mean / chance:.1f} times",
        ),
        Claim(
            f"With few videos of new classes, pretrained X-CLIP is above X-CLIP from scratch at each K{apart}.",
            all(few_shot[VIDEOS][k].above(few_shot[SCRATCH][k]) for k in few_shot[SCRATCH]),
            "; ".join(
                f"K = {k}: {shown(few_shot[VIDEOS][k])} against {shown(few_shot[SCRATCH][k])}"
                for k in few_shot[SCRATCH]
            ),
        ),
    )


def percent(share: float) -> str:
    """A share as text."""
    return f"{100 * share:.1f} %"


def shown(found: Interval) -> str:
    """A mean in percent, and its interval where there is one."""
    if found.low is None or found.high is None:
        return percent(found.mean)
    return f"{100 * found.mean:.1f} % ({100 * found.low:.1f} to {100 * found.high:.1f})"
