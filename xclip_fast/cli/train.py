"""``xclip-fast train``: a configuration to a trained model."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from xclip_fast.cli.console import emit_json, needs_extra, note, stderr, stdout, table
from xclip_fast.cli.options import AsJson
from xclip_fast.errors import InputError


def train(
    config: Annotated[
        str | None, typer.Argument(metavar="CONFIG.yaml", help="What to train on what.", show_default=False)
    ] = None,
    out: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Folder of the run, made if needed.", show_default=False)
    ] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on from the newest valid checkpoint in --out.")] = False,
    override: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="KEY=VALUE", help="Over the file, such as optimizer.lr=1e-5. May be repeated."),
    ] = None,
    recipes: Annotated[bool, typer.Option("--recipes", help="List the published settings, and end.")] = False,
    as_json: AsJson = False,
) -> None:
    """Train a model by the official recipe, or by what the configuration says otherwise.

    Started by torchrun or accelerate launch, all processes train together. A run that was stopped goes on with
    --resume, to the same bits.
    """
    with needs_extra("training", "train"):
        from xclip_fast.train import RECIPES, load_config
        from xclip_fast.train import train as run

    if recipes:
        _show_recipes(RECIPES, as_json)
        return
    if config is None or out is None:
        raise InputError("give the configuration of a run and a folder for it: CONFIG.yaml --out DIR, or --recipes")
    settings = load_config(config, override or ())
    speaks = int(os.environ.get("RANK", "0")) == 0
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[line]}"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=stderr, transient=True, disable=not (speaks and stderr.is_terminal)) as bar:
        task = bar.add_task("train", total=None, line="")

        def show(line: dict[str, Any]) -> None:
            bar.update(task, completed=line["step"], total=line["steps"], line=_line(line))
            if line.get("top1") is not None and speaks and not as_json:
                bar.console.print(f"epoch {line['epoch']}: loss {line['loss']:.3f}, top-1 {line['top1']:.1%}")

        result = run(settings, out, resume=resume, progress=show)
    if not speaks:
        return
    found = {
        "weights": str(result.weights),
        "steps": result.steps,
        "loss": result.loss,
        "top1": result.top1,
        "best_top1": result.best_top1,
        "quarantined": result.quarantined,
    }
    if as_json:
        emit_json(found)
        return
    if result.quarantined:
        note(f"videos that could not be used: {result.quarantined}, see {out / 'quarantine.json'}")
    note(f"wrote {result.weights}: {result.steps} steps, loss {result.loss:.3f}")


def _line(line: dict[str, Any]) -> str:
    decode = line["decode_clips_per_second"]
    able = "" if decode is None else f", able to decode {decode:.1f}"
    rates = f"{line['clips_per_second']:.1f} clips/s (compute {line['compute_clips_per_second']:.1f}{able})"
    return f"loss {line['loss']:.3f}  {rates}"


def _show_recipes(recipes: dict[str, Any], as_json: bool) -> None:
    if as_json:
        emit_json({"recipes": {name: recipe._asdict() for name, recipe in recipes.items()}})
        return
    shown = table(
        "Published settings: recipe: NAME in a configuration", "name", "what", "top-1", "source", numbers=("top-1",)
    )
    for name, recipe in recipes.items():
        shown.add_row(name, recipe.what, "" if recipe.top1 is None else f"{recipe.top1:.1f}", recipe.source)
    stdout.print(shown)
