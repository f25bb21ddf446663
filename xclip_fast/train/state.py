"""Checkpoints of a run: whole folders with digests; the newest one that is valid is gone on from."""

from __future__ import annotations

import json
import logging
import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from uuid import uuid4

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from xclip_fast.errors import InputError, one_line
from xclip_fast.files import file_digest, read_json

_VERSION = 1
_STATE, _SUMS = "state.json", "SHA256SUMS"
_BEGIN, _UNFINISHED = "step-", ".unfinished-"

_log = logging.getLogger("xclip_fast")


@dataclass(frozen=True)
class Saved:
    """A valid checkpoint.

    Attributes:
        path: its folder.
        step: optimizer steps made.
        facts: what was written beside the tensors.
    """

    path: Path
    step: int
    facts: dict[str, Any]

    def read(self, name: str) -> dict[str, Tensor]:
        """The tensors of one of its files."""
        return load_file(self.path / f"{name}.safetensors")


def save_checkpoint(
    folder: Path, step: int, tensors: dict[str, dict[str, Tensor]], facts: dict[str, Any], keep: int
) -> Path:
    """Write a checkpoint, which appears whole or not at all, and remove all but the newest ones.

    Args:
        folder: of all checkpoints of a run; made if needed.
        step: optimizer steps made.
        tensors: what to write, by the name of its file.
        facts: ready for JSON.
        keep: how many checkpoints stay, this one included.

    Returns:
        the checkpoint's folder.

    Raises:
        InputError: it cannot be written; those that were there are left as they are.
    """
    target = folder / f"{_BEGIN}{step:010}"
    unfinished = folder / f"{_UNFINISHED}{uuid4().hex}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        unfinished.mkdir()
        for name, content in tensors.items():
            save_file(content, unfinished / f"{name}.safetensors")
        state = {"version": _VERSION, "step": step, "facts": facts}
        (unfinished / _STATE).write_text(json.dumps(state, indent=2, allow_nan=False) + "\n", encoding="utf-8")
        # as sha256sum writes it and checks it
        sums = "".join(f"{file_digest(path)}  {path.name}\n" for path in sorted(unfinished.iterdir()))
        (unfinished / _SUMS).write_text(sums, encoding="ascii")
        for path in unfinished.iterdir():
            _to_disk(path)
        _to_disk(unfinished)
        if target.exists():
            # an invalid one of the same step: a resumed run has come here again
            shutil.rmtree(target)
        unfinished.rename(target)
        _to_disk(folder)
    except (OSError, SafetensorError) as error:
        raise InputError(
            f"the checkpoint of step {step} cannot be written to {str(folder)!r} ({one_line(error)}): "
            "make room, then go on with --resume from the one before"
        ) from error
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
    for _, old in _found(folder)[keep:]:
        shutil.rmtree(old, ignore_errors=True)
    return target


def newest_checkpoint(folder: Path) -> Saved | None:
    """The newest checkpoint whose files are what they were when it was written, or None.

    One that is not is left where it is, and a warning names it. What killed runs left unfinished is removed.
    """
    for path in folder.glob(f"{_UNFINISHED}*"):
        shutil.rmtree(path, ignore_errors=True)
    for step, path in _found(folder):
        try:
            return Saved(path, step, _checked(path, step))
        except InputError as error:
            _log.warning("%s: going on from an older one", error)
    return None


def _found(folder: Path) -> list[tuple[int, Path]]:
    """Checkpoints by step, the newest first."""
    names = ((path.name.removeprefix(_BEGIN), path) for path in folder.glob(f"{_BEGIN}*"))
    return sorted(((int(number), path) for number, path in names if number.isdecimal()), reverse=True)


def _checked(path: Path, step: int) -> dict[str, Any]:
    try:
        lines = [line.split("  ", 1) for line in (path / _SUMS).read_text("ascii").splitlines()]
        listed = {name: digest for digest, name in lines}
        found = {file.name: file_digest(file) for file in path.iterdir() if file.name != _SUMS}
    except (OSError, ValueError) as error:
        raise InputError(f"the checkpoint {str(path)!r} is damaged ({one_line(error)})") from None
    if wrong := sorted(name for name in {**listed, **found} if listed.get(name) != found.get(name)):
        raise InputError(f"the checkpoint {str(path)!r} is damaged ({one_line(wrong[0])} has another SHA-256)")
    state = read_json(path / _STATE)
    facts = state.get("facts")
    if state.get("version") != _VERSION or state.get("step") != step or not isinstance(facts, dict):
        raise InputError(f"the checkpoint {str(path)!r} is of another version, or another step by its name")
    return facts


def _to_disk(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def same_settings(now: dict[str, Any], then: dict[str, Any], prefix: str = "") -> str | None:
    """The first key in which two nested settings differ, or None.

    Example:
        >>> from xclip_fast.train.state import same_settings
        >>> same_settings({"run": {"seed": 1}}, {"run": {"seed": 2}})
        'run.seed'
    """
    for key in {**now, **then}:
        left, right = now.get(key), then.get(key)
        if isinstance(left, dict) and isinstance(right, dict):
            if found := same_settings(left, right, f"{prefix}{key}."):
                return found
        elif left != right:
            return f"{prefix}{key}"
    return None
