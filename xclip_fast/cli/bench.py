"""``xclip-fast bench``: how fast the model is here, beside others, each checked before it is timed."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from xclip_fast.cli.console import CHECK_FAILED, emit_json, note, safe, stdout, table
from xclip_fast.cli.options import MAX_FRAMES, AsJson, Device
from xclip_fast.config import VARIANTS
from xclip_fast.files import check_writable, replacing

if TYPE_CHECKING:
    from xclip_fast.bench.record import Row, Run

MAX_BATCH = 4096


def bench(
    variant: Annotated[str, typer.Option(help=f"{', '.join(VARIANTS)}, or tiny, to try the command.")] = "B/32",
    frames: Annotated[
        int | None, typer.Option(min=1, max=MAX_FRAMES, help="Frames of a clip; by default the variant's.")
    ] = None,
    batch: Annotated[int, typer.Option(min=1, max=MAX_BATCH, help="Videos at once.")] = 1,
    dtype: Annotated[str, typer.Option(help="float32, bfloat16, float16; several with commas.")] = "float32,bfloat16",
    providers: Annotated[
        str | None, typer.Option(metavar="A,B", help="Who computes; by default all, or the quick ones.")
    ] = None,
    op: Annotated[
        str | None, typer.Option(metavar="NAME", help="An op at the shape of this model, instead of the model.")
    ] = None,
    mode: Annotated[str, typer.Option(help="forward, or train: forward and backward.")] = "forward",
    given: Annotated[
        str | None,
        typer.Option(
            "--input",
            help="What a model is given: normalised frames, or uint8. Providers that take no bytes normalise them "
            "first, as their users have to, in their time.",
            show_default="normalised",
        ),
    ] = None,
    cache: Annotated[str, typer.Option(help="warm, or cold: caches are overwritten before each call.")] = "warm",
    device: Device = "auto",
    full: Annotated[
        bool,
        typer.Option("--full/--quick", help="Up to ten long blocks, compilers and peak memory, or three short blocks."),
    ] = False,
    as_json: AsJson = False,
    out: Annotated[
        Path | None, typer.Option("--out", metavar="FILE", help="Write the results as JSON, after each row.")
    ] = None,
    csv: Annotated[Path | None, typer.Option(metavar="FILE", help="Write the results as CSV.")] = None,
    html: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Write a report, one file that needs no network.")
    ] = None,
) -> int:
    """Time the model here: errors first, then blocks in turn with Hugging Face's eager model.

    The ratio is the other's time over this one's; it counts where it leaves the noise of the baseline against itself.
    The floor is the roofline time, at this machine's measured GEMM and copy rates, over the time taken.
    """
    for path in (out, csv, html):
        if path is not None:
            check_writable(path)
    names = tuple(dict.fromkeys(name.strip() for name in providers.split(","))) if providers else None
    dtypes = tuple(dict.fromkeys(name.strip() for name in dtype.split(",")))

    from xclip_fast.bench import providers as registry
    from xclip_fast.bench.operators import BACKENDS
    from xclip_fast.bench.record import to_csv
    from xclip_fast.bench.run import MODEL, Job, effort_of, make_case, run

    if names is None:
        names = (BACKENDS if full else BACKENDS[:-1]) if op else tuple(registry.PROVIDERS) if full else registry.QUICK
    effort = effort_of(full, cache)
    cases = [make_case(op or MODEL, variant, frames, batch, name, mode, device, input=given) for name in dtypes]
    found = run([Job(case, names) for case in cases], effort, lambda row: _show_row(row, as_json), out)
    if csv is not None:
        with replacing(csv) as temporary:
            temporary.write_text(to_csv(found.rows), encoding="utf-8")
    if html is not None:
        from xclip_fast.bench.report import write_report

        write_report(found, html)
    if as_json:
        emit_json(found.to_dict())
    else:
        _show(found)
    return 0 if found.sound else CHECK_FAILED


def _show_row(row: Row, quiet: bool) -> None:
    """Say at once what is done: a long run would be silent."""
    if not quiet:
        figure = row.reason if row.timing is None else f"{row.timing.median_ms:.3f} ms"
        note(f"{row.case.dtype} {row.provider}: {row.status}, {figure}")


def _show(found: Run) -> None:
    groups: dict[str, list[Row]] = {}
    for row in found.rows:
        groups.setdefault(row.case.dtype, []).append(row)
    columns = ("error", "ms", "p10-p90", "ratio", "floor")
    for dtype, rows in groups.items():
        case = rows[0].case
        title = f"{case.name} {case.variant}, frames {case.frames}, batch {case.batch}, {case.direction}, {dtype}"
        title += ", uint8 frames" if case.name == "model" and case.input == "uint8" else ""
        title += ", cold caches" if any(row.timing and row.timing.cache == "cold" for row in rows) else ""
        shown = table(f"{title} on {case.device}", "provider", *columns, "verdict", numbers=("provider", *columns))
        shown.columns[0].justify = "left"
        for row in rows:
            shown.add_row(safe(row.provider), *_cells(row))
        stdout.print(shown)
    for row in found.rows:
        if row.timing is None:
            stdout.print(safe(f"{row.provider}, {row.case.dtype}: {row.status}: {row.reason}"), soft_wrap=True)
        elif row.check is not None and row.check.bit_repeat is False:
            stdout.print(safe(f"{row.provider}, {row.case.dtype}: two runs differ in their bits"), soft_wrap=True)
    rates = ", ".join(f"{name.replace('_', ' ')} {value:.3g}" for name, value in found.ceilings.items())
    noises = ", ".join(
        f"{rows[0].case.dtype} {max(row.timing.noise for row in rows if row.timing):.3f}"
        for rows in groups.values()
        if any(row.timing for row in rows)
    )
    line = f"ceilings of this machine in this run: {rates}; noise of the ratio: {noises}"
    stdout.print(safe(f"{line}; {found.facts['seconds']:.0f} s in all"), soft_wrap=True)


def _cells(row: Row) -> list[Any]:
    error = "-" if row.check is None or row.check.error is None else f"{row.check.error:.1e}"
    if row.timing is None:
        return [error, "-", "-", "-", "-", safe(row.status, "red" if row.status in ("wrong", "failed") else "yellow")]
    found = row.timing
    spread = (
        f"{found.p10_ms:.1f}-{found.p90_ms:.1f}" if found.p10_ms >= 10 else f"{found.p10_ms:.3f}-{found.p90_ms:.3f}"
    )
    floor = f"{row.roof.achieved:.0%}" if row.roof else "-"
    if row.provider == found.baseline:
        return [error, f"{found.median_ms:.3f}", spread, "1", floor, "baseline"]
    return [error, f"{found.median_ms:.3f}", spread, f"{found.ratio:.3f}", floor, found.verdict]
