"""Lists of videos for the protocols: few shots of each class, base and novel halves, chosen classes."""

from __future__ import annotations

import csv
import io
import os
import random
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import NamedTuple

from xclip_fast.data import Dataset, Sample
from xclip_fast.errors import InputError
from xclip_fast.evaluate.difference import order_of
from xclip_fast.files import check_writable, replacing
from xclip_fast.text.labels import shown

SHOTS = (2, 4, 8, 16)
BY = ("frequency", "order")


def few_shot(dataset: Dataset, shots: Sequence[int] = SHOTS, seed: int = 0) -> dict[int, Dataset]:
    """Random videos of each class, nested: the list of fewer shots is part of each longer one.

    Neither the order of the samples nor other classes change what is drawn of a class.

    Args:
        dataset: the whole training list.
        shots: how many videos of each class, K; several make several lists.
        seed: the same seed, videos and class names give the same lists.

    Returns:
        K to its data set, class by class.

    Raises:
        InputError: a class has fewer videos than the most shots.
        ValueError: there is no K, or one is less than 1.

    Example:
        >>> from xclip_fast.data import Dataset, Sample
        >>> from xclip_fast.evaluate import few_shot
        >>> samples = tuple(Sample(f"{number}.mp4", number % 2) for number in range(8))
        >>> lists = few_shot(Dataset(samples, ("left", "right")), shots=(1, 3))
        >>> {shots: len(one.samples) for shots, one in lists.items()}
        {1: 2, 3: 6}
        >>> set(lists[1].samples) <= set(lists[3].samples)
        True
    """
    if not shots or min(shots) < 1:
        raise ValueError(f"shots must be at least 1, found {list(shots)}")
    most = max(shots)
    members = _by_class(dataset)
    short = [(len(group), name) for group, name in zip(members, dataset.classes, strict=True) if len(group) < most]
    if short:
        least, name = min(short)
        others = f" and {len(short) - 1} more classes have too few" if len(short) > 1 else ""
        raise InputError(
            f"{most} shots were asked for, class {shown(name)} has {least} videos{others}: "
            f"ask for at most {least}, or add videos"
        )
    drawn = []
    for name, group in zip(dataset.classes, members, strict=True):
        ordered = sorted(group, key=lambda sample: str(sample.source))
        # a generator of strings is the same on every machine and in every version
        random.Random(f"few-shot {seed} {name}").shuffle(ordered)
        drawn.append(ordered)
    return {
        count: Dataset(tuple(sample for group in drawn for sample in group[:count]), dataset.classes)
        for count in sorted(set(shots))
    }


class Halves(NamedTuple):
    """The class names of base-to-novel generalisation: trained on the base ones, tested on both.

    Example:
        >>> from xclip_fast.evaluate import Halves
        >>> Halves(base=("left",), novel=("right",)).novel
        ('right',)
    """

    base: tuple[str, ...]
    novel: tuple[str, ...]


