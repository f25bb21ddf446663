"""Which files are read at all: regular local files of a known video container, within the caps below."""

from __future__ import annotations

import os
import stat
from dataclasses import dataclass

from xclip_fast.errors import InputError

MAX_FILE_BYTES = 2 * 1024**3
MAX_SIDE = 8192  # pixels
MAX_ASPECT = 32  # long side over short side: a resize by the short side grows with it
MAX_FRAMES = 100_000
MAX_SECONDS = 4 * 3600

READABLE = "mp4, mov, mkv, webm, avi, mpg or ts"
_HEAD_BYTES = 1024
_FIRST_BOXES = (b"ftyp", b"moov", b"mdat", b"free", b"skip", b"wide", b"pnot")
_IMAGE_BRANDS = (b"avif", b"avis", b"heic", b"heix", b"hevc", b"heim", b"heis", b"mif1", b"msf1")
_OTHER_FILES = (
    (b"\x89PNG", "a PNG image"),
    (b"\xff\xd8\xff", "a JPEG image"),
    (b"GIF8", "a GIF image"),
    (b"BM", "a BMP image"),
    (b"#EXTM3U", "a playlist"),
    (b"ffconcat", "a playlist"),
    (b"<", "a text file"),
    (b"ID3", "an audio file"),
    (b"fLaC", "an audio file"),
    (b"OggS", "an Ogg file"),
    (b"FLV", "a Flash video"),
    (b"\x30\x26\xb2\x75", "a Windows Media file"),
    (b"PK\x03\x04", "a zip archive"),
)


@dataclass(frozen=True)
class CheckedFile:
    """A file that may be opened: its absolute path and its container, by the name FFmpeg gives it.

    ``name`` is how messages call it: the path as the user wrote it, quoted when it would not print on one line.
    """

    path: str
    name: str
    container: str


def display_name(source: object) -> str:
    """What messages call a path or member: as the user wrote it, quoted where it would not print on one line."""
    text = os.fsdecode(source) if isinstance(source, str | bytes | os.PathLike) else str(source)
    return text if text and text.isprintable() else ascii(text)


def check_source(path: str | os.PathLike[str], name: str | None = None) -> CheckedFile:
    """Look at a file before any decoder sees it; ``name`` is how messages call it, by default its path.

    An absolute path can't be read as a protocol ("concat:…", "http:…"), and only a container found by its first bytes
    is let through, so a playlist that names other files never reaches a decoder.

    Raises:
        InputError: the file is missing, unreadable, not a regular file, empty, too large, or not a video container.
    """
    text = os.fsdecode(path)
    name = display_name(text) if name is None else name
    try:
        head = _read_head(text, name)
    except (OSError, UnicodeError) as error:
        reason = getattr(error, "strerror", None) or "not a file name"
        raise InputError(f"{name}: cannot be read ({reason}); give the path of a local video file") from None
    container = _container(head)
    if container is None:
        raise InputError(f"{name}: not a video, found {_describe(head)}; give a file in {READABLE} format")
    return CheckedFile(path=os.path.abspath(text), name=name, container=container)


def check_picture(name: str, width: int, height: int) -> None:
    """Raise InputError when a picture is empty, too large or too long and thin to be resized safely."""
    if min(width, height) < 1:
        raise InputError(f"{name}: its pictures have no size or over {MAX_SIDE} pixels a side; give another file")
    if max(width, height) > MAX_SIDE:
        raise InputError(f"{name}: {width}x{height} pixels, at most {MAX_SIDE} a side are read; scale the video down")
    if max(width, height) > MAX_ASPECT * min(width, height):
        raise InputError(f"{name}: {width}x{height} pixels, sides beyond 1:{MAX_ASPECT} are not read; crop the video")


def check_length(name: str, frames: int, seconds: float) -> None:
    """Raise InputError when a video has no frame, too many, or lasts too long."""
    if frames < 1:
        raise InputError(f"{name}: its video stream holds no frame; the file is empty or damaged, make it again")
    if frames > MAX_FRAMES:
        raise InputError(f"{name}: more than {MAX_FRAMES:,} frames; cut the video into shorter ones")
    if seconds > MAX_SECONDS:
        raise InputError(f"{name}: {seconds / 3600:.1f} hours long, at most {MAX_SECONDS // 3600} are read; cut it")


def _read_head(path: str, name: str) -> bytes:
    if "\0" in path:
        raise InputError(f"{name}: not a file name; give the path of a local video file")
    found = os.stat(path)
    if stat.S_ISDIR(found.st_mode):
        raise InputError(f"{name}: a folder, not a file; give the path of a video file")
    if not stat.S_ISREG(found.st_mode):
        raise InputError(f"{name}: a pipe or device, not a regular file; save the video to a file first")
    if found.st_size == 0:
        raise InputError(f"{name}: an empty file; give a video file")
    if found.st_size > MAX_FILE_BYTES:
        size = found.st_size / 1024**3
        raise InputError(f"{name}: {size:.1f} GiB, at most {MAX_FILE_BYTES // 1024**3} are read; cut the video")
    with open(path, "rb") as file:
        return file.read(_HEAD_BYTES)


def _container(head: bytes) -> str | None:
    if head[4:8] in _FIRST_BOXES:
        return None if head[4:8] == b"ftyp" and head[8:12] in _IMAGE_BRANDS else "mov"
    if head.startswith(b"\x1aE\xdf\xa3"):
        return "matroska"
    if head.startswith(b"RIFF") and head[8:12] == b"AVI ":
        return "avi"
    if head.startswith(b"\0\0\1\xba"):
        return "mpeg"
    if any(head[start : start + 2 * step + 1 : step] == b"GGG" for start, step in ((0, 188), (4, 192))):
        return "mpegts"
    return None


def _describe(head: bytes) -> str:
    for magic, name in _OTHER_FILES:
        if head.startswith(magic):
            return name
    if head.startswith(b"RIFF"):
        return {b"WAVE": "an audio file", b"WEBP": "a WebP image"}.get(head[8:12], "an unknown RIFF file")
    if head[4:8] == b"ftyp":
        return "a HEIF or AVIF image"
    # a multi-byte character may be cut at the end of what was read
    text = head.decode("utf-8", errors="ignore") if b"\0" not in head else ""
    if len(text.encode()) > 0.9 * len(head):
        return "a text file"
    return "an unknown format"
