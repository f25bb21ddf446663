"""One HTML file for a reproduction: no script, no network."""

from __future__ import annotations

from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from xclip_fast.files import replacing
from xclip_fast.pages import COLOURS, needs_pages, render, svg
from xclip_fast.reproduce import paper
from xclip_fast.reproduce.models import TITLES
from xclip_fast.reproduce.plan import STARTS
from xclip_fast.reproduce.results import WORDS, Interval, Summary, percent, shown, summarise
from xclip_fast.reproduce.world import CLASSES, MOST, PATTERNS, SHAPES
from xclip_fast.reproduce.world import COLOURS as PAINTS

EXTRA = "train"


def check_page() -> None:
    """Find out before any work whether a page can be made.

    Raises:
        InputError: matplotlib or jinja2 is not installed.
    """
    with needs_pages("a page", EXTRA):
        for name in ("matplotlib", "jinja2"):
            if find_spec(name) is None:
                raise ModuleNotFoundError(name=name)


def write_page(found: Mapping[str, Any], path: Path) -> None:
    """Write the page of what ``reproduce`` found, whole or not at all."""
    text = page(found)
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def page(found: Mapping[str, Any]) -> str:
    """The page as text."""
    summary = summarise(found["runs"])
    with needs_pages("a page", EXTRA):
        return render(
            "xclip_fast.reproduce",
            "page.html.j2",
            {"shown": shown, "percent": percent},
            summary=summary,
            titles=TITLES,
            words=WORDS,
            starts=STARTS,
            paper=paper,
            ladder=svg(lambda axes: _ladder(axes, summary), 2.8),
            few_shot=svg(lambda axes: _few_shot(axes, summary), 3.2),
            recipe=found["recipe"],
            facts=found["facts"],
            classes=len(CLASSES),
            example=CLASSES[-1].text,
            shapes=SHAPES,
            patterns=PATTERNS,
            colours=PAINTS,
            most=MOST,
            cpu_seconds=sum(run["cpu_seconds"] for run in found["runs"]),
            count=len(found["runs"]),
        )


def _bars(found: Interval) -> list[list[float]] | None:
    if found.low is None or found.high is None:
        return None
    return [[100 * (found.mean - found.low)], [100 * (found.high - found.mean)]]


def _ladder(axes: Any, summary: Summary) -> None:
    names = list(summary.ladder)
    for row, name in enumerate(names):
        one = summary.ladder[name]
        colour = COLOURS[1] if name == "no_cfa" else COLOURS[0]
        axes.errorbar(100 * one.mean, row, xerr=_bars(one), fmt="o", color=colour, capsize=4, zorder=3)
        axes.scatter([100 * value for value in one.values], [row] * len(one.values), s=12, color=colour, alpha=0.35)
    axes.set_yticks(range(len(names)), [TITLES[name] for name in names])
    axes.invert_yaxis()
    axes.set_xlim(0, 102)
    axes.set_xlabel("top-1 on test clips, %: seeds, mean and 95 % interval")
    axes.grid(axis="x")


def _few_shot(axes: Any, summary: Summary) -> None:
    for colour, (start, curve) in zip(COLOURS, summary.few_shot.items(), strict=False):
        shots = list(curve)
        means = [100 * one.mean for one in curve.values()]
        axes.plot(shots, means, "o-", color=colour, label=STARTS[start])
        for k, one in curve.items():
            axes.errorbar(k, 100 * one.mean, yerr=_bars(one), color=colour, capsize=4)
    axes.axhline(100 * summary.chance["unseen"], color=COLOURS[6], linestyle=":", label="chance")
    axes.set_xscale("log", base=2)
    axes.set_xticks(shots, [str(k) for k in shots])
    axes.set_ylim(bottom=0)
    axes.set_xlabel("K, clips of each class")
    axes.set_ylabel("top-1, %")
    axes.legend(frameon=False)
    axes.grid(axis="y")
