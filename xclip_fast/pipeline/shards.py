"""Features of many files in shards with a manifest: a run that is killed goes on where it was, to the same bytes."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from xclip_fast.errors import InputError
from xclip_fast.files import LEFTOVER, file_digest, parse_json, replacing
from xclip_fast.pipeline.batches import BATCH_SIZE
from xclip_fast.pipeline.embedding import FileFeatures, embed_in_groups
from xclip_fast.pipeline.features import check_features_path, save_features
from xclip_fast.text.folder import digest
from xclip_fast.video.preprocess import get_preset

MANIFEST = "manifest.json"
FORMATS = ("safetensors", "parquet")
_FORMAT = "xclip_fast features 2"
_LOCK = ".lock"
_MAX_MANIFEST = 256 << 20
_DIGITS = 8  # that stand for the state of a file in the manifest, which a million files must not swell
_GONE = "-" * _DIGITS

_log = logging.getLogger("xclip_fast")
Report = Callable[[str, str | None], object]


@dataclass(frozen=True)
class Request:
    """What a folder of shards is asked to hold.

    paths: the files, known by name, size and time of last change.
    weights: SHA-256 of the model's weights, see ``weights_digest``.
    shard_size: files of a shard.
    format: "safetensors" or "parquet".
    settings: what else the model's answers depend on, ready for JSON: its configuration, dtype and kind of device.

    The others are those of ``embed_files``.

    Example:
        >>> from xclip_fast.pipeline import Request
        >>> Request(["a.mp4", "b.mp4"], weights="of the model", shard_size=1).described()["files"]
        2
    """

    paths: Sequence[str]
    weights: str
    shard_size: int = 1000
    format: str = "safetensors"
    settings: dict[str, Any] = field(default_factory=dict)
    batch_size: int = BATCH_SIZE
    patches: bool = False
    clips: int = 1
    crops: int = 1
    preset: str = "official"
    backend: str = "auto"

    def described(self) -> dict[str, Any]:
        """What the manifest says of it."""
        import xclip_fast

        names = digest(os.fsencode(path) for path in self.paths).hex()
        found = {
            **{key: value for key, value in asdict(self).items() if key != "paths"},
            "files": len(self.paths),
            "list of files": names,
            "preset": asdict(get_preset(self.preset)),
            "xclip_fast": xclip_fast.__version__,
            "torch": torch.__version__,
        }
        # as it reads back: tuples become lists
        described: dict[str, Any] = json.loads(json.dumps(found))
        return described


@dataclass(frozen=True)
class Written:
    """What a folder holds at the end: rows in all, and the files that could not be used.

    Example:
        >>> from xclip_fast.pipeline import Written
        >>> Written(rows=9, failed=1, width=512).rows
        9
    """

    rows: int
    failed: int
    width: int


def weights_digest(model: Any) -> str:
    """SHA-256 of names, shapes, dtypes and contents of a model's weights.

    Example:
        >>> from torch import nn
        >>> from xclip_fast.pipeline import weights_digest
        >>> len(weights_digest(nn.Linear(2, 2)))
        64
    """
    state = model.state_dict()
    return digest(part for name in sorted(state) for part in (name, state[name])).hex()


def embed_to_shards(
    model: Any,
    folder: str | Path,
    request: Request,
    report: Report = lambda path, error: None,
    **decoding: Any,
) -> Written:
    """Write the features of files to a folder, ``shard_size`` files to a shard.

    ``manifest.json`` there names each finished shard with its rows, SHA-256 and the files that could not be used. A
    shard or manifest appears whole or not at all. Called again with the same request, it checks the shards that are
    there, and computes those that are missing, damaged, or hold a file that has another size or time of change since,
    or was not there and now is. Features of files that are gone stay. The bytes are those of an undisturbed run as long
    as machine, number of threads and versions are the same, and the same files can be decoded.

    Args:
        model: as for ``embed_files``.
        folder: made where it is missing.
        request: what to compute.
        report: told each file once, in their order, with the reason where it cannot be used.
        decoding: ``workers`` and ``timeout`` of ``embed_files``.

    Raises:
        InputError: the folder holds something else or another request's features, another run writes to it, it cannot
            be written, or as ``embed_files``.
        ValueError: a number is out of range.

    Example:
        >>> from xclip_fast import Engine, XCLIPConfig, create_model
        >>> from xclip_fast.pipeline import Request, embed_to_shards, weights_digest
        >>> config = XCLIPConfig(image_size=32, patch_size=16, vision_width=64, vision_layers=1, embed_dim=64)
        >>> model = create_model(config)
        >>> request = Request(["clip.mp4", "none.mp4"], weights_digest(model), shard_size=1)
        >>> embed_to_shards(Engine(model), "shards", request)
        Written(rows=1, failed=1, width=64)
    """
    if request.shard_size < 1:
        raise ValueError(f"shard_size must be at least 1, found {request.shard_size}")
    if request.format not in FORMATS:
        raise InputError(f"unknown shard format {request.format!r}: choose one of {', '.join(FORMATS)}")
    target = _Folder(Path(folder), request)
    with target.locked():
        target.open()
        return target.fill(model, report, decoding)


class _Folder:
    def __init__(self, path: Path, request: Request) -> None:
        self.path, self.request = path, request
        self.described = request.described()
        size = request.shard_size
        self.groups = [request.paths[first : first + size] for first in range(0, len(request.paths), size)]
        self.shards: list[dict[str, Any] | None] = [None] * len(self.groups)

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Keep other runs out; the lock ends with the process, however that ends."""
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            lock = os.open(self.path / _LOCK, os.O_RDWR | os.O_CREAT | getattr(os, "O_NOFOLLOW", 0), 0o666)
        except (OSError, ValueError) as error:
            reason = getattr(error, "strerror", None) or "not a folder name"
            raise InputError(f"cannot write to the folder {str(self.path)!r}: {reason}: choose another") from None
        try:
            if not _lock(lock):
                raise InputError(f"another run writes to {str(self.path)!r}: wait for it, or choose another folder")
            yield
        finally:
            os.close(lock)

    def open(self) -> None:
        """Read the manifest, or begin one; remove what a killed run left, and look at each shard.

        Raises:
            InputError: the folder is not this request's.
        """
        check_features_path(self.path / self._name(0))
        names = os.listdir(self.path)
        for name in filter(LEFTOVER.fullmatch, names):
            (self.path / name).unlink(missing_ok=True)
        manifest = self.path / MANIFEST
        if MANIFEST not in names:
            if others := sorted(name for name in names if name != _LOCK and not LEFTOVER.fullmatch(name)):
                found = ascii(others[0])
                raise InputError(f"{str(self.path)!r} holds other files, such as {found}: choose a new folder")
            self._save()
            return
        try:
            with manifest.open("rb") as file:
                content = parse_json(file.read(_MAX_MANIFEST), repr(str(manifest)))
        except OSError as error:
            raise InputError(f"cannot read {str(manifest)!r}: {error.strerror}: choose another folder") from None
        self._check(content)
        for number, shard in enumerate(content["shards"]):
            if shard is not None and self._is_current(number, shard) and self._is_whole(number, shard):
                self.shards[number] = shard

    def fill(self, model: Any, report: Report, decoding: dict[str, Any]) -> Written:
        """Compute the shards that are missing."""
        missing = [number for number, shard in enumerate(self.shards) if shard is None]
        files = [path for number in missing for path in self.groups[number]]
        # before any is read: what changes from here on is seen by the next run
        states = {number: [_state(path) for path in self.groups[number]] for number in missing}
        ends = np.cumsum([len(self.groups[number]) for number in missing]) - 1
        request = self.request
        found = embed_in_groups(
            model,
            files,
            frozenset(ends.tolist()),
            batch_size=request.batch_size,
            patches=request.patches,
            clips=request.clips,
            crops=request.crops,
            preset=request.preset,
            backend=request.backend,
            **decoding,
        )
        try:
            for number, group in enumerate(self.groups):
                shard = self.shards[number]
                if shard is not None:
                    errors = {entry["place"]: entry["error"] for entry in shard["failed"]}
                    for place, path in enumerate(group):
                        report(path, errors.get(place))
                    continue
                results = []
                for path in group:
                    result = next(found)
                    report(path, None if result.error is None else str(result.error))
                    results.append(result)
                self.shards[number] = self._write(number, results) | {"states": "".join(states[number])}
                self._save()
        finally:
            found.close()  # type: ignore[attr-defined]
        done = [shard for shard in self.shards if shard is not None]
        return Written(
            rows=sum(shard["rows"] for shard in done),
            failed=sum(len(shard["failed"]) for shard in done),
            width=model.config.embed_dim,
        )

    def _name(self, number: int) -> str:
        return f"shard-{number:06d}.{self.request.format}"

    def _write(self, number: int, results: list[FileFeatures]) -> dict[str, Any]:
        failed = [
            {"place": place, "file": result.path, "error": str(result.error)}
            for place, result in enumerate(results)
            if result.error is not None
        ]
        good = [result for result in results if result.error is None]
        if not good:
            return {"file": None, "rows": 0, "sha256": None, "failed": failed}
        arrays = [
            torch.stack(rows).numpy()
            for rows in zip(
                *((row for row in (one.video, one.patches) if row is not None) for one in good), strict=True
            )
        ]
        path = self.path / self._name(number)
        save_features(path, [result.path for result in good], *arrays)
        return {"file": path.name, "rows": len(good), "sha256": file_digest(path), "failed": failed}

    def _save(self) -> None:
        content = {"format": _FORMAT, "request": self.described, "shards": self.shards}
        with replacing(self.path / MANIFEST) as temporary:
            temporary.write_text(json.dumps(content, indent=1) + "\n", encoding="ascii")

    def _check(self, content: dict[str, Any]) -> None:
        where = repr(str(self.path))
        if content.get("format") != _FORMAT or not isinstance(content.get("request"), dict):
            raise InputError(f"{where} holds a manifest of another kind: choose a new folder")
        there, here = content["request"], self.described
        for key in here | there:
            if there.get(key) != here.get(key):
                found = [_short(side.get(key)) for side in (there, here)]
                raise InputError(
                    f"{where} holds features of another run: {key} is {found[0]} there and {found[1]} here: "
                    "ask for the same, or choose a new folder"
                )
        shards = content.get("shards")
        sound = isinstance(shards, list) and len(shards) == len(self.groups)
        if not sound or not all(map(self._is_sound, range(len(self.groups)), shards or ())):
            raise InputError(f"the manifest of {where} is damaged: choose a new folder")

    def _is_sound(self, number: int, shard: Any) -> bool:
        if shard is None:
            return True
        if not isinstance(shard, dict) or shard.keys() != {"file", "rows", "sha256", "failed", "states"}:
            return False
        rows, failed, count = shard["rows"], shard["failed"], len(self.groups[number])
        if not isinstance(rows, int) or not isinstance(failed, list) or rows + len(failed) != count:
            return False
        if shard["file"] != (self._name(number) if rows else None):
            return False
        if not isinstance(shard["states"], str) or len(shard["states"]) != _DIGITS * count:
            return False
        return all(
            isinstance(entry, dict)
            and entry.get("place") in range(count)
            and self.groups[number][entry["place"]] == entry.get("file")
            and isinstance(entry.get("error"), str)
            for entry in failed
        )

    def _is_current(self, number: int, shard: dict[str, Any]) -> bool:
        for place, path in enumerate(self.groups[number]):
            before, now = shard["states"][_DIGITS * place : _DIGITS * (place + 1)], _state(path)
            if now not in (before, _GONE):
                change = "was not there" if before == _GONE else "was another file"
                _log.warning("%s %s in an earlier run: its shard is computed again", path, change)
                return False
        return True

    def _is_whole(self, number: int, shard: dict[str, Any]) -> bool:
        if shard["file"] is None:
            return True
        path = self.path / self._name(number)
        try:
            if path.is_file() and file_digest(path) == shard["sha256"]:
                return True
        except OSError:
            pass
        _log.warning("%s is missing or damaged: its files are computed again", path)
        return False


def _state(path: str) -> str:
    try:
        status = os.stat(path)
    except (OSError, ValueError):
        return _GONE
    return digest([f"{status.st_size} {status.st_mtime_ns}"]).hex()[:_DIGITS]


def _lock(file: int) -> bool:
    try:
        import fcntl
    except ImportError:
        # a system without such locks: the one who runs it sees to that
        return True
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _short(value: Any) -> str:
    text = ascii(value)
    return text if len(text) <= 40 else f"{text[:37]}..."
