"""``xclip-fast flops``: what a model costs, by arithmetic."""

from __future__ import annotations

from typing import Annotated, Any

import typer
from rich.table import Table

from xclip_fast import flops as arithmetic
from xclip_fast.cli.console import emit_json, stdout, table
from xclip_fast.cli.options import MAX_FRAMES, AsJson, parse_views
from xclip_fast.config import VARIANTS
from xclip_fast.errors import InputError

PARTS = {
    "patch_embed": "patch embedding",
    "cfa": "cross-frame attention (CFA)",
    "ifa_projections": "intra-frame attention, projections",
    "ifa_attention": "intra-frame attention, softmax",
    "mlp": "MLP",
    "projection": "projection of tokens",
    "mit": "integration of frames (MIT)",
    "prompts": "video-specific prompts",
    "logits": "logits",
    "text": "texts, once per class set",
}


def flops(
    variant: Annotated[
        str | None, typer.Argument(metavar="VARIANT", help=", ".join(VARIANTS), show_default=False)
    ] = None,
    frames: Annotated[int, typer.Option(min=1, max=MAX_FRAMES, help="Frames of a view.")] = 8,
    classes: Annotated[int, typer.Option(min=0, help="Class texts; 0 for the video's embedding alone.")] = 1,
    views: Annotated[
        str, typer.Option(metavar="CLIPSxCROPS", help="Views of a video, such as 4x3, or a number.")
    ] = "1",
    headline: Annotated[bool, typer.Option("--headline", help="The paper's figures, recomputed, instead.")] = False,
    as_json: AsJson = False,
) -> None:
    """Count the operations and parameters of a model, as the official code runs it and after exact rewrites.

    The paper's "GFLOPs" are multiply-accumulates (MACs); a multiply-accumulate is two FLOPs. Both are shown.
    """
    if headline == (variant is not None):
        raise InputError(f"give either a variant, one of {', '.join(VARIANTS)}, or --headline")
    if variant is None:
        rows = arithmetic.headline()
        if as_json:
            emit_json({"headline": [row._asdict() for row in rows]})
        else:
            _show_headline(rows)
        return
    if variant not in VARIANTS:
        raise InputError(f"unknown variant {variant!r}: choose one of {', '.join(VARIANTS)}")
    clips, crops = parse_views(views)
    official = arithmetic.count(variant, frames, classes, clips * crops)
    fused = arithmetic.count(variant, frames, classes, clips * crops, formulation="fused")
    parameters = arithmetic.parameter_parts(variant, frames)
    if as_json:
        asked = {"variant": variant, "frames": frames, "classes": classes, "views": clips * crops}
        after = {**_facts(fused), "rewrites": fused.rewrites}
        emit_json({**asked, **_facts(official), "parameter_parts": parameters, "fused": after})
        return
    _show(f"X-CLIP-{variant}, frames {frames}, classes {classes}, views {clips * crops}", official, fused, parameters)


def _facts(count: arithmetic.Count) -> dict[str, Any]:
    return {"macs": count.macs, "flops": count.flops, "parameters": count.parameters, "parts": count.parts}


def _show(title: str, official: arithmetic.Count, fused: arithmetic.Count, parameters: dict[str, int]) -> None:
    columns = ("official", "share", "fused", "parameters")
    parts = table(title, "GMACs of each part", *columns, numbers=columns)
    for part, macs in official.parts.items():
        share = f"{macs / official.macs:.1%}"
        size = f"{parameters[part]:,}" if part in parameters else ""
        parts.add_row(PARTS[part], _giga(macs), share, _giga(fused.parts[part]), size)
    parts.add_section()
    total = f"{official.parameters:,}"
    parts.add_row("GMACs (the paper's GFLOPs)", _giga(official.macs), "", _giga(fused.macs), total, style="bold")
    parts.add_row("GFLOPs (2 for each MAC)", _giga(official.flops), "", _giga(fused.flops), "", style="bold")
    stdout.print(parts)

    rewrites = table("What fused leaves out, exactly", "rewrite", "GMACs saved", numbers=("GMACs saved",))
    for name, saved in fused.rewrites.items():
        rewrites.add_row(name, _giga(saved))
    stdout.print(rewrites)


def _show_headline(rows: list[arithmetic.HeadlineRow]) -> None:
    columns = ("published", "official", "fused")
    title = "GMACs of one view with one text (the paper writes GFLOPs), and ratios"
    figures = table(title, "model", *columns, "note", numbers=columns)
    notes = list(dict.fromkeys(row.why for row in rows))
    for row in rows:
        note = str(notes.index(row.why) + 1)
        figures.add_row(row.what, f"{row.published:g}", f"{row.official:.2f}", f"{row.fused:.2f}", note)
    reasons = Table.grid(padding=(0, 2))
    for number, why in enumerate(notes, start=1):
        reasons.add_row("", str(number), why)
    stdout.print(figures, reasons)


def _giga(operations: int) -> str:
    return f"{operations / 1e9:,.3f}"
