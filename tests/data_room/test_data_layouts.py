"""The official layouts, and what is wrong with a data set, said before any work."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from tar_files import write_tar

from xclip_fast import InputError
from xclip_fast.data import Dataset, Sample, normalise_names, read_captions, read_dataset, read_labels
from xclip_fast.video.pool import Member

NAMES = "id,name\n0,moving right\n1,standing still\n"


def touch(folder: Path, *names: str) -> None:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(b"video")


@pytest.fixture
def room(tmp_path: Path) -> Path:
    touch(tmp_path, "a.mp4", "my clips/b c.mp4")
    (tmp_path / "labels.csv").write_text(NAMES)
    (tmp_path / "train.txt").write_text("a.mp4 1\nmy clips/b c.mp4 0\n")
    return tmp_path


def found(dataset: Dataset, folder: Path) -> list[tuple[str, str]]:
    return [(os.path.relpath(str(sample.source), folder), dataset.classes[sample.label]) for sample in dataset.samples]


def refused(*arguments: object, **options: object) -> str:
    with pytest.raises(InputError) as error:
        read_dataset(*arguments, **options)
    assert "\n" not in str(error.value)
    return str(error.value)


def test_a_list_of_paths_with_spaces(room: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    dataset = read_dataset(room / "train.txt", labels=room / "labels.csv")
    assert found(dataset, room) == [("a.mp4", "standing still"), ("my clips/b c.mp4", "moving right")]
    # the list and the videos apart; marks, tabs and empty lines change nothing
    (room / "lists").mkdir()
    (room / "lists" / "val.txt").write_bytes(b"\xef\xbb\xbf\r\na.mp4\t 1\r\n\n  my clips/b c.mp4   0  \n")
    assert read_dataset([str(room / "lists" / "val.txt")], labels=room / "labels.csv", root=room) == dataset
    monkeypatch.chdir(room)
    assert found(read_dataset("train.txt", labels="labels.csv"), Path()) == found(dataset, room)
    assert read_dataset("train.txt", labels="labels.csv").samples[0].source == "a.mp4"


def test_absolute_paths_and_names_that_are_no_text(room: Path) -> None:
    odd = os.fsdecode(b"bad\xff.mp4")
    touch(room, odd)
    (room / "odd.txt").write_bytes(os.fsencode(f"{room / 'a.mp4'} 0\n{odd} 1\n"))
    dataset = read_dataset(room / "odd.txt", labels=room / "labels.csv")
    assert [sample.source for sample in dataset.samples] == [str(room / "a.mp4"), str(room / odd)]


@pytest.mark.parametrize(
    ("lines", "words"),
    [
        ("", "an empty list"),
        ("\n \n", "an empty list"),
        ("a.mp4\n", "line 1: 'a.mp4' is no 'path label'"),
        ("\na.mp4 1\nb.mp4\n", "line 3"),
        ("a.mp4 one\n", "line 1: the label must be a whole number from 0, found 'one'"),
        ("a.mp4 -1\n", "found '-1'"),
        ("a.mp4 1.0\n", "found '1.0'"),
        ("a.mp4 1,2\n", "found '1,2'"),
        ("a.mp4 \u0661\n", "whole number"),
        ("a.mp4 99999999999999999999\n", "whole number"),
        ("a.mp4 2\n", "label 2 is not in the label list, which has 0 to 1"),
        ("a.mp4 0\nmy clips/b c.mp4 1\n./a.mp4 0\n", "a.mp4 is there twice"),
        ("a.mp4 0\na.mp4 1\n", "is there twice"),
        ("a.mp4 0\nb.mp4 1\nc.mp4 1\nd.mp4 1\ne.mp4 1\n", "4 of 5 videos are not there: "),
        ("a.mp4 0\nmy clips 1\n", "1 of 2 videos are not there"),
        ("a.mp4 0\nhttp://host/a.mp4 1\n", "1 of 2 videos are not there"),
        ("a.mp4\0 0\n", "not text"),
        ("a.mp4 0\n", "1 of the 2 classes have no video: 'standing still'"),
        ("shard.tar::a.mp4 0\n", "cannot be read (No such file)"),
    ],
)
def test_a_wrong_list_is_refused(room: Path, lines: str, words: str) -> None:
    (room / "wrong.txt").write_text(lines, encoding="utf-8")
    assert words in refused(room / "wrong.txt", labels=room / "labels.csv")


def test_many_missing_videos_are_counted_and_a_few_named(room: Path) -> None:
    (room / "wrong.txt").write_text("".join(f"{number}.mp4 0\n" for number in range(9)))
    said = refused(room / "wrong.txt", labels=room / "labels.csv")
    assert f"9 of 9 videos are not there: {room / '0.mp4'}, {room / '1.mp4'}, {room / '2.mp4'} and 6 more" in said


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("", "the first line must be 'id,name'"),
        ("0,moving right\n1,standing still\n", "must be 'id,name', found '0,moving right'"),
        ("id,name\n", "no labels were given"),
        ("id,name\n1,moving right\n2,standing still\n", "found up to 2 and no 0"),
        ("id,name\n0,moving right\n2,standing still\n", "found up to 2 and no 1"),
        ("id,name\n0,moving right\n0,standing still\n", "line 3: the id 0 is there twice"),
        ("id,name\nzero,moving right\n", "the id must be a whole number"),
        ("id,name\n0,\n1,standing still\n", "label 1 is blank"),
        ("id,name\n0,Moving  Right\n1,moving right\n", "labels 1 and 2 are the same"),
        ("id,name\n0,moving, right\n", "line 2: 3 fields"),
        ('id,name\n0,"moving right\n', "no CSV"),
        ("id,name\n0,\udcff\n", "not valid Unicode"),
    ],
)
def test_a_wrong_label_list_is_refused(room: Path, content: str, words: str) -> None:
    (room / "wrong.csv").write_bytes(content.encode("utf-8", "surrogateescape"))
    assert words in refused(room / "train.txt", labels=room / "wrong.csv")


def test_a_label_list_as_spreadsheets_write_it(tmp_path: Path) -> None:
    (tmp_path / "labels.csv").write_bytes(b'\xef\xbb\xbfid,name\r\n1,"cooking, ""outdoors"""\r\n\r\n0, riding \r\n')
    assert read_labels(tmp_path / "labels.csv") == ["riding", 'cooking, "outdoors"']


