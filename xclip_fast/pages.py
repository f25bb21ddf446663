"""What pages are made of: plots as SVG and a template, in one file without script or network."""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from xclip_fast.errors import InputError

INK, GRID = "#1b1f24", "#d5d9de"
# told apart by eyes that see no red or green, and in print
COLOURS = ("#0072b2", "#e69f00", "#009e73", "#cc79a7", "#56b4e9", "#d55e00", "#8c8c8c", "#5b3f8c")

# of every page: readable on a phone and on paper
STYLE = """\
:root { color: #1b1f24; background: #fff; font: 16px/1.5 system-ui, sans-serif; }
body { max-width: 60rem; margin: 0 auto; padding: 1rem; }
h1 { font-size: 1.6rem; line-height: 1.2; margin: .5rem 0; }
h2 { font-size: 1.15rem; margin: 2rem 0 .5rem; border-bottom: 1px solid #d5d9de; }
p.small { color: #57606a; font-size: .9rem; }
figure { margin: 0; }
figure svg { width: 100%; height: auto; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; font-size: .85rem; width: 100%; }
th, td { padding: .25rem .6rem .25rem 0; text-align: left; vertical-align: top; border-bottom: 1px solid #eceff2; }
th { vertical-align: bottom; }
td.case { min-width: 7rem; }
td.n, th.n { text-align: right; font-variant-numeric: tabular-nums; }
td.n { white-space: nowrap; }
.faster { color: #0b6b3a; font-weight: 600; }
.slower, .wrong, .failed { color: #a11; font-weight: 600; }
@media (min-width: 40rem) { table.facts { width: auto; } }
@media print {
  :root { font-size: 10pt; }
  body { max-width: none; padding: 0; }
  h2, figure, tr, table.facts { break-inside: avoid; }
  h2 { break-after: avoid; }
  figure svg { max-height: 21cm; }
  .wide { overflow: visible; }
  table { font-size: .75rem; }
}"""


def render(package: str, template: str, filters: Mapping[str, Callable[..., Any]], **values: Any) -> str:
    """A page as text, from a template in a package, which is also given ``style``.

    Values are escaped, and one that is missing is an error.
    """
    from jinja2 import Environment, PackageLoader, StrictUndefined
    from markupsafe import Markup

    environment = Environment(
        loader=PackageLoader(package, ""),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= dict(filters)
    return environment.get_template(template).render(style=Markup(STYLE), **values)


@contextmanager
def needs_pages(what: str, extra: str) -> Iterator[None]:
    """Say of a library that is missing which extra brings it.

    Raises:
        InputError: matplotlib or jinja2 is not installed.
    """
    try:
        yield
    except ImportError as error:
        raise InputError(
            f"{what} needs matplotlib and jinja2, found no {error.name}: pip install 'xclip-fast[{extra}]'"
        ) from error


@contextmanager
def _style() -> Iterator[Any]:
    import matplotlib

    matplotlib.use("agg")
    import matplotlib.pyplot as plt

    # names come from files too: no formulas in them, and the same bytes in every run
    settings: dict[Any, Any] = {
        "text.parse_math": False,
        "svg.fonttype": "none",
        "svg.hashsalt": "xclip_fast",
        "font.size": 10,
    }
    settings |= {"font.family": "sans-serif", "axes.spines.top": False, "axes.spines.right": False}
    settings |= {"text.color": INK, "axes.labelcolor": INK, "axes.edgecolor": INK, "grid.color": GRID}
    with matplotlib.rc_context(settings):
        yield plt
        plt.close("all")


def draw(paint: Callable[[Any], None], height: float, kind: str = "svg") -> bytes:
    """A plot of one pair of axes as "svg" or "png", 7.2 inches wide."""
    with _style() as plt:
        figure, axes = plt.subplots(figsize=(7.2, height), layout="constrained")
        paint(axes)
        out = io.BytesIO()
        metadata = {"Date": None} if kind == "svg" else None
        figure.savefig(out, format=kind, dpi=200, metadata=metadata)
    return out.getvalue()


def svg(paint: Callable[[Any], None], height: float) -> str:
    """A plot for the inside of a page."""
    return inline(draw(paint, height))


def inline(data: bytes) -> str:
    """An SVG file for the inside of a page."""
    text = data.decode()
    # inside a page there is neither a prologue nor a size in points
    return text[text.index("<svg") :].replace('width="', 'data-width="', 1).replace('height="', 'data-height="', 1)
