"""One HTML file for an evaluation: no script, no network."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from typing import Any

from xclip_fast.evaluate.metrics import Rate, Spread
from xclip_fast.evaluate.results import SUMMED, Classified, Retrieved
from xclip_fast.pages import needs_pages, render

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


def render_page(
    splits: Sequence[Classified | Retrieved], facts: Mapping[str, Any], summary: Mapping[str, Spread | float]
) -> str:
    """The page of an evaluation as text; names of files and classes are escaped.

    Args:
        splits: the figures of each list.
        facts: what was run, name to value.
        summary: what ``summary`` or ``base_and_novel`` gives; empty for one list.

    Raises:
        InputError: matplotlib or jinja2 is not installed.
    """
    with needs_pages("a page", EXTRA):
        from xclip_fast.evaluate.plots import confusion_plot, reliability_plot

        classes = [one for one in splits if isinstance(one, Classified)]
        return render(
            "xclip_fast.evaluate",
            "page.html.j2",
            {"percent": percent, "rate": rate, "spread": spread_text},
            facts=facts,
            summary=summary,
            summed={key: name for key, (name, _) in SUMMED.items()},
            failed=[(one.name, file, why) for one in splits for file, why in one.failed.items()],
            classified=[(one, confusion_plot(one), reliability_plot(one.calibration)) for one in classes],
            retrieved=[one for one in splits if isinstance(one, Retrieved)],
        )


def percent(value: float | None) -> str:
    """A share in percent, empty for None."""
    return "" if value is None else f"{100 * value:.1f}"


def rate(found: Rate | None) -> str:
    """A share in percent with its interval, empty for None."""
    return "" if found is None else f"{percent(found.value)} ({percent(found.low)} to {percent(found.high)})"


def spread_text(found: Spread | float) -> str:
    """A mean in percent with its standard deviation, where there is one."""
    if isinstance(found, float):
        return percent(found)
    return percent(found.mean) if found.std is None else f"{percent(found.mean)} ± {percent(found.std)}"
