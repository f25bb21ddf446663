"""``xclip-fast convert``: a checkpoint in another format."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, cast

import typer

from xclip_fast.cli.batch import find_weights
from xclip_fast.cli.console import note
from xclip_fast.errors import InputError
from xclip_fast.files import check_writable

if TYPE_CHECKING:
    from xclip_fast.checkpoints import LoadReport

FORMATS = ("xclip_fast", "official", "hf")


def convert(
    source: Annotated[str, typer.Argument(metavar="SOURCE", help="What --weights takes.", show_default=False)],
    target: Annotated[str, typer.Argument(metavar="TARGET", help="File or folder to write.", show_default=False)],
    form: Annotated[str, typer.Option("--format", help="xclip_fast, official or hf.")] = "xclip_fast",
) -> None:
    """Write a checkpoint in another format; the weights stay the same bit for bit."""
    if form not in FORMATS:
        raise InputError(f"unknown format {form!r}: choose one of {', '.join(FORMATS)}")

    if form != "hf":
        check_writable(target)

    from xclip_fast.checkpoints import load_model, save_model

    model = load_model(find_weights(source))
    save_model(model, target, format=form)
    report = cast("LoadReport", model.load_report)
    fresh = f", {len(report.initialised)} start random" if report.initialised else ""
    note(f"read {source} as {report.format}: {report.loaded} tensors{fresh}")
    for repair in report.repairs:
        note(repair)
    note(f"wrote {target} in the {form} format")
