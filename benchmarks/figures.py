"""The figures of the README and docs/, made from benchmarks/results: ``make tables`` draws them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from benchmarks.gpu.goals import COMPILED
from benchmarks.tables import RESULTS, ROOT, fastest
from xclip_fast.bench.figures import hero
from xclip_fast.bench.record import Row, Run
from xclip_fast.pages import COLOURS, draw

FOLDER = ROOT / "docs" / "figures"
CONTENDERS = {
    "torch.compile": COMPILED,
    "xclip_fast, bfloat16": ("engine",),
    "xclip_fast, float8": ("engine-float8",),
}


def write(folder: Path = FOLDER) -> bool:
    """Draw each figure of the folder; true when a file was changed."""
    drawn = {
        "h200.svg": contest(Run.load(RESULTS / "h200.json")),
        "cpu.svg": hero(Run.load(RESULTS / "cpu.json"), "svg"),
    }
    changed = [name for name, svg in drawn.items() if not _same(folder / name, svg)]
    for name in changed:
        (folder / name).write_bytes(drawn[name])
    return bool(changed)


def _same(path: Path, svg: bytes) -> bool:
    return path.exists() and path.read_bytes() == svg


def contest(run: Run) -> bytes:
    """Forward passes as CUDA graphs, as SVG: bars of how many times as fast as Hugging Face's eager model each is."""
    models = contested(run)

    def paint(axes: Any) -> None:
        height = 0.8 / len(CONTENDERS)
        for place, rows in enumerate(models.values()):
            for index, row in enumerate(rows.values()):
                at, ratio = place + height * (index - 1), row.timing.ratio if row.timing else 0.0
                axes.barh(at, ratio, 0.9 * height, color=COLOURS[index])
                axes.annotate(caption(row), (ratio, at), (3, 0), textcoords="offset points", va="center", fontsize=7)
        axes.axvline(1, color="black", lw=1)
        axes.set_yticks(range(len(models)), models)
        axes.invert_yaxis()
        axes.set_xlim(0, 2.9)
        axes.set_xlabel("times as fast as Hugging Face's model in eager mode, all as CUDA graphs")
        handles = [axes.barh(0, 0, color=COLOURS[index]) for index in range(len(CONTENDERS))]
        axes.legend(handles, CONTENDERS, fontsize=8, frameon=False, loc="lower right", bbox_to_anchor=(1, 1), ncols=3)

    return draw(paint, 1.0 + 0.6 * len(models))


def contested(run: Run) -> dict[str, dict[str, Row]]:
    """The fastest row of each contender, by model."""
    models: dict[str, list[Row]] = {}
    for row in run.rows:
        case = row.case
        as_graph = row.timing is not None and row.timing.method == "graph"
        if as_graph and (case.direction, case.input) == ("forward", "normalised"):
            models.setdefault(f"{case.variant}, batch {case.batch}", []).append(row)
    return {
        model: {name: row for name, providers in CONTENDERS.items() if (row := fastest(rows, providers)) is not None}
        for model, rows in sorted(models.items(), key=lambda item: (item[1][0].case.variant, item[1][0].case.batch))
    }


def caption(row: Row) -> str:
    """What stands beside a bar."""
    assert row.timing is not None
    return f"{row.timing.ratio:.2f} ({row.timing.median_ms:.2f} ms)"
