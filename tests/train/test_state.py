"""Checkpoints: whole or not there, damage always seen, the newest valid one wins, room is kept."""

from __future__ import annotations

import errno
import os
import random
from pathlib import Path
from typing import Any

import pytest
import torch

from xclip_fast import InputError
from xclip_fast.train import state
from xclip_fast.train.state import newest_checkpoint, same_settings, save_checkpoint


def save(folder: Path, step: int, keep: int = 9) -> Path:
    tensors = {"model": {"weight": torch.full((3,), float(step))}, "trainer": {"moment": torch.arange(5.0)}}
    return save_checkpoint(folder, step, tensors, {"loss": 0.5}, keep)


def test_what_was_written_is_read(tmp_path: Path) -> None:
    folder = tmp_path / "checkpoints"
    assert newest_checkpoint(folder) is None
    for step in (1, 2, 10):
        save(folder, step)
    found = newest_checkpoint(folder)
    assert found is not None
    assert (found.step, found.facts) == (10, {"loss": 0.5})
    assert found.read("model")["weight"].tolist() == [10, 10, 10]
    assert sorted(path.name for path in found.path.iterdir()) == [
        "SHA256SUMS",
        "model.safetensors",
        "state.json",
        "trainer.safetensors",
    ]


def test_the_newest_stay(tmp_path: Path) -> None:
    for step in range(1, 6):
        save(tmp_path, step, keep=2)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-0000000004", "step-0000000005"]


def test_every_flipped_bit_is_seen(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    rng = random.Random(0)
    save(tmp_path, 1)
    newest = save(tmp_path, 2)
    for file in sorted(newest.iterdir()):
        whole = file.read_bytes()
        places = rng.sample(range(len(whole)), min(20, len(whole)))
        for place in places:
            file.write_bytes(whole[:place] + bytes([whole[place] ^ 1 << rng.randrange(8)]) + whole[place + 1 :])
            found = newest_checkpoint(tmp_path)
            assert found is not None
            assert found.step == 1, (file.name, place)
        file.write_bytes(whole)
    assert "damaged" in caplog.text
    assert "going on from an older one" in caplog.text
    found = newest_checkpoint(tmp_path)
    assert found is not None
    assert found.step == 2


@pytest.mark.parametrize("damage", ["cut", "missing", "sums", "more", "empty", "renamed"])
def test_damage_of_other_kinds(tmp_path: Path, damage: str) -> None:
    save(tmp_path, 1)
    newest = save(tmp_path, 2)
    if damage == "cut":
        os.truncate(newest / "trainer.safetensors", 20)
    elif damage == "missing":
        (newest / "model.safetensors").unlink()
    elif damage == "sums":
        (newest / "SHA256SUMS").unlink()
    elif damage == "more":
        (newest / "more.safetensors").write_bytes(b"x")
    elif damage == "empty":
        for file in newest.iterdir():
            file.unlink()
    else:
        newest.rename(tmp_path / "step-0000000003")
    found = newest_checkpoint(tmp_path)
    assert found is not None
    assert found.step == 1


def test_unfinished_ones_are_removed_and_never_taken(tmp_path: Path) -> None:
    save(tmp_path, 1)
    (tmp_path / ".unfinished-0").mkdir()
    (tmp_path / ".unfinished-0" / "model.safetensors").write_bytes(b"half")
    found = newest_checkpoint(tmp_path)
    assert found is not None
    assert found.step == 1
    assert [path.name for path in tmp_path.iterdir()] == ["step-0000000001"]


@pytest.mark.parametrize("call", range(14))
def test_a_full_disk_leaves_what_was_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: int) -> None:
    """The disk is full at the n-th call that writes: each in turn, until saving succeeds."""
    save(tmp_path, 1)
    calls = 0

    def counted(function: Any) -> Any:
        def run(*arguments: Any, **options: Any) -> Any:
            nonlocal calls
            calls += 1
            if calls == call + 1:
                raise OSError(errno.ENOSPC, "No space left on device")
            return function(*arguments, **options)

        return run

    for owner, name in ((state, "save_file"), (Path, "write_text"), (os, "fsync"), (Path, "mkdir"), (Path, "rename")):
        monkeypatch.setattr(owner, name, counted(getattr(owner, name)))
    error = None
    try:
        save(tmp_path, 2)
    except InputError as raised:
        error = raised
    monkeypatch.undo()
    found = newest_checkpoint(tmp_path)
    assert found is not None
    if error is None:
        # fewer calls than that write anything
        assert calls <= call
        assert found.step == 2
    else:
        assert "the checkpoint of step 2 cannot be written" in str(error)
        assert "No space left on device" in str(error)
        # whole, or as it was
        assert found.step == (1 if not (tmp_path / "step-0000000002").exists() else 2)
    assert not list(tmp_path.glob(".unfinished*"))


def test_settings_are_compared_key_by_key() -> None:
    now = {"run": {"seed": 1, "keep": 2}, "data": {"train": "a"}}
    assert same_settings(now, now) is None
    assert same_settings(now, {**now, "data": {"train": "b"}}) == "data.train"
    assert same_settings(now, {**now, "more": 1}) == "more"
    assert same_settings({"a": {}}, {"a": {"b": 1}}) == "a.b"