def test_wrong_paths(room: Path) -> None:
    labels = room / "labels.csv"
    assert "no.txt: cannot be read (No such file or directory)" in refused(room / "no.txt", labels=labels)
    assert "no.csv: cannot be read" in refused(room / "train.txt", labels=room / "no.csv")
    assert "not a file; give a label list" in refused(room / "train.txt", labels=room)
    assert "no such folder" in refused(room / "train.txt", labels=labels, root=room / "none")
    assert "classes are numbers there, such as 1" in refused(room / "train.txt")
    assert "no videos were given" in refused([])
    assert "no tar archive (.tar)" in refused([room / "train.txt", room / "train.txt"], labels=labels)
    assert "root is for the paths of a list" in refused(room, root=room)
    os.mkfifo(room / "pipe")
    assert "not a file" in refused(room / "pipe", labels=labels)


def test_class_folders(tmp_path: Path) -> None:
    touch(tmp_path / "videos", "run/b.mp4", "run/deep/er/a.MKV", "run/notes.txt", "run/.c.mp4", "Jump/z.avi", "read.me")
    (tmp_path / "videos" / ".git").mkdir()
    (tmp_path / "videos" / "run" / "deep" / "loop").symlink_to(tmp_path / "videos" / "run")
    dataset = read_dataset(tmp_path / "videos")
    # sorted as names are, and each file once
    assert dataset.classes == ("Jump", "run")
    assert found(dataset, tmp_path / "videos") == [
        ("Jump/z.avi", "Jump"),
        ("run/b.mp4", "run"),
        ("run/deep/er/a.MKV", "run"),
    ]
    # with a label list its numbers hold, and names are compared as words
    (tmp_path / "labels.csv").write_text("id,name\n0,RUN\n1,jump\n")
    listed = read_dataset(tmp_path / "videos", labels=tmp_path / "labels.csv")
    assert listed.classes == ("RUN", "jump")
    assert [sample.label for sample in listed.samples] == [1, 0, 0]
    for names, words in (
        ("0,run", "the class 'Jump' is not in the label list"),
        ("0,run\n1,jump\n2,swim", "1 of the 3 classes have no video: 'swim'"),
    ):
        (tmp_path / "labels.csv").write_text(f"id,name\n{names}\n")
        assert words in refused(tmp_path / "videos", labels=tmp_path / "labels.csv")
    assert len(read_dataset(tmp_path / "videos", labels=tmp_path / "labels.csv", empty_classes=True).classes) == 3


