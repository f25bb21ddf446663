"""Lists of videos: lines of a path and a label, or of a path and a caption."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Sequence
from pathlib import Path

from xclip_fast.data.tars import is_tar, list_members
from xclip_fast.errors import InputError
from xclip_fast.text.labels import check_unicode
from xclip_fast.video.pool import Member, Source
from xclip_fast.video.source import display_name

_MAX_TEXT = 256 << 20
_NUMBER = re.compile(r"[0-9]{1,9}")
_NAMED = 3  # files that a message names, of many
_INSIDE = ".tar::"


def read_text(path: str | Path, what: str) -> str:
    """A text file in UTF-8, with or without a mark at its start; other bytes stay as in file names.

    Raises:
        InputError: it cannot be read or is too long.
    """
    name = display_name(path)
    try:
        # a pipe would be waited for
        if not os.path.isfile(path) and os.path.exists(path):
            raise InputError(f"{name}: not a file; give {what}")
        with open(path, "rb") as file:
            content = file.read(_MAX_TEXT + 1)
    except (OSError, ValueError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(f"{name}: cannot be read ({getattr(error, 'strerror', None) or error}); give {what}") from None
    if len(content) > _MAX_TEXT:
        raise InputError(f"{name}: more than {_MAX_TEXT >> 20} MiB for {what}")
    return content.decode("utf-8-sig", "surrogateescape")


def check_number(text: str, what: str) -> int:
    """A whole number from 0 written in digits.

    Raises:
        InputError: it is something else.
    """
    if not _NUMBER.fullmatch(text.strip()):
        raise InputError(f"{what} must be a whole number from 0, found {text[:40]!a}")
    return int(text)


def read_list(path: str | Path, root: str | Path | None) -> list[tuple[Source, int]]:
    """The videos of a list with their labels: a line is a path, with or without spaces in it, and a class number.

    Args:
        path: the list.
        root: folder, or tar archive, that the paths are relative to; without it the folder of the list.

    Raises:
        InputError: it cannot be read, is empty, a line is wrong, a path is there twice, or files are missing.
    """
    videos: list[str] = []
    labels: list[int] = []
    for where, line in _lines(path, "a list of videos, 'path label' on each line"):
        video, *rest = line.rsplit(None, 1)
        if not rest:
            raise InputError(f"{where}: {line[:60]!a} is no 'path label': write a path, a space and a class number")
        videos.append(video)
        labels.append(check_number(rest[0], f"{where}: the label"))
    return list(zip(_located(path, root, videos), labels, strict=True))


def read_captions(videos: str | Path, root: str | Path | None = None) -> tuple[list[Source], list[str]]:
    """The videos of a list and their captions: a line is a path, a tab and the caption.

    Args:
        videos: the list.
        root: folder, or tar archive, that the paths are relative to; without it the folder of the list.

    Returns:
        Sources and captions, one for each line. A video with several captions has several lines.

    Raises:
        InputError: it cannot be read, is empty, a line is wrong, or files are missing.

    Example:
        >>> from pathlib import Path
        >>> from xclip_fast.data import read_captions
        >>> _ = Path("captions.txt").write_text("clip.mp4\\tA grey square.\\n")
        >>> read_captions("captions.txt")
        (['clip.mp4'], ['A grey square.'])
    """
    found: list[tuple[str, str]] = []
    for where, line in _lines(videos, "a list of videos, a path, a tab and a caption on each line"):
        video, _, caption = (part.strip() for part in line.partition("\t"))
        if not caption:
            raise InputError(f"{where}: {line[:60]!a} is no path, tab and caption")
        check_unicode(caption)
        found.append((video, caption))
    sources = _located(videos, root, [video for video, _ in found], repeats=True)
    return sources, [caption for _, caption in found]


def _lines(path: str | Path, what: str) -> Iterator[tuple[str, str]]:
    number = 0
    empty = True
    for number, line in enumerate(read_text(path, what).split("\n"), start=1):
        line = line.strip()
        if not line:
            continue
        empty = False
        if "\0" in line:
            raise InputError(f"{display_name(path)}, line {number}: not text; give {what}")
        yield f"{display_name(path)}, line {number}", line
    if empty:
        raise InputError(f"{display_name(path)}: an empty list; give {what}")


def _located(path: str | Path, root: str | Path | None, videos: Sequence[str], repeats: bool = False) -> list[Source]:
    """Where the videos of a list are, each of them there."""
    base = os.fsdecode(os.path.dirname(path) if root is None else root)
    inside = root is not None and is_tar(base)
    if inside:
        places = [f"{base}::{video}" for video in videos]
    else:
        if root is not None and not os.path.isdir(base):
            raise InputError(f"{display_name(base)}: no such folder; give the one that the paths are relative to")
        places = [os.path.normpath(os.path.join(base, video)) if base else os.path.normpath(video) for video in videos]
    if not repeats and len(set(places)) < len(places):
        seen: set[str] = set()
        twice = next(place for place in places if place in seen or seen.add(place))  # type: ignore[func-returns-value]
        raise InputError(f"{display_name(path)}: {display_name(twice)} is there twice: list each video once")
    archives: dict[str, dict[str, Member]] = {}
    sources: list[Source | None] = []
    folders = _Folders()
    for place in places:
        if _INSIDE in place:
            tar, _, name = place.partition(_INSIDE)
            tar += ".tar"
            if tar not in archives:
                archives[tar] = list_members(tar)
            sources.append(archives[tar].get(os.path.normpath(name)))
        else:
            sources.append(place if folders.has(place) else None)
    missing = [place for place, source in zip(places, sources, strict=True) if source is None]
    if missing:
        named = ", ".join(display_name(place) for place in missing[:_NAMED])
        more = f" and {len(missing) - _NAMED} more" if len(missing) > _NAMED else ""
        raise InputError(
            f"{display_name(path)}: {len(missing)} of {len(places)} videos are not there: {named}{more}; "
            "give the folder that the paths are relative to as root"
        )
    return [source for source in sources if source is not None]


class _Folders:
    """Which files are there, each folder listed once: to ask for each file takes minutes on a file server."""

    def __init__(self) -> None:
        self.files: dict[str, set[str]] = {}

    def has(self, path: str) -> bool:
        folder, name = os.path.split(path)
        if folder not in self.files:
            try:
                with os.scandir(folder or ".") as entries:
                    self.files[folder] = {entry.name for entry in entries if entry.is_file()}
            except OSError:
                self.files[folder] = set()
        return name in self.files[folder]
