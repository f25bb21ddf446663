"""The figures of a report, as SVG texts: only those that the rows of a run have numbers for."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from xclip_fast.bench.record import Row, Run, Timing
from xclip_fast.ops.cases import OPS, config_of
from xclip_fast.pages import COLOURS, INK, draw, inline, svg

MODEL = "model"


def figures(run: Run) -> dict[str, str]:
    """Title to SVG."""
    models, ops, colours = _timed(run, models=True), _timed(run, models=False), _colours(run)
    found = {
        "Times as fast as the baseline": _speed_ups(models, colours),
        "Latency against batch": _batches(models, colours),
        "Ops: times as fast as the definition": _speed_ups(ops, colours),
        "Time of the parts": _parts(ops),
        "Roofline": _roofline(run, colours),
        "Peak memory": _memory(models, colours),
    }
    return {title: drawn for title, drawn in found.items() if drawn}


def hero(run: Run, kind: str) -> bytes:
    """The first figure alone, as "svg" or "png", for a README; empty when there is nothing to show."""
    rows = _timed(run, models=True)
    return _bars(rows, kind, _colours(run)) if _contenders(rows) else b""


def label(row: Row) -> str:
    """What a row has computed, in a few words."""
    case = row.case
    words = [case.variant if case.name == MODEL else case.name, f"batch {case.batch}", case.dtype]
    words += ["train"] * (case.direction == "train") + ["bytes"] * (case.name == MODEL and case.input == "uint8")
    return ", ".join([*words, *["cold"] * (row.timing is not None and row.timing.cache == "cold")])


def milliseconds(timing: Timing) -> str:
    """Median and spread, with the digits that count."""
    digits = 1 if timing.median_ms >= 10 else 3
    return f"{timing.median_ms:.{digits}f} ({timing.p10_ms:.{digits}f} to {timing.p90_ms:.{digits}f})"


def _timed(run: Run, *, models: bool) -> list[Row]:
    return [row for row in run.rows if row.timing is not None and (row.case.name == MODEL) is models]


def _colours(run: Run) -> dict[str, str]:
    """One for each provider, the same in every figure."""
    names = dict.fromkeys(row.provider for row in run.rows if row.timing is not None)
    return {name: COLOURS[index % len(COLOURS)] for index, name in enumerate(names)}


def _contenders(rows: Sequence[Row]) -> list[Row]:
    return [row for row in rows if row.timing is not None and row.provider != row.timing.baseline]


def _speed_ups(rows: list[Row], colours: dict[str, str]) -> str:
    if not _contenders(rows):
        return ""
    return inline(_bars(rows, "svg", colours))


def _bars(rows: list[Row], kind: str, colours: dict[str, str]) -> bytes:
    shown = _contenders(rows)

    def paint(axes: Any) -> None:
        for place, row in enumerate(shown):
            found = row.timing
            assert found is not None
            errors = [[max(0.0, found.ratio - found.ratio_p10)], [max(0.0, found.ratio_p90 - found.ratio)]]
            colour = colours[row.provider]
            sure = found.verdict != "no difference"
            axes.barh(place, found.ratio, xerr=errors, color=colour, alpha=1.0 if sure else 0.45, ecolor=INK, capsize=2)
            # the baseline against itself: what lies inside is no difference
            axes.barh(
                place,
                2 * found.noise,
                left=1 - found.noise,
                color="none",
                edgecolor=INK,
                hatch="///",
                lw=0.3,
                alpha=0.6,
            )
        axes.axvline(1, color=INK, lw=1)
        axes.set_yticks(range(len(shown)), [f"{label(row)}: {row.provider}" for row in shown])
        axes.invert_yaxis()
        axes.set_xlim(left=0)
        axes.margins(y=0.01)
        axes.set_xlabel("times as fast as the baseline\nwhiskers p10 to p90, hatched the noise;\npale: no difference")
        axes.grid(axis="x")
        axes.set_axisbelow(True)

    return draw(paint, 1.0 + 0.3 * len(shown), kind)


def _batches(rows: list[Row], colours: dict[str, str]) -> str:
    lines: dict[tuple[str, str, str], list[Row]] = {}
    for row in rows:
        if row.case.direction == "forward":
            lines.setdefault((row.case.variant, row.case.dtype, row.provider), []).append(row)
    lines = {key: line for key, line in lines.items() if len({row.case.batch for row in line}) > 1}
    if not lines:
        return ""

    def paint(axes: Any) -> None:
        kinds = list(dict.fromkeys((variant, dtype) for variant, dtype, _ in lines))
        for (variant, dtype, provider), line in lines.items():
            line = sorted(line, key=lambda row: row.case.batch)
            times = [row.timing.median_ms for row in line if row.timing is not None]
            style = ("-", "--", ":", "-.")[kinds.index((variant, dtype)) % 4]
            batches = [row.case.batch for row in line]
            axes.plot(
                batches, times, style, color=colours[provider], marker="o", ms=3, label=f"{variant} {dtype} {provider}"
            )
        _logarithmic(axes)
        axes.set_xticks(sorted({row.case.batch for line in lines.values() for row in line}))
        axes.set_xlabel("videos in the batch")
        axes.set_ylabel("ms")
        axes.grid()
        axes.legend(fontsize=7, ncols=2, frameon=False, loc="upper center", bbox_to_anchor=(0.5, -0.15))

    return svg(paint, 4.2)


def _parts(rows: list[Row]) -> str:
    """Time of each op in one forward pass: by the definition, and by the fastest that is right."""
    found: dict[str, dict[str, float]] = {}
    cases = {(row.case.variant, row.case.frames, row.case.batch, row.case.dtype) for row in rows}
    if len(cases) != 1:
        return ""
    for row in rows:
        if row.case.direction == "forward" and row.timing is not None and row.case.name in OPS:
            calls = OPS[row.case.name].times(config_of(row.case.variant, row.case.frames))
            found.setdefault(row.case.name, {})[row.provider] = calls * row.timing.median_ms
    if not found:
        return ""

    def paint(axes: Any) -> None:
        for place, which in enumerate(("definition", "fastest")):
            left = 0.0
            for index, (name, times) in enumerate(found.items()):
                spent = times.get("reference", 0.0) if which == "definition" else min(times.values())
                colour, hatch = COLOURS[index % len(COLOURS)], "" if index < len(COLOURS) else "..."
                axes.barh(place, spent, left=left, color=colour, hatch=hatch, label=name if place == 0 else None)
                left += spent
        axes.set_yticks([0, 1], ["definition", "fastest"])
        axes.invert_yaxis()
        axes.set_xlabel("ms in one forward pass, calls times time of one")
        axes.legend(fontsize=7, ncols=3, frameon=False, loc="upper center", bbox_to_anchor=(0.5, -0.35))

    return svg(paint, 3.0)


def _roofline(run: Run, colours: dict[str, str]) -> str:
    rows = [row for row in run.rows if row.roof is not None and row.timing is not None and row.roof.flops > 0]
    if not rows or "copy_gbs" not in run.ceilings:
        return ""

    def paint(axes: Any) -> None:
        points = [(row, row.roof.flops / row.roof.bytes) for row in rows if row.roof is not None]
        low, high = min(x for _, x in points) / 2, max(x for _, x in points) * 2
        copy = run.ceilings["copy_gbs"] * 1e9
        for index, dtype in enumerate(dict.fromkeys(row.case.dtype for row in rows)):
            rate = run.ceilings[f"{dtype}_tflops"] * 1e12
            knee = rate / copy
            x = sorted({low, max(low, min(high, knee)), high})
            y = [min(rate, at * copy) / 1e12 for at in x]
            axes.plot(x, y, "-" if index == 0 else "--", color=INK, lw=1, label=f"{dtype} GEMMs and copies, measured")
        for name in dict.fromkeys(row.provider for row in rows):
            mine = [(row, x) for row, x in points if row.provider == name]
            rates = [row.roof.flops / row.timing.median_ms / 1e9 for row, _ in mine if row.roof and row.timing]
            axes.plot([x for _, x in mine], rates, "o", ms=4, color=colours[name], label=name)
        _logarithmic(axes)
        axes.set_xlabel("operations a byte")
        axes.set_ylabel("TFLOP/s")
        axes.grid(which="major")
        axes.legend(fontsize=7, ncols=2, frameon=False, loc="upper center", bbox_to_anchor=(0.5, -0.15))

    return svg(paint, 4.2)


def _logarithmic(axes: Any) -> None:
    """Both axes, with plain numbers on them."""
    axes.set_xscale("log")
    axes.set_yscale("log")
    from matplotlib.ticker import LogLocator

    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axis.set_major_formatter(lambda value, place: f"{value:g}")
        axis.set_minor_formatter(lambda value, place: "")


def _memory(rows: list[Row], colours: dict[str, str]) -> str:
    shown = [row for row in rows if row.memory_mb is not None]
    if not shown:
        return ""

    def paint(axes: Any) -> None:
        axes.barh(range(len(shown)), [row.memory_mb for row in shown], color=[colours[row.provider] for row in shown])
        axes.margins(y=0.01)
        axes.set_yticks(range(len(shown)), [f"{label(row)}: {row.provider}" for row in shown])
        axes.invert_yaxis()
        axes.set_xlabel("MB of weights and activations at the peak of a step")
        axes.grid(axis="x")
        axes.set_axisbelow(True)

    return svg(paint, 1.0 + 0.3 * len(shown))
