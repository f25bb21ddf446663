"""Tar archives for the tests, honest and hostile."""

from __future__ import annotations

import io
import tarfile
from collections.abc import Mapping
from pathlib import Path


def write_tar(path: Path, files: Mapping[str, bytes | Path], **options: int) -> Path:
    """An archive of these files, in this order."""
    with tarfile.open(path, "w", **options) as tar:
        for name, content in files.items():
            add(tar, name, content.read_bytes() if isinstance(content, Path) else content)
    return path


def add(tar: tarfile.TarFile, name: str, content: bytes = b"", **fields: object) -> None:
    """Append a member with any header."""
    info = tarfile.TarInfo(name)
    info.size = len(content)
    for field, value in fields.items():
        setattr(info, field, value)
    tar.addfile(info, io.BytesIO(content))
