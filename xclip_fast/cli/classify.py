"""``xclip-fast classify``: the likeliest labels of videos."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.progress_bar import ProgressBar

from xclip_fast.cli.batch import definition_of, open_model, through_files, view_loader
from xclip_fast.cli.console import BAD_INPUT, emit_json, safe, stdout, table
from xclip_fast.cli.options import (
    DEMO,
    AsJson,
    Backend,
    Device,
    Frames,
    Precision,
    Preset,
    TextCacheFolder,
    Videos,
    Views,
    Vocabulary,
    Weights,
    default_preset,
    plan_views,
)
from xclip_fast.errors import InputError

if TYPE_CHECKING:
    from xclip_fast.pipeline import Prediction


def classify(
    videos: Videos,
    labels: Annotated[str | None, typer.Option(metavar="A,B,C", help="Class names, between commas.")] = None,
    labels_file: Annotated[str | None, typer.Option(metavar="FILE", help="Class names, one a line, in UTF-8.")] = None,
    template: Annotated[str, typer.Option(help="Sentence each label is put into, at its {}.")] = "{}",
    top_k: Annotated[int, typer.Option(min=1, help="Labels to show for each video.")] = 5,
    weights: Weights = DEMO,
    preset: Preset = None,
    frames: Frames = None,
    views: Views = "1x1",
    device: Device = "auto",
    dtype: Precision = "float32",
    backend: Backend = "auto",
    vocabulary: Vocabulary = None,
    text_cache: TextCacheFolder = None,
    reference: Annotated[
        bool, typer.Option("--reference", help="Compute with the definition in plain PyTorch, not with the engine.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Rank class names for each video.

    The engine computes, on the weights packed for inference; --reference computes the same by the definition, more
    slowly, to compare with it. The probabilities are the softmax over the labels, averaged over the views of the video.
    A file that cannot be used is reported and the others are done; the exit code is then 2.
    """
    if (labels is None) == (labels_file is None):
        raise InputError("give the class names with either --labels a,b,c or --labels-file FILE")

    from xclip_fast.engine import Engine
    from xclip_fast.pipeline import Classifier, read_labels
    from xclip_fast.text import apply_template, clean_labels, get_tokenizer

    plan = plan_views(views, preset or default_preset(weights), backend)
    names = clean_labels(read_labels(labels_file) if labels_file is not None else (labels or "").split(","))
    apply_template(names, template)  # a bad one is refused before the weights are read
    model = open_model(weights, frames, device, dtype)
    config = model.config
    tokenizer = get_tokenizer(config, vocabulary)
    if reference:
        classifier = Classifier(definition_of(model), names, tokenizer, template, text_cache)
    else:
        classifier = Classifier(Engine(model, text_cache=text_cache), names, tokenizer, template)
    del model  # the engine has weights of its own
    load = view_loader(config, plan)

    results: list[dict[str, Any]] = []
    for path, best, error in through_files(videos, lambda path: classifier.top(load(path), top_k), "classify"):
        if best is None:
            results.append({"file": path, "error": error})
            continue
        results.append({"file": path, "predictions": [asdict(prediction) for prediction in best]})
        if not as_json:
            show_ranking(path, best)
    if as_json:
        used = {"weights": weights, "frames": config.frames, **plan, "classes": len(names)}
        emit_json({**used, "results": results})
    if any("error" in result for result in results):
        raise typer.Exit(BAD_INPUT)


def show_ranking(path: str, best: list[Prediction]) -> None:
    """Print the labels of a video, best first."""
    ranking = table(None, "#", "label", "probability", "", numbers=("#", "probability"))
    for rank, prediction in enumerate(best, start=1):
        bar = ProgressBar(total=1, completed=prediction.probability, width=20)
        share = prediction.probability
        # of ten thousand labels the best may have less than a thousandth
        shown = f"{share:.1%}" if share >= 0.001 else f"{100 * share:.2g}%"
        ranking.add_row(str(rank), safe(prediction.label), shown, bar)
    stdout.print(safe(path, "bold"), soft_wrap=True)
    stdout.print(ranking)
