"""``xclip-fast embed --shard-size``: whatever stops a run, the next one ends with the same bytes."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import signal
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from cli_support import TINY, Cli, one_line, write_video
from safetensors import safe_open

from xclip_fast import InputError, create_model
from xclip_fast.cli import console, main
from xclip_fast.files import LEFTOVER
from xclip_fast.pipeline import embed_files, shards
from xclip_fast.pipeline.shards import MANIFEST, Request, embed_to_shards, weights_digest

SLOW = """
import os, sys, time
here = os.path.dirname(os.path.dirname(__file__))
sys.path.remove(here)
del sys.modules["av"]
import av
sys.path.insert(0, here)
original = av.open

def open(*arguments, **settings):
    time.sleep(0.2)
    return original(*arguments, **settings)

av.open = open
"""


@pytest.fixture(scope="module")
def model() -> Any:
    return create_model(TINY, seed=0)


@pytest.fixture(scope="module")
def paths(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Ten files; 3, 4 and 5 are no videos, and some names are odd."""
    folder = tmp_path_factory.mktemp("videos")
    rng = np.random.default_rng(0)
    names = [
        "a.mp4",
        "new\nline.mp4",
        os.fsdecode(b"bad\xff.mp4"),
        "3",
        "4",
        "5",
        "-x.mp4",
        "日本.mp4",
        "8.mp4",
        "9.mp4",
    ]
    for place, name in enumerate(names):
        if place not in (3, 4, 5):
            write_video(folder / "plain.mp4", rng.integers(256, size=(6, 48, 64, 3), dtype=np.uint8))
            os.replace(folder / "plain.mp4", folder / name)
        else:
            (folder / name).write_text("no video")
    return [str(folder / name) for name in names]


def request_for(model: Any, paths: list[str], **changes: Any) -> Request:
    made = Request(paths, weights_digest(model), shard_size=3, batch_size=2, clips=2, settings={"dtype": "float32"})
    return replace(made, **changes)


def contents(folder: Path) -> dict[str, bytes]:
    return {entry.name: entry.read_bytes() for entry in folder.iterdir()}


