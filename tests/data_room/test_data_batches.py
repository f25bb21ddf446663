"""Training batches: the same bytes for the same draws, and bad videos that cost their place in no batch."""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
import torch
from decoding import children, put_hostile_decoder
from tar_files import write_tar

from xclip_fast import InputError
from xclip_fast.data import (
    Augmentation,
    Batch,
    Dataset,
    Draw,
    Quarantine,
    Sample,
    batches,
    read_dataset,
    training_batches,
)
from xclip_fast.video.process import Process

pytest.importorskip("torchvision")
pytest.importorskip("av")

OPTIONS: dict[str, Any] = {"frames": 4, "size": 32, "augmentation": Augmentation(), "seed": 7}
PLAIN = {**OPTIONS, "augmentation": Augmentation(color_jitter=0.0, gray=0.0)}
GREYS = (40, 80, 120, 160, 200, 240)


@pytest.fixture(autouse=True)
def no_child_is_left() -> Iterator[None]:
    before = children(os.getpid())
    yield
    assert children(os.getpid()).keys() <= before.keys()


@pytest.fixture
def greys(grey_clip: Callable[[int], Path]) -> Dataset:
    """Six clips whose classes are their greys."""
    samples = tuple(Sample(str(grey_clip(grey)), place) for place, grey in enumerate(GREYS))
    return Dataset(samples, tuple(map(str, GREYS)))


def epochs(count: int, videos: int, batch: int = 4) -> list[list[Draw]]:
    draws = [Draw(epoch, place, place) for epoch in range(count) for place in range(videos)]
    return [draws[start : start + batch] for start in range(0, len(draws), batch)]


def run(dataset: Dataset, groups: Any, quarantine: Quarantine | None = None, **options: Any) -> list[Batch]:
    return list(training_batches(dataset, groups, quarantine=quarantine or Quarantine(), **{**OPTIONS, **options}))


def same(one: list[Batch], other: list[Batch]) -> bool:
    return len(one) == len(other) and all(
        torch.equal(a.videos, b.videos) and torch.equal(a.labels, b.labels) and a.paths == b.paths
        for a, b in zip(one, other, strict=True)
    )


def check_pairing(found: list[Batch], groups: list[list[Draw]]) -> None:
    """Each batch is as large as asked, and each clip shows what its label says."""
    assert [len(one.paths) for one in found] == [len(group) for group in groups]
    for batch in found:
        assert batch.videos.dtype == torch.uint8
        assert batch.videos.shape == (len(batch.paths), 4, 32, 32, 3)
        assert batch.labels.dtype == torch.int64
        shown = batch.videos.float().mean((1, 2, 3, 4)) if batch.paths else torch.empty(0)
        assert (shown - torch.tensor(GREYS)[batch.labels]).abs().max() < 4 if batch.paths else True


def test_batches_are_the_groups_in_order(greys: Dataset) -> None:
    groups = [[], *epochs(1, 6), [], [Draw(1, 0, 5)], []]
    found = run(greys, groups, **PLAIN, workers=0)
    check_pairing(found, groups)
    assert [batch.labels.tolist() for batch in found] == [[], [0, 1, 2, 3], [4, 5], [], [5], []]
    assert [batch.paths for batch in found] == [
        [greys.samples[draw.index].source for draw in group] for group in groups
    ]
    assert all((batch.seconds > 0) == bool(batch.paths) for batch in found)
    # each has memory of its own
    assert len({batch.videos.data_ptr() for batch in found if batch.paths}) == 3
    assert run(greys, [], workers=0) == []
    assert [len(one.paths) for one in run(greys, [[], []], workers=0)] == [0, 0]


@pytest.mark.slow
def test_the_number_of_workers_and_the_start_change_no_bit(greys: Dataset) -> None:
    groups = epochs(3, 6)
    whole = run(greys, groups, workers=0)
    for workers in (1, 3):
        assert same(run(greys, groups, workers=workers), whole)
    # what went before has no part in it, nor how far ahead it reads
    assert same(run(greys, iter(groups[2:]), workers=2), whole[2:])
    assert same(run(greys, [[draw] for draw in groups[3]], workers=0), [_one(whole[3], place) for place in range(4)])


def _one(batch: Batch, place: int) -> Batch:
    return Batch(batch.videos[place : place + 1], batch.labels[place : place + 1], batch.paths[place : place + 1], 0.0)


