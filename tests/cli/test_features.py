"""Feature files: round trips, refusals before any work, and nothing half-written."""

from __future__ import annotations

import importlib.util
import json
import os
from pathlib import Path

import numpy as np
import pytest

from xclip_fast.errors import InputError
from xclip_fast.pipeline import check_features_path, features, save_features

NAMES = ["a.mp4", "Straße, 日本.mp4", "new\nline.mp4", "bad\udcff.mp4"]
SAVED = [*NAMES[:3], "bad\\udcff.mp4"]
VIDEO = np.arange(12, dtype=np.float32).reshape(4, 3)
PATCHES = np.arange(24, dtype=np.float32).reshape(4, 2, 3)


def read(path: Path) -> tuple[list[str], dict[str, np.ndarray]]:
    if path.suffix == ".safetensors":
        from safetensors import safe_open

        with safe_open(path, framework="np") as opened:
            return json.loads(opened.metadata()["names"]), {key: opened.get_tensor(key) for key in opened.keys()}  # noqa: SIM118
    if path.suffix == ".npz":
        with np.load(path, allow_pickle=False) as opened:
            arrays = dict(opened)
        return arrays.pop("names").tolist(), arrays
    from pyarrow import parquet

    table = parquet.read_table(path)
    arrays = {}
    for field in table.schema:
        if field.name != "names":
            rows = np.stack(table[field.name].to_numpy())
            arrays[field.name] = rows.reshape(-1, *json.loads(field.metadata[b"shape"]))
    return table["names"].to_pylist(), arrays


@pytest.mark.parametrize("ending", features.FORMATS)
@pytest.mark.parametrize("patches", [None, PATCHES], ids=["video", "patches"])
def test_round_trip(ending: str, patches: np.ndarray | None, tmp_path: Path) -> None:
    path = tmp_path / f"features{ending}"
    path.write_bytes(b"older content is replaced")
    save_features(path, NAMES, VIDEO, patches)
    names, arrays = read(path)
    assert names == SAVED
    assert arrays.keys() == ({"video"} if patches is None else {"video", "patches"})
    np.testing.assert_array_equal(arrays["video"], VIDEO)
    assert arrays["video"].dtype == np.float32
    if patches is not None:
        np.testing.assert_array_equal(arrays["patches"], patches)
    assert os.listdir(tmp_path) == [path.name]


@pytest.mark.parametrize("ending", features.FORMATS)
@pytest.mark.parametrize(
    "fault", [KeyboardInterrupt, OSError(28, "No space left on device")], ids=["ctrl-c", "full disk"]
)
def test_a_failure_while_writing_leaves_what_was_there(
    ending: str, fault: BaseException | type[BaseException], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / f"features{ending}"
    path.write_bytes(b"older")

    def fail(temporary: Path, *_: object) -> None:
        temporary.write_bytes(b"half")
        raise fault

    monkeypatch.setattr(features, f"_write_{ending[1:]}", fail)
    expected = KeyboardInterrupt if fault is KeyboardInterrupt else InputError
    with pytest.raises(expected):
        save_features(path, NAMES, VIDEO)
    assert path.read_bytes() == b"older"
    assert os.listdir(tmp_path) == [path.name]


def test_a_link_is_written_through(tmp_path: Path) -> None:
    target, link = tmp_path / "target.npz", tmp_path / "link.npz"
    target.write_bytes(b"older")
    link.symlink_to(target)
    save_features(link, NAMES, VIDEO)
    assert link.is_symlink()
    assert read(target)[0] == SAVED


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("features", "must end in"),
        ("features.pt", "must end in"),
        ("folder.npz", "not a file"),
        ("fifo.npz", "not a file"),
        ("no/such/folder.npz", "no folder"),
    ],
)
def test_paths_that_cannot_be_written(name: str, words: str, tmp_path: Path) -> None:
    (tmp_path / "folder.npz").mkdir()
    os.mkfifo(tmp_path / "fifo.npz")
    with pytest.raises(InputError, match=words) as refused:
        check_features_path(tmp_path / name)
    assert "\n" not in str(refused.value)


def test_a_read_only_folder_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # the answer itself is faked: root may write anywhere
    monkeypatch.setattr(os, "access", lambda path, mode: Path(path) != tmp_path)
    with pytest.raises(InputError, match="read-only"):
        check_features_path(tmp_path / "f.npz")


def test_parquet_without_pyarrow_is_refused_before_any_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(InputError, match="pip install pyarrow"):
        check_features_path(tmp_path / "f.parquet")


def test_names_that_do_not_fit_the_rows(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="3 names do not fit video"):
        save_features(tmp_path / "f.npz", NAMES[:3], VIDEO)
    assert not os.listdir(tmp_path)
