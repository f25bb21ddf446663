"""Decoding in processes: order, the same bits, and decoders that crash, hang or are interrupted."""

from __future__ import annotations

import itertools
import logging
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest
import torch
from decoding import children, put_hostile_decoder
from made_clips import write
from torch import Tensor

from xclip_fast import InputError
from xclip_fast.video import jobs, load_video, process
from xclip_fast.video.pool import decode_files, default_workers

OPTIONS = {"frames": 4, "size": 32, "clips": 2}


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(tmp_path_factory.mktemp("pool") / "clip.mp4", "mpeg4", size=(48, 64), frames=12)


@pytest.fixture
def hostile(tmp_path: Path, clip: Path, monkeypatch: pytest.MonkeyPatch):
    """Makes copies of the clip that the decoder treats by their names."""
    monkeypatch.syspath_prepend(put_hostile_decoder(tmp_path / "modules"))

    def copies(*names: str) -> list[str]:
        for name in names:
            shutil.copy(clip, tmp_path / name)
        return [str(tmp_path / name) for name in names]

    return copies


def kept(decoded) -> list[Tensor | InputError]:
    return [found.clone() if isinstance(found, Tensor) else found for found in decoded]


@pytest.fixture(autouse=True)
def no_child_is_left() -> Iterator[None]:
    """Every test ends all the processes it starts, and waits for them."""
    before = children(os.getpid())
    yield
    assert children(os.getpid()).keys() <= before.keys()


def test_processes_give_the_same_bits_in_the_order_of_the_files(
    tmp_path: Path, clip: Path, hostile, caplog: pytest.LogCaptureFixture
) -> None:
    odd = [tmp_path / name for name in ("new\nline.mp4", "Straße 日本.mp4", os.fsdecode(b"bad\xff.mp4"), "-x.mp4")]
    for path in odd:
        shutil.copy(clip, path)
    # the first is the last to be ready
    paths = [*hostile("late-1.mp4", "a.mp4", "babble-1.mp4"), *map(os.fsdecode, odd), "/no/such.mp4", ""]
    short = [str(write(tmp_path / f"{n}.mp4", "mpeg4", size=(48, 64), frames=n)) for n in (3, 1, 2)]
    paths = [short[0], *paths, *short]
    options = {**OPTIONS, "crops": 3}
    with caplog.at_level(logging.WARNING, "xclip_fast"):
        here = kept(decode_files(paths, **options, workers=0))
        said = [record.getMessage() for record in caplog.records]
        caplog.clear()
        ahead = kept(decode_files(paths, **options, workers=2))
    # so do their warnings
    assert [message.split(": ")[0] for message in said] == [short[0], *short]
    assert [record.getMessage() for record in caplog.records] == said
    assert len(here) == len(ahead) == len(paths)
    for one, other in zip(here, ahead, strict=True):
        if isinstance(one, Tensor):
            assert torch.equal(one, other)
        else:
            assert str(one) == str(other)
    assert [place for place, one in enumerate(here) if isinstance(one, InputError)] == [8, 9]
    assert torch.equal(here[1], load_video(clip, **options))


@pytest.mark.slow
def test_a_decoder_that_dies_or_hangs_costs_its_file_alone(hostile) -> None:
    names = ["crash-1.mp4", "good-1.mp4", "clutch-1.mp4", "starve-1.mp4", "good-2.mp4"]
    paths = hostile(*names)
    # long enough for a first decode on a busy machine
    stuck = hostile("hang-1.mp4", "hang-2.mp4")
    with closing(decode_files([*paths, *stuck], **OPTIONS, workers=1, timeout=2.5)) as run:
        found = kept(itertools.islice(run, len(paths)))
        assert children(os.getpid())
    # whoever leaves early ends a decoder that hangs
    said = dict(zip(names, map(str, found), strict=True))
    assert "crashed (SIGSEGV)" in said["crash-1.mp4"]
    assert "stopped after 2.5 seconds" in said["clutch-1.mp4"]
    assert "not enough memory" in said["starve-1.mp4"]
    for path, one in zip(paths, found, strict=True):
        assert isinstance(one, Tensor if "good" in path else InputError)
        if isinstance(one, InputError):
            assert path in str(one)
            assert "\n" not in str(one)


def test_slots_bound_how_far_it_runs_ahead_and_faults_are_not_hidden(hostile, monkeypatch: pytest.MonkeyPatch) -> None:
    size = 2 * 4 * 32 * 32 * 3
    monkeypatch.setattr(jobs, "AHEAD_BYTES", size)
    decoded = decode_files(hostile("a.mp4", "b.mp4", "c.mp4", "fault-1.mp4"), **OPTIONS, workers=2)
    seen = {(one.data_ptr(), one.untyped_storage().nbytes()) for one in itertools.islice(decoded, 3)}
    # one slot, whose views are all that is shared
    assert [nbytes for _, nbytes in seen] == [size]
    with pytest.raises(RuntimeError, match="ZeroDivisionError: a fault of the program"):
        next(decoded)


def test_no_files() -> None:
    for workers in (None, 0, 3):
        assert kept(decode_files([], **OPTIONS, workers=workers)) == []


def test_processes_that_do_not_start_are_one_line(clip: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for code, words in (("raise SystemExit(7)", "exit status 7"), ("import time; time.sleep(60)", "SIGKILL")):
        (tmp_path / "worker.py").write_text(code)
        monkeypatch.setattr(process, "_WORKER", tmp_path / "worker.py")
        monkeypatch.setattr(process, "_START_SECONDS", 1)
        with pytest.raises(InputError, match=words) as refused:
            kept(decode_files([str(clip)], **OPTIONS, workers=1))
        assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    ("wrong", "error"),
    [
        ({"workers": -1}, ValueError),
        ({"timeout": 0}, ValueError),
        ({"timeout": float("nan")}, ValueError),
        ({"timeout": float("inf")}, ValueError),
        ({"crops": 2}, ValueError),
        ({"clips": 0}, ValueError),
        ({"preset": "none"}, InputError),
        ({"backend": "none"}, InputError),
    ],
)
def test_bad_options_are_refused_before_any_work(wrong: dict[str, object], error: type[Exception]) -> None:
    with pytest.raises(error):
        decode_files(["a.mp4"], **{**OPTIONS, **wrong})


def test_few_files_need_no_process() -> None:
    assert default_workers(31) == 0
    assert 1 <= default_workers(10**6) <= 8


SCRIPT = """
import sys
from xclip_fast.video.pool import decode_files
# no guard of __main__ is needed
sys.path.insert(0, sys.argv[1])
for found in decode_files(sys.argv[2:], frames=4, size=32, clips=2, workers=1):
    print(tuple(found.shape), flush=True)
"""


@pytest.mark.slow
def test_processes_end_with_a_parent_that_is_killed(hostile, tmp_path: Path) -> None:
    paths = hostile("good.mp4", "hang-1.mp4")
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    command = [sys.executable, script, tmp_path / "modules", *paths]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout.readline() == "(2, 4, 32, 32, 3)\n"
        workers = children(process.pid)
        assert workers
        process.kill()
    deadline = time.monotonic() + 20
    # where nobody adopts the dead, they stay listed
    while any(running(pid) for pid in workers):
        assert time.monotonic() < deadline
        time.sleep(0.05)


def running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False
