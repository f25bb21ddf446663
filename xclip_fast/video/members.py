"""Files inside tar archives, read where they lie: nothing is extracted."""

from __future__ import annotations

import os
import tarfile
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import IO

from xclip_fast.errors import InputError
from xclip_fast.video.source import MAX_FILE_BYTES, CheckedFile, check_source, display_name

_CHUNK_BYTES = 1 << 20


@dataclass(frozen=True, slots=True)
class Member:
    """A file inside a tar archive: ``size`` bytes that begin ``offset`` bytes after the start of the archive.

    ``read_dataset`` lists those of an archive. Whatever reads a video file reads a member too.

    Example:
        >>> from xclip_fast.video import Member
        >>> str(Member("shard.tar", "0001.mp4", offset=512, size=9000))
        'shard.tar::0001.mp4'
    """

    tar: str
    name: str
    offset: int
    size: int

    def __str__(self) -> str:
        return f"{self.tar}::{self.name}"


Source = str | Member


def nameless_memory(size: int) -> int:
    """A descriptor of shared memory that is gone with the last process that holds it, however that ends."""
    if hasattr(os, "memfd_create"):
        memory = os.memfd_create("xclip_fast")
    else:
        with tempfile.TemporaryFile() as file:
            memory = os.dup(file.fileno())
    os.ftruncate(memory, size)
    return memory


@contextmanager
def opened(source: str | os.PathLike[str] | Member) -> Iterator[CheckedFile]:
    """A source under a path that decoders, and the processes they start, can open.

    Raises:
        InputError: as ``check_source``, or the member is not where it was listed.
    """
    if not isinstance(source, Member):
        yield check_source(source)
        return
    name = display_name(source)
    if source.size > MAX_FILE_BYTES:
        found = f"{source.size / 1024**3:.1f} GiB"
        raise InputError(f"{name}: {found}, at most {MAX_FILE_BYTES // 1024**3} are read; cut the video")
    # /proc/self would be another process for a decoder that runs in a child
    if os.path.isdir(f"/proc/{os.getpid()}/fd"):
        memory = nameless_memory(0)
        try:
            with open(memory, "wb", closefd=False) as file:
                _copy(source, name, file)
            yield check_source(f"/proc/{os.getpid()}/fd/{memory}", name)
        finally:
            os.close(memory)
    else:
        with tempfile.NamedTemporaryFile() as named:
            _copy(source, name, named)
            named.flush()
            yield check_source(named.name, name)


def _copy(source: Member, name: str, target: IO[bytes]) -> None:
    try:
        with open(source.tar, "rb") as tar:
            # the header in front of the bytes still says what it said: an archive written anew has others there
            tar.seek(source.offset - tarfile.BLOCKSIZE)
            found = tarfile.TarInfo.frombuf(tar.read(tarfile.BLOCKSIZE), "utf-8", "surrogateescape")
            left = source.size if found.size == source.size else -1
            while left > 0 and (chunk := tar.read(min(left, _CHUNK_BYTES))):
                target.write(chunk)
                left -= len(chunk)
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or "no such place in it"
        raise InputError(f"{name}: cannot be read ({reason}); give the archive it was listed from") from None
    except tarfile.TarError:
        left = -1
    if left:
        raise InputError(f"{name}: cannot be read (the archive changed since it was listed); list it again")
