"""``xclip-fast evaluate``: how good a model is on lists of labelled videos, or of captions."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from xclip_fast.cli.batch import FileProgress, open_model
from xclip_fast.cli.console import BAD_INPUT, emit_json, note, printable, safe, stdout, table
from xclip_fast.cli.options import (
    DEMO,
    SECONDS,
    AsJson,
    Backend,
    BatchSize,
    Device,
    Frames,
    Precision,
    Preset,
    Seconds,
    TextCacheFolder,
    Vocabulary,
    Weights,
    Workers,
    check_seconds,
    default_preset,
    plan_views,
)
from xclip_fast.errors import InputError
from xclip_fast.files import replacing

if TYPE_CHECKING:
    from xclip_fast.data import Dataset
    from xclip_fast.evaluate import Classified, Rate, Retrieved

# protocol to views, as the paper tests
PROTOCOLS = {"full": "4x3", "few-shot": "1x1", "zero-shot": "1x1", "base-novel": "1x1", "retrieval": "1x1"}
FORMAT = "xclip_fast evaluation 1"
FILES = ("evaluation.json", "evaluation.html")


@dataclass
class _List:
    """One list: of labelled videos, or of videos with captions."""

    name: str
    sources: list[Any]
    names: list[str]
    texts: list[str]
    dataset: Dataset | None = None
    owners: list[int] = field(default_factory=list)


def evaluate(
    videos: Annotated[
        list[str],
        typer.Argument(
            metavar="VIDEOS...",
            help="A list of 'path label' lines, a folder of class folders, or tar shards; several are splits. For "
            "retrieval a list of a path, a tab and a caption on each line.",
            show_default=False,
        ),
    ],
    labels: Annotated[
        list[str] | None,
        typer.Option(
            metavar="FILE",
            help="Label list, a CSV with the header id,name: one for all lists, or give one for each.",
            show_default=False,
        ),
    ] = None,
    root: Annotated[
        str | None,
        typer.Option(
            metavar="FOLDER", help="What the paths of a list are relative to.", show_default="the folder of the list"
        ),
    ] = None,
    protocol: Annotated[str, typer.Option(help=f"One of {', '.join(PROTOCOLS)}.")] = "full",
    weights: Weights = DEMO,
    preset: Preset = None,
    frames: Frames = None,
    views: Annotated[
        str | None,
        typer.Option(metavar="CLIPSxCROPS", help="Views of a video.", show_default="4x3 for full, else 1x1"),
    ] = None,
    template: Annotated[str, typer.Option(help="Sentence each class name is put into, at its {}.")] = "{}",
    camel_case: Annotated[
        bool, typer.Option("--split-camel-case/--keep-camel-case", help="Put spaces into names such as ApplyLipstick.")
    ] = True,
    empty_classes: Annotated[
        bool, typer.Option("--empty-classes", help="Let the label list have classes without a video.")
    ] = False,
    out: Annotated[
        Path | None,
        typer.Option(metavar="FOLDER", help=f"Write {FILES[0]} and the page {FILES[1]} there.", show_default=False),
    ] = None,
    predictions: Annotated[
        bool, typer.Option("--predictions", help="Have the answer for each video in the JSON.")
    ] = False,
    batch_size: BatchSize = 8,
    workers: Workers = None,
    timeout: Seconds = SECONDS,
    device: Device = "auto",
    dtype: Precision = "float32",
    backend: Backend = "auto",
    vocabulary: Vocabulary = None,
    text_cache: TextCacheFolder = None,
    as_json: AsJson = False,
) -> None:
    """Measure a model on labelled videos: accuracies with their intervals, confusions, calibration.

    Each list is a split, and of several mean and sample standard deviation are shown. base-novel takes the list of the
    base classes and that of the novel ones, each with its --labels. All views of a video come from one decoding of it.
    Under torchrun the processes share the videos, and the figures are those of one process. A video that cannot be used
    is reported and counts in no figure; the exit code is then 2.
    """
    from xclip_fast.evaluate import processes
    from xclip_fast.evaluate.processes import local_device

    with processes() as among:

        def prepare() -> tuple[dict[str, Any], list[_List], Any, list[Any]]:
            plan = _plan(protocol, views, preset or default_preset(weights), backend)
            check_seconds(timeout)
            read = _read_captions if protocol == "retrieval" else _read_labelled
            lists = read(videos, labels, root, camel_case=camel_case, empty_classes=empty_classes, template=template)
            _check(protocol, lists, out)
            engine, texts = _encode(
                lists, open_model(weights, frames, local_device(device), dtype), vocabulary, text_cache
            )
            return plan, lists, engine, texts

        try:
            plan, lists, engine, texts = among.agreed(prepare)
        except InputError:
            if among.rank:
                # the first process says it
                raise typer.Exit(BAD_INPUT) from None
            raise
        total = sum(len(one.sources) for one in lists)
        found = []
        with FileProgress(total // among.count, "evaluate") as progress:
            for one, encoded in zip(lists, texts, strict=True):
                options = {**plan, "batch_size": batch_size, "workers": workers, "timeout": timeout}
                found.append(_scored(engine, one, encoded, among, progress.done, options))
        if among.rank:
            return
        facts = {
            "weights": weights,
            "protocol": protocol,
            "frames": engine.config.frames,
            **plan,
            "template": template,
            "split_camel_case": camel_case,
            "dtype": dtype,
            "device": str(engine.device),
            "batch_size": batch_size,
            "processes": among.count,
        }
    _report(found, facts, out, predictions=predictions, as_json=as_json)


def _plan(protocol: str, views: str | None, preset: str, backend: str) -> dict[str, Any]:
    if protocol not in PROTOCOLS:
        raise InputError(f"unknown protocol {protocol!r}: choose one of {', '.join(PROTOCOLS)}")
    return plan_views(views or PROTOCOLS[protocol], preset, backend)


def _read_labelled(
    videos: Sequence[str],
    labels: Sequence[str] | None,
    root: str | None,
    *,
    camel_case: bool,
    empty_classes: bool,
    template: str,
) -> list[_List]:
    from xclip_fast.data import normalise_names, read_dataset
    from xclip_fast.text import apply_template

    names: Sequence[str | None] = labels or [None]
    if len(names) not in (1, len(videos)):
        raise InputError(
            f"{len(videos)} lists of videos and {len(names)} of labels were given: give one for all, or one for each"
        )
    lists = []
    for path, label in zip(videos, list(names) * len(videos) if len(names) == 1 else names, strict=False):
        dataset = read_dataset(path, labels=label, root=root, empty_classes=empty_classes)
        words = normalise_names(dataset.classes, split_camel_case=camel_case)
        sources = [one.source for one in dataset.samples]
        lists.append(_List(path, sources, words, apply_template(words, template), dataset))
    return lists


def _read_captions(
    videos: Sequence[str], labels: Sequence[str] | None, root: str | None, *, template: str, **_: bool
) -> list[_List]:
    from xclip_fast.data import read_captions
    from xclip_fast.text import apply_template

    if labels:
        raise InputError("retrieval takes captions, and --labels was given: leave it out")
    lists = []
    for path in videos:
        sources, captions = read_captions(path, root)
        places = {source: place for place, source in enumerate(dict.fromkeys(sources))}
        texts = apply_template(captions, template)
        lists.append(_List(path, list(places), captions, texts, owners=[places[source] for source in sources]))
    return lists


def _check(protocol: str, lists: Sequence[_List], out: Path | None) -> None:
    """What is refused before the weights are read."""
    from xclip_fast.evaluate.page import check_page
    from xclip_fast.evaluate.results import check_halves
    from xclip_fast.evaluate.splits import check_folder
    from xclip_fast.files import check_writable

    if protocol == "base-novel":
        check_halves([one.names for one in lists])
    if out is not None:
        check_page()
        check_folder(out)
        for name in FILES if out.is_dir() else ():
            check_writable(out / name)


def _encode(
    lists: Sequence[_List], model: Any, vocabulary: str | None, text_cache: str | None
) -> tuple[Any, list[Any]]:
    from xclip_fast.engine import Engine
    from xclip_fast.text import get_tokenizer

    tokenizer = get_tokenizer(model.config, vocabulary)
    engine = Engine(model, text_cache=text_cache)
    return engine, [engine.encode_texts(tokenizer(one.texts, engine.config.context_length)) for one in lists]


def _scored(
    engine: Any,
    one: _List,
    texts: Any,
    among: Any,
    report: Callable[[str, str | None], object],
    options: dict[str, Any],
) -> Classified | Retrieved:
    from xclip_fast.evaluate import classified, retrieved, score_files
    from xclip_fast.evaluate.scoring import shown_path

    logits = one.dataset is None
    scored = score_files(engine, one.sources, texts, logits=logits, among=among, report=report, **options)
    name = shown_path(one.name)
    if one.dataset is None:
        return retrieved(name, one.sources, one.owners, scored)
    return classified(name, one.dataset, one.names, scored)


def _report(found: Sequence[Any], facts: dict[str, Any], out: Path | None, *, predictions: bool, as_json: bool) -> None:
    import xclip_fast
    from xclip_fast.evaluate import Classified, base_and_novel, summary

    facts = {"xclip_fast": xclip_fast.__version__, **facts}
    summed: dict[str, Any] = {}
    if facts["protocol"] == "base-novel":
        summed = dict(base_and_novel(found))
    elif len(found) > 1 and isinstance(found[0], Classified):
        summed = dict(summary(found))
    splits = [one.to_dict(predictions) if isinstance(one, Classified) else one.to_dict() for one in found]
    plain = {key: value if isinstance(value, float) else asdict(value) for key, value in summed.items()}
    payload = {"format": FORMAT, **facts, "splits": splits, "summary": plain}
    if as_json:
        emit_json(payload)
    else:
        _show(found, summed)
    if out is not None:
        from xclip_fast.evaluate.page import render_page

        page = render_page(found, facts, summed)
        out.mkdir(exist_ok=True)
        for name, text in zip(FILES, (json.dumps(payload, allow_nan=False) + "\n", page), strict=True):
            with replacing(out / name) as temporary:
                # a path may hold what UTF-8 cannot
                temporary.write_text(text, encoding="utf-8", errors="backslashreplace")
        note(f"wrote {out / FILES[0]} and {out / FILES[1]}")
    if any(one.failed for one in found):
        raise typer.Exit(BAD_INPUT)


def _show(found: Sequence[Any], summed: dict[str, Any]) -> None:
    """A row for each figure, a column for each list: they fit a narrow terminal."""
    from xclip_fast.evaluate.page import percent, spread_text
    from xclip_fast.evaluate.results import SUMMED

    rows = [_figures(one) for one in found]
    splits = summed if set(summed) == set(SUMMED) else {}
    means = {f"{SUMMED[key][0]} %": spread_text(value) for key, value in splits.items()}
    names = [one.name if len(found) == 1 else f"{number}" for number, one in enumerate(found, 1)]
    shown = table(None, "", *map(printable, names), *["mean ± std"] * bool(means))
    for column in shown.columns[1:]:
        column.justify = "right"
    for name, *cells in zip(rows[0], *(row.values() for row in rows), strict=True):
        shown.add_row(name, *cells, *[means.get(name, "")] * bool(means), style="dim" if name.startswith(" ") else "")
    for number, one in enumerate(found if len(found) > 1 else (), 1):
        stdout.print(safe(f"{number}: {one.name}"), soft_wrap=True)
    stdout.print(shown)
    if "harmonic_mean" in summed:
        parts = ", ".join(f"{key.replace('_', ' ')} {percent(value)} %" for key, value in summed.items())
        stdout.print(f"top-1: {parts}")


def _figures(one: Classified | Retrieved) -> dict[str, str]:
    from xclip_fast.evaluate import Classified
    from xclip_fast.evaluate.page import percent

    rows = {"videos": str(one.files - len(one.failed)), "unusable": str(len(one.failed))}

    def add(name: str, found: Rate) -> None:
        rows[f"{name} %"] = percent(found.value)
        rows[f"  {name}, 95 % interval"] = f"{percent(found.low)} to {percent(found.high)}"

    if isinstance(one, Classified):
        add("top-1", one.top1)
        add("top-5", one.top5)
        rows |= {"mean class %": percent(one.mean_class_accuracy), "ECE %": percent(one.calibration.ece)}
        return rows
    rows["captions"] = str(one.captions)
    for way, ranks in (("text to video", one.figures.text_to_video), ("video to text", one.figures.video_to_text)):
        for depth, recall in ranks.recall.items():
            add(f"{way} R@{depth}", recall)
        rows[f"{way} median rank"] = f"{ranks.median:g}"
    return rows
