"""Tar shards in the layout of webdataset, read where they lie.

The library reads a shard as a stream: no place in an epoch can be asked for, so there is no true shuffle, no exact
share of each process and no way to go on in the middle; its index of members (wids) is not in the wheel 1.0.2. So
members are listed here, once, by the headers alone, and its conventions are kept: what belongs together, and how shards
are named.
"""

from __future__ import annotations

import io
import math
import os
import re
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

from xclip_fast.errors import InputError, one_line
from xclip_fast.files import parse_json
from xclip_fast.video.pool import Member
from xclip_fast.video.source import display_name

VIDEO_SUFFIXES = frozenset({"avi", "m4v", "mkv", "mov", "mp4", "mpeg", "mpg", "ts", "webm"})
LABEL_SUFFIXES = ("cls", "json", "txt")
_COMPRESSED = (".tar.gz", ".tgz", ".tar.bz2", ".tar.xz", ".tar.zst")
_RANGE = re.compile(r"\{(-?\d{1,99})\.\.(-?\d{1,99})")
_MAX_MEMBERS = 2_000_000
_MAX_SHARDS = 100_000
_MAX_HEADER = 64 << 10  # bytes: a path is 4 KiB at most
_MAX_LABEL = 64 << 10


@dataclass
class Entry:
    """What an archive holds under one key."""

    videos: list[Member] = field(default_factory=list)
    labels: list[Member] = field(default_factory=list)


def is_tar(path: str) -> bool:
    """Whether this names an archive, or archives with ``{000..009}`` in their name.

    Raises:
        InputError: it names a compressed one.
    """
    if path.endswith(_COMPRESSED):
        raise InputError(
            f"{display_name(path)}: a compressed archive, in which no member can be found without reading all before "
            "it: decompress it to a .tar"
        )
    return path.endswith(".tar")


def expand_shards(path: str) -> list[str]:
    """The archives that a name with braces stands for; one that is there is taken as it is.

    Raises:
        InputError: the braces are wrong or stand for too many.
    """
    if os.path.exists(path) or "{" not in path:
        return [path]
    # webdataset's own ``expand_urls`` also reads "::" and "${NAME}", which are file names here
    from braceexpand import braceexpand

    # it makes a whole range before the first name
    ranges = [abs(int(last) - int(first)) + 1 for first, last in _RANGE.findall(path)]
    try:
        found = list(islice(braceexpand(path), _MAX_SHARDS + 1)) if math.prod(ranges) <= _MAX_SHARDS else None
    except ValueError as error:
        raise InputError(f"{display_name(path)}: {one_line(error)}: write it as in shard-{{000..009}}.tar") from None
    if found is None or len(found) > _MAX_SHARDS:
        raise InputError(f"{display_name(path)}: more than {_MAX_SHARDS:,} archives: give fewer")
    return found


def list_members(path: str) -> dict[str, Member]:
    """The files of an archive by name, by reading its headers and nothing else.

    Raises:
        InputError: it is no tar or damaged; or a member has an absolute name or one with "..", is no regular file, or
            is there twice.
    """
    found: dict[str, Member] = {}
    try:
        end = os.path.getsize(path) if os.path.isfile(path) else -1
        if end < 0:
            reason = "No such file" if not os.path.exists(path) else "not a regular file"
            raise InputError(f"{display_name(path)}: cannot be read ({reason}); give the path of a tar archive")
        with _Headers(path) as file, tarfile.TarFile(fileobj=file, errorlevel=0) as tar:
            for info in _headers(tar, path):
                name = _safe_name(path, info)
                if name is None:
                    continue
                if name in found:
                    raise _refused(path, info.name, "there twice; name each file once")
                if info.offset_data + info.size > end:
                    raise InputError(f"{display_name(path)}: cut short in {name!a}; copy the archive again")
                found[name] = Member(path, name, info.offset_data, info.size)
                if len(found) > _MAX_MEMBERS:
                    raise InputError(f"{display_name(path)}: more than {_MAX_MEMBERS:,} files; use several archives")
    except (tarfile.TarError, OSError, ValueError, RecursionError, OverflowError) as error:
        if isinstance(error, InputError):
            raise
        reason = getattr(error, "strerror", None) or one_line(error)
        raise InputError(f"{display_name(path)}: no readable tar archive ({reason}); make it again") from None
    return found