def test_epochs_places_and_seeds_differ(greys: Dataset) -> None:
    def clip(draw: Draw, seed: int = 7) -> bytes:
        return run(greys, [[draw]], workers=0, seed=seed)[0].videos.numpy().tobytes()

    assert clip(Draw(0, 0, 2)) == clip(Draw(0, 0, 2))
    assert len({clip(Draw(0, 0, 2)), clip(Draw(1, 0, 2)), clip(Draw(0, 1, 2)), clip(Draw(0, 0, 2), seed=8)}) == 4


@pytest.fixture
def bad_videos(greys: Dataset, tmp_path: Path) -> Dataset:
    """The six clips, then one that is text, one that is missing, one that is cut short and one that is empty."""
    source = Path(str(greys.samples[0].source))
    (tmp_path / "text.mp4").write_text("no video")
    (tmp_path / "short.mp4").write_bytes(source.read_bytes()[:300])
    (tmp_path / "empty.mp4").touch()
    bad = [Sample(str(tmp_path / name), 0) for name in ("text.mp4", "missing.mp4", "short.mp4", "empty.mp4")]
    return Dataset((*greys.samples, *bad), greys.classes)


def test_bad_videos_are_replaced_by_others_with_their_own_labels(bad_videos: Dataset, tmp_path: Path) -> None:
    groups = epochs(2, 10, batch=5)
    quarantine = Quarantine(tmp_path / "quarantine.json")
    found = run(bad_videos, groups, quarantine, **PLAIN, workers=0)
    check_pairing(found, groups)
    bad = {str(sample.source) for sample in bad_videos.samples[6:]}
    assert set(quarantine.reasons) == bad
    assert quarantine.reasons[str(tmp_path / "missing.mp4")] == (
        f"{tmp_path}/missing.mp4: cannot be read (No such file or directory); give the path of a local video file"
    )
    # the same two epochs without bad ones: all other places hold the clips they held
    for batch, group in zip(found, groups, strict=True):
        for path, draw in zip(batch.paths, group, strict=True):
            wanted = str(bad_videos.samples[draw.index].source)
            assert path == wanted if wanted not in bad else path not in bad
    # the file says the same
    content = json.loads((tmp_path / "quarantine.json").read_text())
    assert content["videos"] == quarantine.reasons
    assert [name.name for name in tmp_path.glob(".*")] == []


