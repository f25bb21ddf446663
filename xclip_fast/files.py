"""Files written whole or not at all, checks before the work, strict JSON; imports nothing heavy."""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from uuid import uuid4

from safetensors import SafetensorError

from xclip_fast.errors import InputError, one_line

# the temporary files of ``replacing`` that a killed process leaves
LEFTOVER = re.compile(r"\.[0-9a-f]{32}\.tmp")

_MAX_JSON = 1 << 20


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A temporary path in the folder of ``path`` that takes its place when the block ends without an exception.

    Raises:
        InputError: the file can't be written.
    """
    temporary = path.with_name(f".{uuid4().hex}.tmp")
    try:
        temporary.touch()
        mode = temporary.stat().st_mode  # safetensors makes files that only their owner can read
        yield temporary
        temporary.chmod(mode)
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except (OSError, RuntimeError, SafetensorError) as error:
        # torch.save and safetensors report a full disk by exceptions of their own
        raise InputError(f"cannot write {str(path)!r}: {one_line(error)}: make room or choose another place") from error
    finally:
        temporary.unlink(missing_ok=True)


def check_writable(path: str | Path) -> None:
    """Find out whether a file can be written or replaced before any work is done.

    Raises:
        InputError: its folder is missing or read-only, or it is something other than a file.
    """
    target = Path(os.path.realpath(path))
    if target.exists() and not target.is_file():
        raise InputError(f"cannot write {path}: it is not a file: give the name of a new one")
    if not target.parent.is_dir():
        raise InputError(f"cannot write {path}: there is no folder {target.parent}: make it first")
    if not os.access(target.parent, os.W_OK | os.X_OK):
        raise InputError(f"cannot write {path}: the folder {target.parent} is read-only: choose another")


def file_digest(path: Path) -> str:
    """The SHA-256 of a file, in hexadecimal."""
    total = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            total.update(block)
    return total.hexdigest()


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a small file.

    Raises:
        InputError: the file can't be read, is too long or holds something else.
    """
    try:
        with path.open("rb") as file:
            content = file.read(_MAX_JSON + 1)
    except OSError as error:
        raise InputError(f"cannot read {str(path)!r}: {error.strerror}") from error
    if len(content) > _MAX_JSON:
        raise InputError(f"{str(path)!r} is too long for a configuration: more than {_MAX_JSON} bytes")
    return parse_json(content, repr(str(path)))


def parse_json(content: bytes | str, where: str) -> dict[str, Any]:
    """A JSON object from text: no repeated keys, no NaN or infinity.

    Raises:
        InputError: it is something else.
    """

    def no_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        if len(pairs) != len({key for key, _ in pairs}):
            raise ValueError("a key occurs twice")
        return dict(pairs)

    def no_constant(name: str) -> None:
        raise ValueError(f"{name} is no number")

    try:
        value = json.loads(content, object_pairs_hook=no_repeats, parse_constant=no_constant)
    except (ValueError, RecursionError) as error:
        raise InputError(f"{where} is not valid JSON: {one_line(error)}") from error
    if not isinstance(value, dict):
        raise InputError(f"{where} must hold a JSON object, found {type(value).__name__}")
    return value
