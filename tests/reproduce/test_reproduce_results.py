"""Means and intervals, when a claim holds, and the page."""

from __future__ import annotations

from dataclasses import asdict, replace
from statistics import mean, stdev
from typing import Any

import pytest
from markupsafe import escape

from xclip_fast.reproduce.models import MODELS, TITLES
from xclip_fast.reproduce.page import page
from xclip_fast.reproduce.plan import CLIP, FEW_SHOT, FULL, LADDER, PRETRAINING, SCRATCH, ZERO_SHOT, Job, jobs
from xclip_fast.reproduce.results import Claim, Interval, summarise

RECIPE = replace(FULL, seeds=(0, 1, 2), few_shot_seeds=(0, 1), shots=(2, 16))
GOOD = {"mean": 0.1, "cfa": 0.2, "cfa_mit": 0.4, "full": 0.9, "no_cfa": 0.5}


def made_up(
    ladder: dict[str, float], unseen: float = 0.8, few: float = 0.6, spread: float = 0.01
) -> list[dict[str, Any]]:
    """Runs of ``RECIPE`` with accuracies of our own; those of seeds lie ``spread`` apart."""
    runs = []
    for job in jobs(RECIPE):
        top1 = {
            PRETRAINING: 1.0,
            LADDER: ladder[job.model],
            ZERO_SHOT: unseen,
            FEW_SHOT: 0.2 if job.start == SCRATCH else few,
        }[job.kind]
        run = {"job": asdict(job), "top1": top1 + spread * job.seed, "cpu_seconds": 1.0}
        run["words"] = dict.fromkeys(("shape", "motion", "pattern"), 0.5)
        if job.kind == ZERO_SHOT:
            run |= {"among_all": 0.7, "seen": 0.9}
        runs.append(run)
    return runs


def holds(runs: list[dict[str, Any]]) -> list[bool]:
    return [claim.holds for claim in summarise(runs).claims]


@pytest.mark.parametrize("count", [2, 3, 5, 10])
def test_the_interval_is_that_of_student(count: int) -> None:
    quantile = {2: 12.7062, 3: 4.3027, 5: 2.7764, 10: 2.2622}[count]
    values = [0.3 + 0.07 * (number % 3) for number in range(count)]
    found = Interval.of(values)
    half = quantile * stdev(values) / count**0.5
    assert found.mean == pytest.approx(mean(values), abs=1e-4)
    assert (found.low, found.high) == pytest.approx((mean(values) - half, mean(values) + half), abs=2e-4)
    assert found.values == tuple(values)


def test_no_interval_goes_above_1() -> None:
    assert Interval.of([1.0, 0.9, 0.7]).high == 1.0


def test_one_seed_has_no_interval() -> None:
    assert Interval.of([0.25]) == Interval(0.25, None, None, (0.25,))
    assert Interval.of([0.3]).above(Interval.of([0.2]))
    assert not Interval.of([0.2]).above(Interval.of([0.2]))


def test_intervals_that_touch_are_not_above_each_other() -> None:
    low, high = Interval(0.2, 0.1, 0.3, ()), Interval(0.4, 0.3, 0.5, ())
    assert not high.above(low)
    assert replace(high, low=0.3001).above(low)


def test_all_claims_hold_in_good_figures() -> None:
    assert holds(made_up(GOOD)) == [True, True, True, True]


@pytest.mark.parametrize(
    ("runs", "broken"),
    [
        (made_up(GOOD | {"cfa_mit": 0.2}), 0),  # a part that adds nothing
        (made_up(GOOD | {"no_cfa": 0.9}), 1),
        (made_up(GOOD, unseen=0.6), 2),  # chance is 1 of 8
        (made_up(GOOD, few=0.2), 3),
        (made_up(GOOD | {"cfa_mit": 0.85}, spread=0.1), 0),  # the order is right, the intervals overlap
    ],
)
def test_a_claim_that_the_figures_do_not_bear_out_fails(runs: list[dict[str, Any]], broken: int) -> None:
    assert not holds(runs)[broken]


def test_figures_are_those_of_the_runs_whatever_their_order() -> None:
    summary = summarise(made_up(GOOD)[::-1])
    assert summary.ladder["full"].values == pytest.approx((0.9, 0.91, 0.92))
    assert summary.gain.values == pytest.approx((0.4, 0.4, 0.4))
    assert summary.few_shot["scratch"][16].values == pytest.approx((0.2, 0.21))
    assert summary.zero_shot["among_all"].mean == pytest.approx(0.7)
    assert summary.chance == pytest.approx({"unseen": 1 / 8, "among_all": 1 / 24, "seen": 1 / 24})


def test_the_page_shows_every_figure_and_escapes_what_it_is_given() -> None:
    runs = made_up(GOOD)
    found = {"runs": runs, "recipe": RECIPE.to_dict(), "facts": {"processor": "<script>alert(1)</script>"}}
    text = page(found)
    assert "<script" not in text
    assert "&lt;script&gt;" in text
    for title in TITLES.values():
        assert title in text
    summary = summarise(runs)
    for one in summary.ladder.values():
        assert f"{100 * one.mean:.1f} %" in text
    for claim in summary.claims:
        assert isinstance(claim, Claim)
        assert escape(claim.text) in text
    for published in ("80.0", "82.3", "53.0", "91.4", "44.6", "65.2"):
        assert published in text
    assert "Miniature" in text
    assert text.count("<svg") == 2
    assert "src=" not in text
    assert "href=" not in text.replace('xlink:href="#', "")


def test_the_jobs_are_those_of_the_recipe() -> None:
    found = jobs(RECIPE)
    assert len({job.name for job in found}) == len(found) == 1 + 3 * len(MODELS) + 3 + 2 * 2 * 3
    assert Job(LADDER, "no_cfa", 2, RECIPE.steps) in found
    assert all(job.start == CLIP for job in found if job.kind in (LADDER, ZERO_SHOT))
