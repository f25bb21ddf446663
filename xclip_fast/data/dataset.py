"""A data set: videos with their classes, from lists, folders or tar shards."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from xclip_fast.data.labels import normalise_names, read_labels
from xclip_fast.data.lists import read_list
from xclip_fast.data.tars import VIDEO_SUFFIXES, expand_shards, group_members, is_tar, read_label, shards_in
from xclip_fast.errors import InputError
from xclip_fast.text.labels import clean_labels
from xclip_fast.video.pool import Source
from xclip_fast.video.source import display_name

_NAMED = 3  # classes that a message names, of many


@dataclass(frozen=True, slots=True)
class Sample:
    """A video and its class: ``label`` is a place in the classes of its data set.

    Example:
        >>> from xclip_fast.data import Sample
        >>> Sample("clip.mp4", label=0).label
        0
    """

    source: Source
    label: int


@dataclass(frozen=True)
class Dataset:
    """Videos with their classes, whose names are as given: ``normalise_names`` makes words of them.

    Raises:
        ValueError: a label is no place in the classes.

    Example:
        >>> from xclip_fast.data import Dataset, Sample
        >>> data = Dataset((Sample("clip.mp4", 1), Sample("moving_right.mp4", 0)), ("moving right", "standing still"))
        >>> data.classes[data.samples[0].label]
        'standing still'
    """

    samples: tuple[Sample, ...]
    classes: tuple[str, ...]

    def __post_init__(self) -> None:
        wrong = next((one for one in self.samples if not 0 <= one.label < len(self.classes)), None)
        if wrong is not None:
            raise ValueError(f"label {wrong.label} of {wrong.source} is none of the {len(self.classes)} classes")


def read_dataset(
    videos: str | Path | Sequence[str | Path],
    *,
    labels: str | Path | None = None,
    root: str | Path | None = None,
    empty_classes: bool = False,
) -> Dataset:
    """The videos of a data set with their classes. No video is opened, but each of them is there.

    Args:
        videos: one of

            - a list, a text file with a path and a class number on each line (the official ``train.txt``). A path may
              hold spaces, and name a member of an archive: ``shard.tar::0001.mp4``;
            - a folder with a folder for each class, its videos at any depth;
            - tar archives in the layout of webdataset: one, several, ``shard-{000..009}.tar``, or a folder of them.
              Beside each video, with the same name, its class stands in a file ``.cls`` (a number), ``.txt`` (a name)
              or ``.json`` (either, under "label"); all other files are left alone.
        labels: the label list, a CSV with the header ``id,name``. Class numbers need it. Class names must be in it, but
            for case, underscores and spaces.
        root: folder, or tar archive, that the paths of a list are relative to; without it the folder of the list.
        empty_classes: let the label list have classes without a video.

    Raises:
        InputError: something cannot be read, a video is missing or there twice, a label is not in the label list, or a
            class has no video.

    Example:
        >>> from pathlib import Path
        >>> from xclip_fast.data import read_dataset
        >>> _ = Path("labels.csv").write_text("id,name\\n0,moving right\\n1,standing still\\n")
        >>> _ = Path("train.txt").write_text("clip.mp4 1\\nmoving_right.mp4 0\\n")
        >>> data = read_dataset("train.txt", labels="labels.csv")
        >>> [(sample.source, data.classes[sample.label]) for sample in data.samples]
        [('clip.mp4', 'standing still'), ('moving_right.mp4', 'moving right')]
    """
    names = None if labels is None else read_labels(labels)
    where, pairs, folder_names = _labelled(videos, root)
    if names is None:
        names = _own_names(where, pairs, folder_names)
    places = _Places(names)
    samples = tuple(Sample(source, places.find(label, source)) for source, label in pairs)
    if not empty_classes:
        _check_no_empty_class(where, samples, names)
    return Dataset(samples, tuple(names))


Labelled = list[tuple[Source, int | str]]


def _labelled(
    videos: str | Path | Sequence[str | Path], root: str | Path | None
) -> tuple[str, Labelled, list[str] | None]:
    """What messages call the data set, its videos with their labels as written, and the names of class folders."""
    paths = [os.fsdecode(videos)] if isinstance(videos, str | Path) else [os.fsdecode(path) for path in videos]
    if not paths:
        raise InputError("no videos were given: name a list, a folder or tar archives")
    where = display_name(paths[0]) + (f" and {len(paths) - 1} more" if len(paths) > 1 else "")
    archives = len(paths) > 1 or is_tar(paths[0])
    if root is not None and (archives or os.path.isdir(paths[0])):
        raise InputError(f"{where}: root is for the paths of a list, and this is none: leave it out")
    if archives:
        other = next((path for path in paths if not is_tar(path)), None)
        if other is not None:
            raise InputError(f"{display_name(other)}: no tar archive (.tar); of lists and folders give one at a time")
        return where, _of_shards([shard for path in paths for shard in expand_shards(path)]), None
    if not os.path.isdir(paths[0]):
        return where, list(read_list(paths[0], root)), None
    shards = shards_in(paths[0])
    if shards:
        return where, _of_shards(shards), None
    found = dict(_class_folders(paths[0]))
    return where, [(video, name) for name, inside in found.items() for video in inside], list(found)


def _own_names(where: str, pairs: Labelled, folder_names: list[str] | None) -> list[str]:
    """The class names of videos that come without a label list."""
    number = next((label for _, label in pairs if isinstance(label, int)), None)
    if number is not None:
        raise InputError(
            f"{where}: classes are numbers there, such as {number}: give their names as labels, a CSV with the header "
            "id,name"
        )
    names = folder_names or sorted({str(label) for _, label in pairs})
    try:
        return clean_labels(names)
    except InputError as error:
        raise InputError(f"{where}: {error}") from None


class _Places:
    """Where class names and numbers stand among the classes."""

    def __init__(self, names: Sequence[str]) -> None:
        self.names = names
        self.exact = {name: place for place, name in enumerate(names)}
        alike = Counter(map(_plain, names))
        self.loose = {_plain(name): place for place, name in enumerate(names) if alike[_plain(name)] == 1}

    def find(self, label: int | str, source: Source) -> int:
        """The place of a class.

        Raises:
            InputError: it is not among them.
        """
        if isinstance(label, int):
            if 0 <= label < len(self.names):
                return label
            found = f"label {label} is not in the label list, which has 0 to {len(self.names) - 1}"
        else:
            place = self.exact.get(label, self.loose.get(_plain(label)))
            if place is not None:
                return place
            found = f"the class {label[:60]!a} is not in the label list"
        raise InputError(f"{display_name(source)}: {found}: correct one or the other")


def _plain(name: str) -> str:
    return "".join(normalise_names([name], split_camel_case=False)[0].split())


def _check_no_empty_class(where: str, samples: Iterable[Sample], names: Sequence[str]) -> None:
    counts = Counter(sample.label for sample in samples)
    empty = [name for place, name in enumerate(names) if not counts[place]]
    if empty:
        named = ", ".join(map(ascii, empty[:_NAMED]))
        named += f" and {len(empty) - _NAMED} more" if len(empty) > _NAMED else ""
        raise InputError(
            f"{where}: {len(empty)} of the {len(names)} classes have no video: {named}; add videos, or take the "
            "classes out of the label list"
        )


def _of_shards(shards: Sequence[str]) -> Labelled:
    twice = next((shard for shard, count in Counter(map(os.path.normpath, shards)).items() if count > 1), None)
    if twice is not None:
        raise InputError(f"{display_name(twice)}: given twice: name each archive once")
    return [(entry.videos[0], read_label(entry)) for shard in shards for entry in group_members(shard).values()]


def _class_folders(folder: str) -> Iterator[tuple[str, list[str]]]:
    """Each class with its videos, sorted."""
    with os.scandir(folder) as entries:
        inside = sorted((entry for entry in entries if not entry.name.startswith(".")), key=lambda entry: entry.name)
    loose = next((entry.name for entry in inside if entry.is_file() and _is_video(entry.name)), None)
    classes = [entry for entry in inside if entry.is_dir()]
    if loose is not None or not classes:
        found = f"found the video {loose!a} directly in it" if loose else "found none"
        raise InputError(
            f"{display_name(folder)}: a folder for each class is needed, {found}: sort the videos into them"
        )
    for entry in classes:
        videos = sorted(_videos_below(entry.path))
        if not videos:
            endings = ", ".join(sorted(VIDEO_SUFFIXES))
            raise InputError(f"{display_name(entry.path)}: a class without a video, looked for files in {endings}")
        yield entry.name, videos


def _videos_below(folder: str) -> Iterator[str]:
    seen: set[str] = set()
    for below, folders, names in os.walk(folder, followlinks=True):
        # a link may lead to where it is
        real = os.path.realpath(below)
        if real in seen:
            folders.clear()
            continue
        seen.add(real)
        folders[:] = [name for name in folders if not name.startswith(".")]
        yield from (os.path.join(below, name) for name in names if not name.startswith(".") and _is_video(name))


def _is_video(name: str) -> bool:
    return name.lower().rpartition(".")[2] in VIDEO_SUFFIXES and "." in name