@pytest.fixture(scope="module")
def undisturbed(model: Any, paths: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("undisturbed") / "out"
    written = embed_to_shards(model, folder, request_for(model, paths), workers=0)
    assert (written.rows, written.failed, written.width) == (7, 3, 64)
    return folder


def finish(model: Any, paths: list[str], folder: Path, **changes: Any) -> list[tuple[str, bool]]:
    """Run again; what was reported of each file."""
    told: list[tuple[str, bool]] = []
    request = request_for(model, paths, **changes)
    embed_to_shards(model, folder, request, lambda path, error: told.append((path, error is None)), workers=0)
    return told


def test_the_manifest_names_every_shard_and_every_file_left_out(
    model: Any, paths: list[str], undisturbed: Path
) -> None:
    manifest = json.loads((undisturbed / MANIFEST).read_text())
    assert [shard["rows"] for shard in manifest["shards"]] == [3, 0, 3, 1]
    assert [shard["file"] for shard in manifest["shards"]] == [
        "shard-000000.safetensors",
        None,
        "shard-000002.safetensors",
        "shard-000003.safetensors",
    ]
    assert [entry["file"] for entry in manifest["shards"][1]["failed"]] == paths[3:6]
    assert manifest["request"]["weights"] == weights_digest(model)
    assert manifest["request"]["preset"]["mean"] == pytest.approx([0.485, 0.456, 0.406])
    names, rows = [], []
    for shard in manifest["shards"]:
        if shard["file"] is None:
            continue
        data = (undisturbed / shard["file"]).read_bytes()
        assert hashlib.sha256(data).hexdigest() == shard["sha256"]
        with safe_open(undisturbed / shard["file"], framework="pt") as opened:
            names += json.loads(opened.metadata()["names"])
            rows.append(opened.get_tensor("video"))
    good = [one for one in embed_files(model, paths, clips=2, workers=0) if one.error is None]
    assert names == [one.path.encode("utf-8", "backslashreplace").decode() for one in good]
    torch.testing.assert_close(torch.cat(rows), torch.stack([one.video for one in good]), rtol=1e-4, atol=1e-5)
    assert set(os.listdir(undisturbed)) == {".lock", MANIFEST, *(s["file"] for s in manifest["shards"] if s["file"])}


@pytest.mark.parametrize("changes", [{"format": "parquet", "patches": True}, {"patches": True}, {"shard_size": 100}])
def test_two_runs_write_the_same_bytes(changes: dict[str, Any], model: Any, paths: list[str], tmp_path: Path) -> None:
    for name in ("one", "two"):
        finish(model, paths, tmp_path / name, **changes)
    assert contents(tmp_path / "one") == contents(tmp_path / "two")
    assert len(contents(tmp_path / "one")) == (3 if "shard_size" in changes else 5)


def killed_at(step: int, work: Callable[[], object]) -> bool:
    """Do the work in a process that is killed before its n-th change of the disk; False when it got through."""
    pid = os.fork()
    if not pid:
        try:
            count = 0

            def counted(change: Callable[..., Any], *arguments: Any, **settings: Any) -> Any:
                nonlocal count
                count += 1
                if count > step:
                    os.kill(os.getpid(), signal.SIGKILL)
                return change(*arguments, **settings)

            from xclip_fast.pipeline import features

            for place, name in (
                (os, "replace"),
                (os, "fsync"),
                (Path, "touch"),
                (Path, "mkdir"),
                (Path, "write_text"),
                (Path, "unlink"),
                (features, "_write_safetensors"),
            ):
                setattr(place, name, _counting(getattr(place, name), counted))
            work()
            os._exit(0)
        finally:
            os._exit(1)
    code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    assert code in (0, -signal.SIGKILL)
    return code != 0


def _counting(change: Callable[..., Any], counted: Callable[..., Any]) -> Callable[..., Any]:
    # a function, so that it also works as a method
    return lambda *arguments, **settings: counted(change, *arguments, **settings)


@pytest.mark.slow
def test_killed_before_any_change_of_the_disk(model: Any, paths: list[str], tmp_path: Path) -> None:
    # the second of three shards holds no row
    work = partial(finish, model, [paths[0], paths[3], paths[6]], shard_size=1)
    work(tmp_path / "whole")
    expected, step = contents(tmp_path / "whole"), 0
    while killed_at(step, partial(work, tmp_path / str(step))):
        folder = tmp_path / str(step)
        if folder.exists():
            # nothing is half there: what the manifest names is whole
            found = contents(folder)
            for shard in json.loads(found.get(MANIFEST, b'{"shards": []}'))["shards"]:
                if shard is not None and shard["file"] is not None:
                    assert hashlib.sha256(found[shard["file"]]).hexdigest() == shard["sha256"]
        if step % 4 == 0:
            # and once more, in the middle of the next run
            killed_at(step // 2, partial(work, folder))
        work(folder)
        assert contents(folder) == expected, step
        step += 1
    assert step > 25
    assert contents(tmp_path / str(step)) == expected


def test_a_finished_run_computes_nothing(
    model: Any, paths: list[str], undisturbed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "out"
    shutil.copytree(undisturbed, folder)
    monkeypatch.setattr("xclip_fast.pipeline.batches._Batches.add", lambda *_: pytest.fail("it is all there"))
    before = {entry.name: entry.stat().st_mtime_ns for entry in folder.iterdir()}
    told = finish(model, paths, folder)
    assert told == [(path, place not in (3, 4, 5)) for place, path in enumerate(paths)]
    assert {entry.name: entry.stat().st_mtime_ns for entry in folder.iterdir()} == before


def lost(shard: Path) -> None:
    shard.unlink()


def cut(shard: Path) -> None:
    shard.write_bytes(shard.read_bytes()[:-1])


def one_bit(shard: Path) -> None:
    data = bytearray(shard.read_bytes())
    data[-1] ^= 1
    shard.write_bytes(data)


def a_folder(shard: Path) -> None:
    shard.unlink()
    shard.mkdir()


@pytest.mark.parametrize("damage", [lost, cut, one_bit])
def test_a_shard_that_is_damaged_is_made_again(
    damage: Callable[[Path], None],
    model: Any,
    paths: list[str],
    undisturbed: Path,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    folder = tmp_path / "out"
    shutil.copytree(undisturbed, folder)
    damage(folder / "shard-000002.safetensors")
    other = folder / "shard-000000.safetensors"
    before = other.stat().st_mtime_ns
    assert [path for path, _ in finish(model, paths, folder)] == paths
    assert "missing or damaged" in caplog.text
    assert contents(folder) == contents(undisturbed)
    assert other.stat().st_mtime_ns == before


@pytest.fixture
def copies(paths: list[str], tmp_path: Path) -> list[str]:
    """Six files of which a test may change some; 3 to 5 are no videos."""
    folder = tmp_path / "copies"
    folder.mkdir()
    for place, path in enumerate(paths[:6]):
        shutil.copy2(path, folder / str(place))
    return [str(folder / str(place)) for place in range(6)]


def other_content(path: str, source: str) -> None:
    shutil.copyfile(source, path)


def other_time_alone(path: str, source: str) -> None:
    size, before = os.path.getsize(path), os.stat(path).st_mtime_ns
    os.utime(path, ns=(before, before + 1))
    assert os.path.getsize(path) == size


def other_size_alone(path: str, source: str) -> None:
    before = os.stat(path).st_mtime_ns
    shutil.copyfile(source, path)
    os.utime(path, ns=(before, before))


@pytest.mark.parametrize("change", [other_content, other_time_alone, other_size_alone])
@pytest.mark.parametrize("place", [1, 4])
def test_a_file_that_changed_has_its_shard_computed_again(
    change: Callable[[str, str], None],
    place: int,
    model: Any,
    paths: list[str],
    copies: list[str],
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    folder = tmp_path / "out"
    told = finish(model, copies, folder)
    assert [good for _, good in told] == [True] * 3 + [False] * 3
    other = folder / "shard-000000.safetensors"
    before = other.stat().st_mtime_ns
    change(copies[place], paths[6])
    told = finish(model, copies, folder)
    assert told[place] == (copies[place], place == 1 or change is not other_time_alone)
    assert caplog.text.count("computed again") == 1
    assert f"{copies[place]} was another file in an earlier run" in caplog.text
    assert (other.stat().st_mtime_ns == before) == (place == 4)
    # as though the files had always been so
    finish(model, copies, tmp_path / "fresh")
    assert contents(folder) == contents(tmp_path / "fresh")
    caplog.clear()
    finish(model, copies, folder)
    assert not caplog.text


def test_features_of_a_file_that_is_gone_stay_and_one_that_comes_back_is_read(
    model: Any, copies: list[str], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = tmp_path / "out"
    finish(model, copies, folder)
    before = contents(folder)
    os.rename(copies[0], copies[0] + "x")
    os.rename(copies[3], copies[3] + "x")
    assert finish(model, copies, folder)[0] == (copies[0], True)
    assert contents(folder) == before
    assert not caplog.text
    # a run that never saw it says so, and looks again
    assert finish(model, copies, tmp_path / "other")[0] == (copies[0], False)
    os.rename(copies[0] + "x", copies[0])
    os.rename(copies[3] + "x", copies[3])
    assert finish(model, copies, tmp_path / "other")[0] == (copies[0], True)
    assert f"{copies[0]} was not there in an earlier run" in caplog.text
    assert contents(tmp_path / "other") == before


def test_a_change_while_a_run_reads_is_seen_by_the_next(model: Any, copies: list[str], tmp_path: Path) -> None:
    folder = tmp_path / "out"

    def rewrite(path: str, error: str | None) -> None:
        if path == copies[2]:
            other_time_alone(path, "")

    request = request_for(model, copies)
    embed_to_shards(model, folder, request, rewrite, workers=0)
    first = json.loads((folder / MANIFEST).read_text())["shards"][0]["states"]
    finish(model, copies, folder)
    again = json.loads((folder / MANIFEST).read_text())["shards"][0]["states"]
    assert first[:16] == again[:16]
    assert first[16:] != again[16:]


def test_a_folder_in_the_place_of_a_shard_is_one_line(
    model: Any, paths: list[str], undisturbed: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "out"
    shutil.copytree(undisturbed, folder)
    a_folder(folder / "shard-000002.safetensors")
    with pytest.raises(InputError, match="not a file") as refused:
        finish(model, paths, folder)
    assert "\n" not in str(refused.value)


def test_another_request_is_refused(model: Any, paths: list[str], undisturbed: Path, tmp_path: Path) -> None:
    folder = tmp_path / "out"
    shutil.copytree(undisturbed, folder)
    before = contents(folder)
    other = create_model(TINY, seed=1)
    for changes, word in (
        ({"weights": weights_digest(other)}, "weights"),
        ({"shard_size": 4}, "shard_size"),
        ({"format": "parquet"}, "format"),
        ({"settings": {"dtype": "bfloat16"}}, "settings"),
        ({"batch_size": 3}, "batch_size"),
        ({"patches": True}, "patches"),
        ({"clips": 1}, "clips"),
        ({"crops": 3}, "crops"),
        ({"preset": "hf"}, "preset"),
        ({"backend": "pyav"}, "backend"),
        ({"paths": paths[:-1]}, "files"),
        ({"paths": paths[::-1]}, "list of files"),
        ({"paths": [*paths[:-1], paths[-1] + "x"]}, "list of files"),
    ):
        with pytest.raises(InputError, match=f"another run: {word} is") as refused:
            finish(model, changes.pop("paths", paths), folder, **changes)
        assert "\n" not in str(refused.value)
    assert contents(folder) == before


WHOLE = {"file": "shard-000000.safetensors", "rows": 3, "sha256": "", "failed": [], "states": "0" * 24}


@pytest.mark.parametrize(
    "manifest",
    [
        b"",
        b"{",
        b"[]",
        b"{}",
        b'{"format": "other", "request": {}, "shards": []}',
        b"\xff\xfe",
        *(
            json.dumps({"shards": broken and broken + [None] * 3}).encode()
            for broken in (
                None,
                [],
                [7],
                [WHOLE | {"file": "../x"}],
                [WHOLE | {"file": None, "rows": 0}],
                [WHOLE | {"file": None, "rows": 0, "failed": [{"place": [], "file": "a", "error": "b"}] * 3}],
                [WHOLE | {"file": None, "rows": "0", "failed": [None] * 3}],
                [WHOLE | {"states": "0"}],
                [WHOLE | {"states": [7] * 24}],
                [{key: value for key, value in WHOLE.items() if key != "states"}],
            )
        ),
    ],
)
def test_a_manifest_that_makes_no_sense_is_refused(
    manifest: bytes, model: Any, paths: list[str], undisturbed: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "out"
    shutil.copytree(undisturbed, folder)
    if manifest.startswith(b'{"shards"'):
        whole = json.loads((undisturbed / MANIFEST).read_text())
        manifest = json.dumps(whole | json.loads(manifest)).encode()
    (folder / MANIFEST).write_bytes(manifest)
    with pytest.raises(InputError, match=r"new folder|not valid JSON|must hold a JSON object") as refused:
        finish(model, paths, folder)
    assert "\n" not in str(refused.value)
    assert (folder / MANIFEST).read_bytes() == manifest


def test_a_manifest_that_makes_sense_is_not(model: Any, paths: list[str], undisturbed: Path, tmp_path: Path) -> None:
    folder = tmp_path / "out"
    shutil.copytree(undisturbed, folder)
    whole = json.loads((undisturbed / MANIFEST).read_text())
    (folder / MANIFEST).write_text(json.dumps(whole | {"shards": [WHOLE] + [None] * 3}))
    finish(model, paths, folder)
    assert contents(folder) == contents(undisturbed)


def test_folders_that_hold_something_else_are_left_alone(model: Any, paths: list[str], tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    (tmp_path / "file").touch()
    for place, words in (
        (tmp_path, "holds other files, such as 'file'"),
        (tmp_path / "file", "cannot write"),
        (tmp_path / "file" / "below", "cannot write"),
        (tmp_path / "nul\0", "cannot write"),
    ):
        with pytest.raises(InputError, match=words):
            finish(model, paths, place)
    assert (tmp_path / "notes.txt").read_text() == "mine"


def test_two_runs_at_once_are_refused(model: Any, paths: list[str], tmp_path: Path) -> None:
    def again(*_: object) -> None:
        with pytest.raises(InputError, match="another run writes"):
            finish(model, paths, tmp_path / "out")
        told.append(True)

    told: list[bool] = []
    embed_to_shards(model, tmp_path / "out", request_for(model, paths), again, workers=0)
    assert len(told) == len(paths)
    # the lock is free again
    finish(model, paths, tmp_path / "out")


def test_no_files_and_no_good_files(model: Any, paths: list[str], tmp_path: Path) -> None:
    for name, some in (("none", []), ("bad", paths[3:6])):
        for _ in range(2):
            assert finish(model, some, tmp_path / name) == [(path, False) for path in some]
            assert set(os.listdir(tmp_path / name)) == {".lock", MANIFEST}


@pytest.mark.parametrize("wrong", [{"shard_size": 0}, {"format": "npz"}, {"preset": "none"}, {"batch_size": 0}])
def test_bad_requests_are_refused(wrong: dict[str, Any], model: Any, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"."):
        finish(model, ["a"], tmp_path / "out", **wrong)


def in_another_process(command: list[str], modules: Path, said: Path) -> int:
    """Run a command in a child that finds other modules first; its process number."""
    pid = os.fork()
    if pid:
        return pid
    try:
        signal.signal(signal.SIGINT, signal.default_int_handler)
        os.dup2(os.open(said, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), 2)
        # what captured the output of the test would get that of the child
        sys.stderr = open(2, "w", closefd=False)  # noqa: SIM115
        console.stderr.file = sys.stderr
        sys.path.insert(0, str(modules))
        code = main(command)
        sys.stderr.flush()
        os._exit(code)
    finally:
        os._exit(77)


@pytest.mark.slow
def test_the_command_goes_on_after_it_is_interrupted_and_killed(
    cli: Cli, tiny: Path, paths: list[str], tmp_path: Path
) -> None:
    package = tmp_path / "modules" / "av"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text(SLOW)
    options = ["--weights", str(tiny), "--shard-size", "1", "--batch-size", "2", "--", *paths]
    code, out, err = cli("embed", "--out", tmp_path / "whole", "--workers", "0", *options)
    assert (code, out) == (2, "")
    assert err.count("error: ") == 3
    assert err.splitlines()[-1] == f"note: wrote {tmp_path / 'whole'}: 7 of 10 videos, 64 numbers each"

    folder = tmp_path / "parts"
    command = ["embed", "--out", str(folder), "--workers", "1", *options]
    for name, ending in (("shard-000001.safetensors", signal.SIGINT), ("shard-000006.safetensors", signal.SIGKILL)):
        pid = in_another_process(command, package.parent, tmp_path / "said")
        deadline = time.monotonic() + 120
        while not (folder / name).exists():
            assert time.monotonic() < deadline
            time.sleep(0.01)
        os.kill(pid, ending)
        code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        assert code == {signal.SIGINT: 130, signal.SIGKILL: -9}[ending]
        said = (tmp_path / "said").read_text()
        assert said.endswith("interrupted: nothing was left half-written\n") == (ending == signal.SIGINT)
    # the kill may have left a half-written file: the next run removes it
    found = {name for name in contents(folder) if not LEFTOVER.fullmatch(name)}
    assert found < contents(tmp_path / "whole").keys()

    code, out, again = cli("embed", "--out", folder, "--workers", "0", *options)
    assert (code, out) == (2, "")
    assert again == err.replace("whole", "parts")
    assert contents(folder) == contents(tmp_path / "whole")


def test_the_command_refuses_in_one_line(cli: Cli, tiny: Path, paths: list[str], tmp_path: Path) -> None:
    options = ("--out", tmp_path / "out", "--weights", tiny, "--shard-size", "2")
    assert cli("embed", *options, "--", *paths[:2])[0] == 0
    for changed in (("--views", "2"), ("--dtype", "bfloat16"), ("--shard-format", "parquet")):
        code, out, err = cli("embed", *options, *changed, "--", *paths[:2])
        assert (code, out) == (2, "")
        # behind it: that this processor multiplies no bfloat16
        one_line(err.splitlines(keepends=True)[-1], "another run")
    for name, value in (
        ("--shard-format", "npz"),
        ("--timeout", "0"),
        ("--timeout", "nan"),
        ("--timeout", "inf"),
        ("--workers", "-1"),
    ):
        code, out, err = cli("embed", *options, name, value, "--", *paths[:2])
        assert (code, out) == (2, "")
        one_line(err, name.rpartition("-")[2])
    code, out, err = cli("embed", "--out", tmp_path / "bad", *options[2:], paths[3])
    assert (code, out) == (2, "")
    assert err.splitlines()[-1].startswith("error: no file could be used")


def test_leftovers_go_and_other_dotfiles_stay(model: Any, paths: list[str], undisturbed: Path, tmp_path: Path) -> None:
    folder = tmp_path / "out"
    shutil.copytree(undisturbed, folder)
    (folder / f".{'a' * 32}.tmp").write_bytes(b"half")
    (folder / ".notes").write_text("mine")
    finish(model, paths, folder)
    assert contents(folder) == contents(undisturbed) | {".notes": b"mine"}
    assert shards._LOCK in os.listdir(folder)
