"""``xclip-fast split``: the lists of the protocols, written as files."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Annotated

import typer

from xclip_fast.cli.console import EXIT_CODES, note, printable, stdout
from xclip_fast.errors import InputError

split = typer.Typer(
    name="split",
    help="Write the lists of the protocols: few shots of each class, base and novel classes, new classes.",
    epilog=EXIT_CODES,
    no_args_is_help=True,
)

Out = Annotated[Path, typer.Option(metavar="FOLDER", help="Where the lists go; made where it is missing.")]
Labels = Annotated[
    str | None,
    typer.Option(metavar="FILE", help="Label list, a CSV with the header id,name.", show_default=False),
]
Root = Annotated[
    str | None,
    typer.Option(
        metavar="FOLDER",
        help="What the paths of the lists are relative to, those read and those written.",
        show_default="the folder of the list read; absolute paths are written",
    ),
]
Seed = Annotated[int, typer.Option(help="Another seed, other lists.")]
Force = Annotated[bool, typer.Option("--force", help="Replace files that hold something else.")]
VideoList = Annotated[
    str,
    typer.Argument(metavar="VIDEOS", help="A list of 'path label' lines, a folder of class folders, or tar shards."),
]


def few_shot(
    videos: VideoList,
    out: Out,
    labels: Labels = None,
    root: Root = None,
    shots: Annotated[
        str, typer.Option(metavar="A,B,C", help="Videos of each class, K; each makes a list.")
    ] = "2,4,8,16",
    seed: Seed = 0,
    force: Force = False,
) -> None:
    """Write few-shot lists: K random videos of each class, those of fewer shots part of each longer list."""
    from xclip_fast.data import read_dataset
    from xclip_fast.evaluate import few_shot as draw
    from xclip_fast.evaluate import labels_text, list_text

    counts = _counts(shots)
    dataset = read_dataset(videos, labels=labels, root=root)
    texts = {
        f"few_shot_{count}.txt": list_text(one.samples, root) for count, one in draw(dataset, counts, seed).items()
    }
    _write(out, {**texts, "labels.csv": labels_text(dataset.classes)}, force)


def base_novel(
    videos: Annotated[
        list[str],
        typer.Argument(metavar="VIDEOS...", help="The training list, then others to cut alike, such as val.txt."),
    ],
    out: Out,
    labels: Labels = None,
    root: Root = None,
    by: Annotated[
        str, typer.Option(help="frequency: base classes have the most videos, as in ViFi-CLIP; order: stand first.")
    ] = "frequency",
    force: Force = False,
) -> None:
    """Write the lists of base and of novel classes, a half each, with their label lists."""
    from xclip_fast.data import read_dataset
    from xclip_fast.evaluate import base_novel as halve
    from xclip_fast.evaluate import labels_text, list_text, of_classes

    names = [Path(path).name.partition(".")[0] for path in videos]
    if len(set(names)) < len(names):
        raise InputError(f"lists were given that have one name, {', '.join(map(ascii, names))}: rename one")
    datasets = [read_dataset(path, labels=labels, root=root) for path in videos]
    if len({one.classes for one in datasets}) > 1:
        raise InputError("the lists have other classes: give --labels, one label list for all of them")
    halves = halve(datasets[0], by)
    texts = {}
    for half, chosen in halves._asdict().items():
        texts[f"{half}_labels.csv"] = labels_text(chosen)
        for name, dataset in zip(names, datasets, strict=True):
            texts[f"{half}_{name}.txt"] = list_text(of_classes(dataset, chosen).samples, root)
    _write(out, texts, force)


def new_classes(
    newer: Annotated[str, typer.Argument(metavar="NEWER", help="Label list, such as that of Kinetics-600.")],
    older: Annotated[str, typer.Argument(metavar="OLDER", help="Label list, such as that of Kinetics-400.")],
    out: Out,
    videos: Annotated[
        str | None,
        typer.Option(
            metavar="LIST", help="Videos labelled by NEWER, to write a list for each draw.", show_default=False
        ),
    ] = None,
    root: Root = None,
    count: Annotated[int, typer.Option(min=1, help="Classes of a draw.")] = 160,
    draws: Annotated[int, typer.Option(min=1, help="How many draws.")] = 3,
    seed: Seed = 0,
    force: Force = False,
) -> None:
    """Write the classes that a data set has and an older one does not, and random draws of them.

    Names that differ are looked at twice: what is an older class under another name is said, and is not new. Of the
    label lists of Kinetics-600 and Kinetics-400 that leaves the published 220.
    """
    from xclip_fast.data import read_dataset, read_labels
    from xclip_fast.evaluate import draw_classes, labels_text, list_text, of_classes
    from xclip_fast.evaluate import new_classes as compare

    found = compare(read_labels(newer), read_labels(older))
    chosen = {"new": list(found.names)}
    chosen |= {f"draw_{number}": names for number, names in enumerate(draw_classes(found.names, count, draws, seed), 1)}
    texts = {f"{name}_labels.csv": labels_text(names) for name, names in chosen.items()}
    if videos is not None:
        dataset = read_dataset(videos, labels=newer, root=root)
        texts |= {f"{name}.txt": list_text(of_classes(dataset, names).samples, root) for name, names in chosen.items()}
    elif root is not None:
        raise InputError("--root was given without --videos: it says what the paths of that list are relative to")
    _write(out, texts, force)
    for line in str(found).splitlines():
        stdout.print(printable(line), markup=False, soft_wrap=True)


def _counts(text: str) -> list[int]:
    parts = [part.strip() for part in text.split(",")]
    if not all(part.isascii() and part.isdigit() and 0 < int(part) < 10**6 for part in parts):
        raise InputError(f"--shots takes numbers between commas such as 2,4,8,16, found {text!r}")
    return [int(part) for part in parts]


def _write(out: Path, texts: Mapping[str, str], force: bool) -> None:
    from xclip_fast.evaluate import write_lists

    written = write_lists(out, texts, force)
    same = len(texts) - len(written)
    note(f"wrote {', '.join(written) or 'nothing'} to {out}" + (f"; {same} files were there, the same" if same else ""))


COMMANDS: dict[str, Callable[..., None]] = {
    "few-shot": few_shot,
    "base-novel": base_novel,
    "new-classes": new_classes,
}
