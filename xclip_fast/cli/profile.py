"""``xclip-fast profile``: where the time goes, as a trace for Perfetto and a table."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from xclip_fast.cli.bench import MAX_BATCH
from xclip_fast.cli.console import emit_json, safe, stdout, table
from xclip_fast.cli.options import MAX_FRAMES, AsJson, Device
from xclip_fast.config import VARIANTS
from xclip_fast.files import check_writable


def profile(
    variant: Annotated[str, typer.Option(help=f"{', '.join(VARIANTS)}, or tiny, to try the command.")] = "B/32",
    frames: Annotated[
        int | None, typer.Option(min=1, max=MAX_FRAMES, help="Frames of a clip; by default the variant's.")
    ] = None,
    batch: Annotated[int, typer.Option(min=1, max=MAX_BATCH, help="Videos at once.")] = 1,
    dtype: Annotated[str, typer.Option(help="float32, bfloat16 or float16.")] = "float32",
    provider: Annotated[str, typer.Option(help="Who computes, as `xclip-fast bench` names them.")] = "layers",
    mode: Annotated[str, typer.Option(help="forward, or train: forward and backward.")] = "forward",
    device: Device = "auto",
    steps: Annotated[int, typer.Option(min=1, max=1000, help="Calls that are recorded, after two that are not.")] = 3,
    top: Annotated[int, typer.Option(min=1, max=200, help="Rows of the table.")] = 15,
    out: Annotated[Path | None, typer.Option(metavar="FILE.json", help="Write a trace for ui.perfetto.dev.")] = None,
    as_json: AsJson = False,
) -> None:
    """Record a few calls with PyTorch's profiler: the operators or kernels that take longest."""
    if out is not None:
        check_writable(out)

    from xclip_fast.bench.profiling import record
    from xclip_fast.bench.run import MODEL, make_case

    case = make_case(MODEL, variant, frames, batch, dtype, mode, device)
    rows = record(case, provider, steps, out)[:top]
    if as_json:
        emit_json({"case": vars(case), "provider": provider, "steps": steps, "top": [row._asdict() for row in rows]})
        return
    columns = ("ms", "share", "calls")
    title = f"{provider}, {variant}, frames {case.frames}, batch {batch}, {dtype}, {mode} on {case.device}: one call"
    shown = table(title, "operator or kernel", *columns, numbers=columns)
    for row in rows:
        shown.add_row(safe(row.name), f"{row.milliseconds:.3f}", f"{row.share:.1%}", f"{row.calls:g}")
    stdout.print(shown)
    if out is not None:
        stdout.print(safe(f"trace: {out}, to be opened in ui.perfetto.dev"), soft_wrap=True)