def group_members(path: str) -> dict[str, Entry]:
    """The videos of an archive and what tells their labels, by the key they share; other files are left alone.

    Raises:
        InputError: as ``list_members``; a key has two videos, none, or no label.
    """
    try:
        from webdataset.tariterators import base_plus_ext
    except ImportError as error:
        raise InputError(
            f"tar shards need webdataset, found no {error.name}: pip install 'xclip-fast[train]'"
        ) from None
    entries: dict[str, Entry] = {}
    for name, member in list_members(path).items():
        key, suffixes = base_plus_ext(name)
        suffix = (suffixes or "").lower().rpartition(".")[2]
        # webdataset's own notes about a shard
        if key is None or name.startswith("__"):
            continue
        if suffix in VIDEO_SUFFIXES:
            entries.setdefault(key, Entry()).videos.append(member)
        elif suffix in LABEL_SUFFIXES:
            entries.setdefault(key, Entry()).labels.append(member)
    for key, entry in entries.items():
        if len(entry.videos) != 1:
            names = ", ".join(ascii(member.name) for member in (*entry.videos, *entry.labels)[:3])
            raise InputError(
                f"{display_name(path)}: {len(entry.videos)} videos of the key {key!a} ({names}): each needs one; a key "
                "is a name up to its first dot"
            )
        if not entry.labels:
            raise InputError(
                f"{display_name(path)}: no label of {entry.videos[0].name!a}: put a .cls, .json or .txt beside it"
            )
    if not entries:
        raise InputError(f"{display_name(path)}: no video in it; each is KEY.mp4 with its label in KEY.cls")
    return entries


def read_label(entry: Entry) -> int | str:
    """The label of a video: a class number, or a name.

    Raises:
        InputError: there is none in the file, or it is no number or text.
    """
    member = min(entry.labels, key=lambda member: LABEL_SUFFIXES.index(member.name.lower().rpartition(".")[2]))
    where = display_name(member)
    if member.size > _MAX_LABEL:
        raise InputError(f"{where}: {member.size:,} bytes for a label, at most {_MAX_LABEL:,} are read")
    try:
        with open(member.tar, "rb") as file:
            file.seek(member.offset)
            text = file.read(member.size).decode("utf-8-sig").strip()
    except (OSError, UnicodeError) as error:
        raise InputError(f"{where}: cannot be read ({one_line(error)}); write the label in UTF-8") from None
    label: object = text
    if member.name.lower().endswith(".json"):
        label = parse_json(text, where).get("label")
    elif member.name.lower().endswith(".cls"):
        label = int(text) if text.isascii() and text.isdecimal() and len(text) < 10 else None
    if isinstance(label, bool) or not isinstance(label, int | str) or label == "":
        raise InputError(
            f"{where}: no label: write a class number (.cls), a name (.txt), or {{'label': either}} (.json)"
        )
    return label.strip() if isinstance(label, str) else label


class _Headers(io.FileIO):
    """A file of which only headers are read: a hostile one can't ask for more memory."""

    def read(self, size: int | None = -1) -> bytes:
        if size is None or not 0 <= size <= _MAX_HEADER:
            raise tarfile.ReadError(f"a header of more than {_MAX_HEADER:,} bytes")
        return super().read(size) or b""


def _headers(tar: tarfile.TarFile, path: str) -> Iterator[tarfile.TarInfo]:
    # the list of members, which would grow, and the file are typed as missing
    inner: Any = tar
    place = -1
    while (info := tar.next()) is not None:
        # a negative size would lead back to where it was
        if info.size < 0 or tar.offset <= place:
            raise tarfile.ReadError("a size below zero")
        place = tar.offset
        inner.members.clear()
        yield info
    # a damaged header ends the list as the end of the archive does: only there it is followed by nothing
    inner.fileobj.seek(tar.offset)
    if inner.fileobj.read(tarfile.BLOCKSIZE).strip(b"\0"):
        raise tarfile.ReadError(f"a damaged header at byte {tar.offset:,}")


def _safe_name(path: str, info: tarfile.TarInfo) -> str | None:
    """The name of a regular file, or None for a folder."""
    parts = info.name.replace("\\", "/").split("/")
    if not info.name or parts[0] == "" or parts[0].endswith(":") or ".." in parts or "\0" in info.name:
        raise _refused(path, info.name, "a name that leads out of the archive; names must be relative, without '..'")
    if info.isdir():
        return None
    if info.issym() or info.islnk():
        raise _refused(path, info.name, f"a link to {info.linkname!a}; put the file itself there")
    if info.type not in (tarfile.REGTYPE, tarfile.AREGTYPE, tarfile.CONTTYPE) or info.issparse():
        raise _refused(path, info.name, "no regular file; only those are read")
    return "/".join(part for part in info.name.split("/") if part not in ("", "."))


def _refused(path: str, name: str, why: str) -> InputError:
    return InputError(f"{display_name(path)}::{display_name(name)}: {why}")


def shards_in(folder: str | Path) -> list[str]:
    """The archives directly in a folder, sorted."""
    names = sorted(entry.name for entry in os.scandir(folder) if not entry.name.startswith(".") and entry.is_file())
    return [os.path.join(folder, name) for name in names if is_tar(name)]