def base_novel(dataset: Dataset, by: str = "frequency") -> Halves:
    """The classes in two halves, the base one larger by one where their number is odd.

    Args:
        dataset: the training list.
        by: "frequency": the classes with the most videos are the base, as ViFi-CLIP (CVPR 2023) splits; equally many
            keep the order of the labels. "order": the first half of the labels is.

    Raises:
        InputError: there is only one class, or no such way.

    Example:
        >>> from xclip_fast.data import Dataset, Sample
        >>> from xclip_fast.evaluate import base_novel
        >>> samples = tuple(Sample(f"{number}.mp4", label) for number, label in enumerate([0, 1, 1]))
        >>> base_novel(Dataset(samples, ("left", "right")))
        Halves(base=('right',), novel=('left',))
    """
    if by not in BY:
        raise InputError(f"classes are halved by {' or '.join(BY)}, found {shown(by)}")
    count = len(dataset.classes)
    if count < 2:
        raise InputError("base and novel classes were asked for, and there is one class: give at least two")
    counts = [len(group) for group in _by_class(dataset)]
    order = sorted(range(count), key=lambda place: -counts[place]) if by == "frequency" else list(range(count))
    base = set(order[: (count + 1) // 2])
    names = dataset.classes
    return Halves(
        tuple(name for place, name in enumerate(names) if place in base),
        tuple(name for place, name in enumerate(names) if place not in base),
    )


def of_classes(dataset: Dataset, names: Sequence[str]) -> Dataset:
    """The samples of some classes, labelled by their places in ``names``.

    Raises:
        InputError: a name is not a class of the data set, or no sample is left.

    Example:
        >>> from xclip_fast.data import Dataset, Sample
        >>> from xclip_fast.evaluate import of_classes
        >>> dataset = Dataset((Sample("a.mp4", 0), Sample("b.mp4", 1)), ("left", "right"))
        >>> of_classes(dataset, ["right"]).samples
        (Sample(source='b.mp4', label=0),)
    """
    places = order_of(dataset.classes, names)
    samples = tuple(Sample(one.source, places[one.label]) for one in dataset.samples if one.label in places)
    if not samples:
        raise InputError(f"no video is of the {len(names)} classes chosen: give the list that they belong to")
    return Dataset(samples, tuple(names))


def list_text(samples: Sequence[Sample], root: str | os.PathLike[str] | None = None) -> str:
    """A list file: a line "path label" for each sample.

    Args:
        samples: in the order of the lines.
        root: what the paths are relative to; without it they are absolute.

    Raises:
        InputError: a path has a line break or blanks at an end, or leads out of the root.

    Example:
        >>> from xclip_fast.data import Sample
        >>> from xclip_fast.evaluate import list_text
        >>> list_text([Sample("videos/a.mp4", 3)], root="videos")
        'a.mp4 3\\n'
    """
    lines = []
    for sample in samples:
        path = str(sample.source)
        path = os.path.abspath(path) if root is None else os.path.relpath(path, root)
        if root is not None and path.startswith(os.pardir + os.sep):
            raise InputError(f"{str(sample.source)!a} is not below the root {os.fspath(root)!a}: give another")
        if "\n" in path or path != path.strip():
            raise InputError(f"{path!a} cannot stand in a list of one path a line: rename it")
        lines.append(f"{path} {sample.label}\n")
    return "".join(lines)


def labels_text(names: Sequence[str]) -> str:
    """A label file: CSV with the columns ``id`` and ``name``.

    Example:
        >>> from xclip_fast.evaluate import labels_text
        >>> print(labels_text(["left", "right"]), end="")
        id,name
        0,left
        1,right
    """
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerows([("id", "name"), *enumerate(names)])
    return out.getvalue()


def write_lists(folder: str | os.PathLike[str], texts: Mapping[str, str], force: bool = False) -> list[str]:
    """Write files to a folder, which is made where it is missing. Files that are there with the same content stay.

    Args:
        folder: where to.
        texts: name to content.
        force: replace files that hold something else.

    Returns:
        The names of the files written.

    Raises:
        InputError: a file is there and holds something else, or the folder cannot be written; then none is.

    Example:
        >>> from xclip_fast.evaluate import write_lists
        >>> write_lists("lists", {"few_shot_2.txt": "a.mp4 0\\n"})
        ['few_shot_2.txt']
        >>> write_lists("lists", {"few_shot_2.txt": "a.mp4 0\\n"})
        []
    """
    target = Path(folder)
    wanted = {name: text.encode("utf-8", "surrogateescape") for name, text in texts.items()}
    check_folder(target)
    changed = [name for name, data in wanted.items() if not _holds(target / name, data)]
    if there := [name for name in changed if os.path.lexists(target / name)]:
        if not force:
            raise InputError(
                f"{str(target / there[0])!a} is there and holds something else: choose another folder, or --force"
            )
        check_writable(target / there[0])
    try:
        target.mkdir(exist_ok=True)
    except OSError as error:
        raise InputError(f"cannot make the folder {str(target)!r}: {error.strerror}: choose another") from None
    with ExitStack() as stack:
        # all are written before the first takes its place
        for name in changed:
            stack.enter_context(replacing(target / name)).write_bytes(wanted[name])
    return changed


def check_folder(folder: Path) -> None:
    """Find out whether files can be written to a folder, which may have to be made, before any work is done.

    Raises:
        InputError: it is no folder, its own folder is missing, or it is read-only.
    """
    real = Path(os.path.realpath(folder))
    if not real.exists():
        check_writable(real)
    elif not real.is_dir():
        raise InputError(f"cannot write to {folder}: it is not a folder: choose another")
    elif not os.access(real, os.W_OK | os.X_OK):
        raise InputError(f"cannot write to {folder}: the folder is read-only: choose another")


def _holds(path: Path, data: bytes) -> bool:
    try:
        return path.read_bytes() == data
    except OSError:
        return False


def _by_class(dataset: Dataset) -> list[list[Sample]]:
    groups: list[list[Sample]] = [[] for _ in dataset.classes]
    for sample in dataset.samples:
        groups[sample.label].append(sample)
    return groups
