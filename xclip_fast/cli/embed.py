"""``xclip-fast embed``: features of videos in one file, or in a folder of shards."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from xclip_fast.cli.batch import FileProgress, open_model
from xclip_fast.cli.console import BAD_INPUT, note
from xclip_fast.cli.options import (
    DEMO,
    SECONDS,
    Backend,
    BatchSize,
    Device,
    Frames,
    Precision,
    Preset,
    Seconds,
    Videos,
    Views,
    Weights,
    Workers,
    check_seconds,
    default_preset,
    plan_views,
)
from xclip_fast.errors import InputError


def embed(
    videos: Videos,
    out: Annotated[str, typer.Option(metavar="PATH", help="A .safetensors, .npz or .parquet file, or a folder.")],
    patches: Annotated[bool, typer.Option("--patches", help="Also the patch features, N for each video.")] = False,
    shard_size: Annotated[
        int | None,
        typer.Option(
            min=1, help="Write shards of so many files to the folder; run again, it goes on.", show_default=False
        ),
    ] = None,
    shard_format: Annotated[
        str | None, typer.Option(help="Of the shards: safetensors or parquet.", show_default="safetensors")
    ] = None,
    weights: Weights = DEMO,
    preset: Preset = None,
    frames: Frames = None,
    views: Views = "1x1",
    batch_size: BatchSize = 8,
    workers: Workers = None,
    timeout: Seconds = SECONDS,
    device: Device = "auto",
    dtype: Precision = "float32",
    backend: Backend = "auto",
) -> None:
    """Write the features of videos to one file, or to a folder of shards.

    The features are float32, not normalised, and the mean over the views of a video. A file appears whole or not at
    all. A video that cannot be used is reported and left out; the exit code is then 2. With --shard-size a run that was
    stopped goes on where it was when the same command is given again; shards with a video that changed since, by size
    or time of change, are computed again.
    """
    from xclip_fast.pipeline import check_features_path

    plan = plan_views(views, preset or default_preset(weights), backend)
    options = {**plan, "batch_size": batch_size, "patches": patches}
    decoding = {"workers": workers, "timeout": timeout}
    check_seconds(timeout)
    if shard_size is None:
        if shard_format is not None:
            raise InputError("--shard-format was given without --shard-size: give both for shards, none for one file")
        if not Path(out).suffix:
            raise InputError(
                f"--out {out} has no ending such as .safetensors: give one, or --shard-size N for a folder of shards"
            )
        check_features_path(out)
        failed = _to_file(videos, out, open_model(weights, frames, device, dtype), options, decoding)
    else:
        options |= {"shard_size": shard_size, "format": shard_format or "safetensors"}
        failed = _to_shards(videos, out, open_model(weights, frames, device, dtype), options, decoding)
    if failed:
        raise typer.Exit(BAD_INPUT)


def _to_file(videos: list[str], out: str, model: Any, options: dict[str, Any], decoding: dict[str, Any]) -> int:
    import torch

    from xclip_fast.engine import Engine
    from xclip_fast.pipeline import save_features

    engine = Engine(model)
    del model  # the engine has weights of its own
    names: list[str] = []
    rows: list[tuple[torch.Tensor, ...]] = []
    with FileProgress(len(videos), "embed") as progress:
        for found in engine.embed_files(videos, **options, **decoding):
            progress.done(found.path, None if found.error is None else str(found.error))
            if found.error is None:
                names.append(found.path)
                rows.append(tuple(row for row in (found.video, found.patches) if row is not None))
    if not rows:
        raise InputError(f"no file could be used: {out} was not written")
    columns = [torch.stack(column).numpy() for column in zip(*rows, strict=True)]
    save_features(out, names, *columns)
    note(f"wrote {out}: {len(names)} of {len(videos)} videos, {columns[0].shape[1]} numbers each")
    return len(videos) - len(names)


def _to_shards(videos: list[str], out: str, model: Any, options: dict[str, Any], decoding: dict[str, Any]) -> int:
    from xclip_fast.engine import Engine
    from xclip_fast.pipeline import Request, embed_to_shards, weights_digest

    weight = next(model.parameters())
    settings = {"model": model.config.to_dict(), "dtype": str(weight.dtype), "device": weight.device.type}
    request = Request(videos, weights_digest(model), settings=settings, **options)
    engine = Engine(model)
    del model
    with FileProgress(len(videos), "embed") as progress:
        written = embed_to_shards(engine, out, request, progress.done, **decoding)
    if not written.rows:
        raise InputError(f"no file could be used: {out} holds no features")
    note(f"wrote {out}: {written.rows} of {len(videos)} videos, {written.width} numbers each")
    return written.failed
