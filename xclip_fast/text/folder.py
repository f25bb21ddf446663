"""An LRU cache of text features on disk, for the next run."""

from __future__ import annotations

import hashlib
import logging
import os
import re
import time
from collections.abc import Callable, Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from xclip_fast.errors import InputError
from xclip_fast.files import LEFTOVER, replacing

MAX_FOLDER_BYTES = 4 << 30
_ENTRY = re.compile(r"[0-9a-f]{64}\.safetensors")
_LEFTOVER_SECONDS = 3600  # nobody writes that long
_HEADER_BYTES = 1 << 10

_log = logging.getLogger("xclip_fast")


class TextFolder:
    """An LRU cache of text features in files.

    Several processes and threads may share a folder: a file appears whole or not at all. One that is damaged counts as
    missing, and where nothing can be written the features are computed each time, with a warning.

    Args:
        path: the folder; it is made where it is missing. Other files in it are left alone.
        max_bytes: the most its files take.

    Raises:
        InputError: there can be no such folder.
    """

    def __init__(self, path: str | os.PathLike[str], max_bytes: int = MAX_FOLDER_BYTES) -> None:
        self.path, self.max_bytes = Path(path), max_bytes
        try:
            self.path.mkdir(parents=True, exist_ok=True)
        except (OSError, ValueError) as error:
            reason = getattr(error, "strerror", None) or "not a folder name"
            raise InputError(f"cannot keep texts in {str(path)!r}: {reason}: give another folder") from None

    def get(self, key: bytes, encode: Callable[[], Tensor]) -> Tensor:
        """The features kept under a key, on the CPU, or else what ``encode`` gives, which is kept.

        Args:
            key: 32 bytes that stand for all the features depend on, see ``digest``.
            encode: computes the features.
        """
        file = self.path / f"{key.hex()}.safetensors"
        features = _read(file, key, self.max_bytes)
        if features is not None:
            # its place in the order of use; a folder for all may be read-only
            with suppress(OSError):
                os.utime(file)
            return features
        features = encode()
        if features.nbytes <= self.max_bytes:
            self._write(file, key, features)
        return features

    def _write(self, file: Path, key: bytes, features: Tensor) -> None:
        from safetensors.torch import save_file

        kept = features.detach().cpu().contiguous()
        try:
            with replacing(file) as temporary:
                save_file({"features": kept, "sha256": _checksum(key, kept)}, temporary)
        except InputError as error:
            _log.warning("texts are not kept for the next run: %s", error)
        self._shrink()

    def _shrink(self) -> None:
        found = []
        # other processes may remove files at the same time
        with suppress(OSError), os.scandir(self.path) as entries:
            for entry in entries:
                with suppress(OSError):
                    status = entry.stat(follow_symlinks=False)
                    if _ENTRY.fullmatch(entry.name):
                        found.append((status.st_mtime, status.st_size, entry.path))
                    elif LEFTOVER.fullmatch(entry.name) and status.st_mtime < time.time() - _LEFTOVER_SECONDS:
                        os.unlink(entry.path)
        taken = sum(size for _, size, _ in found)
        for _, size, path in sorted(found):
            if taken <= self.max_bytes:
                break
            with suppress(OSError):
                os.unlink(path)
            taken -= size


def digest(parts: Iterable[bytes | str | Tensor]) -> bytes:
    """SHA-256 of a sequence of texts, bytes and tensors; of a tensor, its dtype, shape and contents."""
    total = hashlib.sha256()
    for part in parts:
        if isinstance(part, Tensor):
            total.update(repr((part.dtype, tuple(part.shape))).encode())
            data: Any = _bytes(part).numpy()
        else:
            data = part.encode() if isinstance(part, str) else part
        # lengths keep neighbours apart
        total.update(len(data).to_bytes(8, "little"))
        total.update(data)
    return total.digest()


def _bytes(tensor: Tensor) -> Tensor:
    return tensor.detach().cpu().contiguous().flatten().view(torch.uint8)


def _checksum(key: bytes, features: Tensor) -> Tensor:
    return torch.frombuffer(bytearray(digest([key, features])), dtype=torch.uint8)


def _read(file: Path, key: bytes, max_bytes: int) -> Tensor | None:
    from safetensors import SafetensorError
    from safetensors.torch import load

    try:
        # a pipe would wait for ever
        if not file.is_file():
            return None
        with file.open("rb") as opened:
            found = load(opened.read(max_bytes + _HEADER_BYTES))
        if torch.equal(found["sha256"], _checksum(key, found["features"])):
            return found["features"]
    except (OSError, SafetensorError, KeyError, ValueError, RuntimeError, TypeError, AttributeError):
        pass
    _log.warning("%s is damaged: its texts are encoded again", file)
    return None