def test_a_run_that_goes_on_gets_the_same_with_its_list_or_without(
    bad_videos: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from xclip_fast.data import clips

    groups = epochs(2, 10, batch=5)
    whole = run(bad_videos, groups, Quarantine(tmp_path / "quarantine.json"), workers=0)
    asked = []
    load = clips.load_clip

    def load_clip(source: str, **options: Any) -> torch.Tensor:
        asked.append(source)
        return load(source, **options)

    monkeypatch.setattr(clips, "load_clip", load_clip)
    assert same(run(bad_videos, groups[2:], Quarantine(), workers=0), whole[2:])
    assert {str(sample.source) for sample in bad_videos.samples[6:]} <= set(asked)
    asked.clear()
    assert same(run(bad_videos, groups[2:], Quarantine(tmp_path / "quarantine.json"), workers=0), whole[2:])
    # what is known to be bad is not tried again
    assert not {str(sample.source) for sample in bad_videos.samples[6:]} & set(asked)


@pytest.mark.slow
def test_decoders_that_crash_and_hang(greys: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(put_hostile_decoder(tmp_path / "modules"))
    content = Path(str(greys.samples[0].source)).read_bytes()
    names = ["crash-0.mp4", "hang-0.mp4", "crash-1.mp4", "clutch-0.mp4", "starve-0.mp4", "text.mp4"]
    for name in names:
        (tmp_path / name).write_bytes(b"no video" if name == "text.mp4" else content)
    bad = [str(tmp_path / name) for name in (*names, "missing.mp4")]
    dataset = Dataset((*greys.samples, *(Sample(path, 0) for path in bad)), greys.classes)
    groups = epochs(1, len(dataset.samples), batch=5)
    quarantine = Quarantine()
    found = run(dataset, groups, quarantine, **PLAIN, workers=2, timeout=4.0)
    check_pairing(found, groups)
    assert set(quarantine.reasons) == set(bad)
    words = ["(SIGSEGV)", "stopped after 4 seconds", "(SIGSEGV)", "stopped after 4", "not enough memory", "not a video"]
    for path, word in zip(bad, (*words, "No such file"), strict=True):
        assert word in quarantine.reasons[path]
        assert "\n" not in quarantine.reasons[path]
    assert found[0].paths == [str(sample.source) for sample in dataset.samples[:5]]
    # the next time none of them is tried: nothing waits for a deadline
    assert same(run(dataset, groups, quarantine, **PLAIN, workers=2, timeout=86400.0), found)


@pytest.mark.slow
def test_ten_processes_killed_from_outside_change_nothing(greys: Dataset, monkeypatch: pytest.MonkeyPatch) -> None:
    served: set[int] = set()
    decode = Process.decode

    def noted(process: Process, job: Any) -> Any:
        answer = decode(process, job)
        if answer is not None:
            served.add(process.process.pid)
        return answer

    monkeypatch.setattr(Process, "decode", noted)
    groups = epochs(60, 6, batch=6)
    whole = run(greys, groups, **PLAIN, workers=0)
    quarantine = Quarantine()
    before = children(os.getpid()).keys()
    found = []
    killed: set[int] = set()
    with closing(training_batches(greys, groups, quarantine=quarantine, **PLAIN, workers=2)) as batches:
        for batch in batches:
            found.append(batch)
            until = time.monotonic() + 2
            while len(killed) < 10 and time.monotonic() < until:
                alive = {pid for pid in children(os.getpid()) if pid not in before | killed}
                # the video of one that died is given to another once: that one has to answer before the next dies
                if alive and alive <= served:
                    os.kill(min(alive), signal.SIGKILL)
                    killed.add(min(alive))
                    break
                time.sleep(0.02)
    assert len(killed) == 10
    assert same(found, whole)
    assert quarantine.reasons == {}


def test_twenty_bad_ones_in_a_row_end_it(tmp_path: Path) -> None:
    dataset = Dataset(tuple(Sample(str(tmp_path / f"{number}.mp4"), 0) for number in range(50)), ("a",))
    quarantine = Quarantine(tmp_path / "quarantine.json")
    with pytest.raises(InputError, match="20 videos in a row cannot be decoded") as error:
        run(dataset, [[Draw(0, 0, 0)]], quarantine, workers=0)
    assert "\n" not in str(error.value)
    assert "No such file" in str(error.value)
    # what was found is written all the same
    assert Quarantine(tmp_path / "quarantine.json").reasons == quarantine.reasons
    with pytest.raises(InputError, match="20 videos in a row"):
        run(dataset, [[Draw(0, 0, 0)]], Quarantine(tmp_path / "quarantine.json"), workers=0)


@pytest.mark.slow
def test_leaving_early_ends_the_processes(greys: Dataset) -> None:
    groups = ([Draw(0, place, place % 6)] for place in range(10**9))
    with closing(training_batches(greys, groups, quarantine=Quarantine(), **OPTIONS, workers=1)) as batches:
        assert next(batches).labels.tolist() == [0]
        assert next(batches).labels.tolist() == [1]
        assert children(os.getpid())


def test_shards_give_the_bytes_of_files(greys: Dataset, tmp_path: Path) -> None:
    files: dict[str, bytes | Path] = {}
    for sample in greys.samples:
        files |= {f"{sample.label}.mp4": Path(str(sample.source)), f"{sample.label}.cls": b"%d" % sample.label}
    (tmp_path / "labels.csv").write_text("id,name\n" + "".join(f"{place},{name}\n" for place, name in enumerate(GREYS)))
    packed = read_dataset(write_tar(tmp_path / "a.tar", files), labels=tmp_path / "labels.csv")
    groups = epochs(1, 6)
    for one, other in zip(run(packed, groups, workers=0), run(greys, groups, workers=0), strict=True):
        assert torch.equal(one.videos, other.videos)
        assert torch.equal(one.labels, other.labels)
    assert run(packed, [[Draw(0, 0, 2)]], workers=0)[0].paths == [f"{tmp_path}/a.tar::2.mp4"]


@pytest.mark.parametrize(
    ("wrong", "error", "words"),
    [
        ({"workers": -1}, ValueError, "workers"),
        ({"timeout": 0}, ValueError, "timeout"),
        ({"frames": 0}, ValueError, "frames"),
        ({"size": 0}, ValueError, "size"),
        ({"seed": -1}, ValueError, "seed"),
        ({"backend": "none"}, InputError, "no decode backend"),
    ],
)
def test_bad_options_are_refused_before_any_work(
    greys: Dataset, wrong: dict[str, Any], error: type[Exception], words: str
) -> None:
    with pytest.raises(error, match=words):
        training_batches(greys, epochs(1, 6), **{**OPTIONS, "quarantine": Quarantine(), **wrong})


def test_other_bad_input(greys: Dataset, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(InputError, match="no video"):
        run(Dataset((), ("a",)), [])
    for draw in (Draw(0, 0, 6), Draw(0, 0, -1), Draw(-1, 0, 0), Draw(0, -1, 0)):
        with pytest.raises(ValueError, match="no draw from 6 videos"):
            run(greys, [[draw]], workers=0)
    monkeypatch.setitem(sys.modules, "torchvision", None)
    monkeypatch.delitem(sys.modules, "xclip_fast.data.clips", raising=False)
    monkeypatch.delitem(sys.modules, "torchvision.transforms.v2", raising=False)
    with pytest.raises(InputError, match=r"augmentations need torchvision.*pip install 'xclip-fast\[train\]'"):
        run(greys, [])


@pytest.mark.slow
def test_a_fault_of_the_groups_is_the_caller_s(greys: Dataset) -> None:
    def groups() -> Iterator[list[Draw]]:
        yield [Draw(0, 0, 0)]
        raise ZeroDivisionError("a fault of the plan")

    for workers in (0, 1):
        with pytest.raises(ZeroDivisionError, match="a fault of the plan"):
            run(greys, groups(), workers=workers)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("", "is not valid JSON"),
        ("[]", "must hold a JSON object"),
        ('{"format": "another", "videos": {}}', "is no list of bad videos"),
        ('{"format": "xclip_fast quarantine 1"}', "is no list of bad videos"),
        ('{"format": "xclip_fast quarantine 1", "videos": {"a": 1}}', "is damaged"),
        ('{"format": "xclip_fast quarantine 1", "videos": {"a": "b", "a": "c"}}', "a key occurs twice"),
    ],
)
def test_a_wrong_quarantine_file_is_refused(tmp_path: Path, content: str, words: str) -> None:
    (tmp_path / "quarantine.json").write_text(content)
    with pytest.raises(InputError, match=words):
        Quarantine(tmp_path / "quarantine.json")
    assert (tmp_path / "quarantine.json").read_text() == content


def test_where_no_quarantine_file_can_be_is_said_at_once(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="there is no folder"):
        Quarantine(tmp_path / "none" / "quarantine.json")
    with pytest.raises(InputError, match="it is not a file"):
        Quarantine(tmp_path)


def test_the_quarantine_file_appears_whole_and_only_when_needed(tmp_path: Path) -> None:
    quarantine = Quarantine(tmp_path / "quarantine.json")
    quarantine.save()
    assert not quarantine.path or not quarantine.path.exists()
    names = ["b.mp4", os.fsdecode(b"\xff.mp4"), "a.tar::x.mp4"]
    for name in (*names, "b.mp4"):
        quarantine.add(name, f"{name!a}: an empty file")
    quarantine.save()
    assert Quarantine(tmp_path / "quarantine.json").reasons == {name: f"{name!a}: an empty file" for name in names}
    assert [path.name for path in tmp_path.iterdir()] == ["quarantine.json"]


def resident() -> int:
    """Bytes of memory that this process and its children hold."""
    pages = [int(Path(f"/proc/{pid}/statm").read_text().split()[1]) for pid in (os.getpid(), *children(os.getpid()))]
    return sum(pages) * os.sysconf("SC_PAGE_SIZE")


@pytest.mark.slow
def test_memory_stays_flat_over_a_thousand_clips(greys: Dataset) -> None:
    groups = [[Draw(0, 8 * number + place, place % 6) for place in range(8)] for number in range(160)]
    held = []
    with closing(training_batches(greys, groups, quarantine=Quarantine(), **OPTIONS, workers=1)) as batches:
        for number, _ in enumerate(batches):
            # after two hundred clips it has all it needs, and a thousand later the process is not done yet
            if number in (24, 149):
                held.append(resident())
    assert abs(held[1] - held[0]) < 50 << 20


def test_the_most_attempts_are_those_that_the_text_says() -> None:
    assert "20 videos" in (training_batches.__doc__ or "")
    assert batches.MOST_ATTEMPTS == 20
