"""One HTML file for a run: no script, no network, readable on a phone and on paper."""

from __future__ import annotations

from pathlib import Path

from xclip_fast.bench.record import Run
from xclip_fast.errors import InputError
from xclip_fast.files import replacing
from xclip_fast.pages import needs_pages
from xclip_fast.pages import render as page


def write_report(run: Run, path: Path) -> None:
    """Write the report of a run in one step.

    Raises:
        InputError: matplotlib or jinja2 is not installed.
    """
    text = render(run)
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_figure(run: Run, path: Path) -> None:
    """Write the speed-ups alone, as the suffix of the path says: .svg or .png.

    Raises:
        InputError: another suffix, nothing to show, or matplotlib is not installed.
    """
    kind = path.suffix.removeprefix(".")
    if kind not in ("svg", "png"):
        raise InputError(f"a figure is .svg or .png, found {path.name!r}")
    with needs_pages("a report", "bench"):
        from xclip_fast.bench.figures import hero

        data = hero(run, kind)
    if not data:
        raise InputError("no provider but the baseline was timed: there is nothing to draw")
    with replacing(path) as temporary:
        temporary.write_bytes(data)


def render(run: Run) -> str:
    """The report as text; everything that is not a figure of ours is escaped.

    Raises:
        InputError: matplotlib or jinja2 is not installed.
    """
    with needs_pages("a report", "bench"):
        from xclip_fast.bench.figures import figures, label, milliseconds

        return page(
            "xclip_fast.bench",
            "report.html.j2",
            {"label": label, "milliseconds": milliseconds},
            run=run,
            figures=figures(run),
            timed=[row for row in run.rows if row.timing is not None],
            others=[row for row in run.rows if row.timing is None],
            where=run.facts.get("gpu") or run.facts.get("processor"),
        )
