"""``xclip-fast embed``: features of videos in one file."""

from __future__ import annotations

from typing import Annotated

import typer

from xclip_fast.cli.batch import open_model, through_files, view_loader
from xclip_fast.cli.console import BAD_INPUT, note
from xclip_fast.cli.options import (
    DEMO,
    Backend,
    Device,
    Frames,
    Precision,
    Preset,
    Videos,
    Views,
    Weights,
    default_preset,
    plan_views,
)
from xclip_fast.errors import InputError


def embed(
    videos: Videos,
    out: Annotated[str, typer.Option(metavar="FILE", help="Output: .safetensors, .npz or .parquet.")],
    patches: Annotated[bool, typer.Option("--patches", help="Also the patch features, N for each video.")] = False,
    weights: Weights = DEMO,
    preset: Preset = None,
    frames: Frames = None,
    views: Views = "1x1",
    device: Device = "auto",
    dtype: Precision = "float32",
    backend: Backend = "auto",
) -> None:
    """Write the features of videos to one file.

    The features are float32, not normalised, and the mean over the views of a video. The file appears whole or not at
    all. A file that cannot be used is reported and left out; the exit code is then 2.
    """
    from xclip_fast.features import check_features_path, save_features

    check_features_path(out)

    plan = plan_views(views, preset or default_preset(weights), backend)

    import torch

    from xclip_fast import pipeline

    model = open_model(weights, frames, device, dtype)
    load = view_loader(model, plan)

    def features(path: str) -> tuple[torch.Tensor, ...]:
        # patch features are large: kept only when they are asked for
        return pipeline.embed(model, load(path))[: 2 if patches else 1]

    kept = [(path, found) for path, found, _ in through_files(videos, features, "embed") if found is not None]
    if not kept:
        raise InputError(f"no file could be used: {out} was not written")
    columns = [torch.stack(column).numpy() for column in zip(*(found for _, found in kept), strict=True)]
    save_features(out, [path for path, _ in kept], *columns)
    note(f"wrote {out}: {len(kept)} of {len(videos)} videos, {columns[0].shape[1]} numbers each")
    if len(kept) < len(videos):
        raise typer.Exit(BAD_INPUT)