def test_wrong_class_folders(tmp_path: Path) -> None:
    assert "a folder for each class is needed, found none" in refused(tmp_path)
    touch(tmp_path, "run/a.mp4", "swim/notes.txt")
    assert f"{tmp_path / 'swim'}: a class without a video" in refused(tmp_path)
    touch(tmp_path, "swim/a.mp4", "b.mp4")
    assert "found the video 'b.mp4' directly in it" in refused(tmp_path)
    os.rename(tmp_path / "b.mp4", tmp_path / "swim" / "b.mp4")
    touch(tmp_path, "Run/a.mp4")
    assert "are the same, 'Run' and 'run'" in refused(tmp_path)


def test_a_list_over_an_archive(room: Path) -> None:
    tar = write_tar(room / "videos.tar", {"./a.mp4": b"one", "my clips/b c.mp4": b"three"})
    dataset = read_dataset(room / "train.txt", labels=room / "labels.csv", root=tar)
    first, second = (sample.source for sample in dataset.samples)
    assert isinstance(first, Member)
    assert isinstance(second, Member)
    content = tar.read_bytes()
    assert [content[one.offset : one.offset + one.size] for one in (first, second)] == [b"one", b"three"]
    # so is a list that was written of such a data set
    (room / "again.txt").write_text("".join(f"{one.source} {one.label}\n" for one in dataset.samples))
    assert read_dataset(room / "again.txt", labels=room / "labels.csv") == dataset
    (room / "again.txt").write_text(f"{tar}::none.mp4 0\n")
    assert "1 of 1 videos are not there" in refused(room / "again.txt", labels=room / "labels.csv")


def test_labels_of_a_data_set_are_places_in_its_classes() -> None:
    for label in (-1, 2):
        with pytest.raises(ValueError, match=f"label {label} of a.mp4"):
            Dataset((Sample("a.mp4", label),), ("a", "b"))


def test_captions(room: Path) -> None:
    (room / "captions.txt").write_text("my clips/b c.mp4\tA man,\ta dog .\na.mp4 \t Rain\na.mp4\tSnow\n")
    sources, captions = read_captions(room / "captions.txt")
    assert [os.path.relpath(str(source), room) for source in sources] == ["my clips/b c.mp4", "a.mp4", "a.mp4"]
    assert captions == ["A man,\ta dog .", "Rain", "Snow"]
    for lines, words in (("a.mp4 rain\n", "line 1"), ("a.mp4\t \n", "no path"), ("b.mp4\tRain\n", "not there")):
        (room / "captions.txt").write_text(lines)
        with pytest.raises(InputError, match=words):
            read_captions(room / "captions.txt")


@pytest.mark.parametrize(
    ("name", "split", "whole"),
    [
        ("ApplyEyeMakeup", "apply eye makeup", "applyeyemakeup"),
        ("brush_hair", "brush hair", "brush hair"),
        ("YoYo", "yo yo", "yoyo"),
        ("WatchTVShow", "watch tv show", "watchtvshow"),
        ("taking  LSATs", "taking lsats", "taking lsats"),
        ("punching person (boxing)", "punching person (boxing)", "punching person (boxing)"),
        ("tai chi", "tai chi", "tai chi"),
    ],
)
def test_names_as_words(name: str, split: str, whole: str) -> None:
    assert normalise_names([name]) == [split]
    assert normalise_names([name], split_camel_case=False) == [whole]


def test_names_that_become_one() -> None:
    with pytest.raises(InputError, match="are the same"):
        normalise_names(["TaiChi", "tai_chi"])
    with pytest.raises(InputError, match="blank"):
        normalise_names(["run", "_"])
