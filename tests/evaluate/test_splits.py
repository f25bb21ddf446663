"""Lists of the protocols: nested, seeded, the same whatever the order of the input, written whole or not at all."""

from __future__ import annotations

import csv
import io
import os
import random
from pathlib import Path

import pytest

from xclip_fast import InputError
from xclip_fast.data import Dataset, Sample
from xclip_fast.evaluate import base_novel, few_shot, labels_text, list_text, of_classes, write_lists

CLASSES = ("left", "right", "up")


def dataset(counts: tuple[int, ...] = (20, 30, 25)) -> Dataset:
    samples = [
        Sample(f"{CLASSES[label]}/{number}.mp4", label) for label, count in enumerate(counts) for number in range(count)
    ]
    random.Random(0).shuffle(samples)
    return Dataset(tuple(samples), CLASSES[: len(counts)])


def test_lists_are_nested_and_of_each_class_as_many() -> None:
    data = dataset()
    lists = few_shot(data)
    assert list(lists) == [2, 4, 8, 16]
    for count, one in lists.items():
        assert one.classes == CLASSES
        assert [sum(sample.label == label for sample in one.samples) for label in range(3)] == [count] * 3
        assert set(one.samples) <= set(data.samples)
        assert len(set(one.samples)) == 3 * count
    for fewer, more in ((2, 4), (4, 8), (8, 16)):
        assert set(lists[fewer].samples) < set(lists[more].samples)


def test_the_order_of_the_list_and_other_classes_change_nothing() -> None:
    data = dataset()
    turned = Dataset(data.samples[::-1], data.classes)
    assert few_shot(turned) == few_shot(data)
    alone = Dataset(tuple(one for one in data.samples if one.label == 0), ("left",))
    assert few_shot(alone)[4].samples == few_shot(data)[4].samples[:4]
    assert few_shot(data, shots=(4,))[4] == few_shot(data)[4]


def test_another_seed_draws_others() -> None:
    data = dataset()
    drawn = {few_shot(data, shots=(4,), seed=seed)[4].samples for seed in range(20)}
    assert len(drawn) == 20
    assert few_shot(data, shots=(4,), seed=3) == few_shot(data, shots=(4,), seed=3)


def test_the_lists_of_a_seed_stay_what_they_are() -> None:
    # results name a seed: another version must draw the same
    found = few_shot(dataset((6, 6)), shots=(2,), seed=5)[2]
    assert [sample.source for sample in found.samples] == ["left/0.mp4", "left/4.mp4", "right/1.mp4", "right/5.mp4"]


def test_too_few_clips_name_the_class() -> None:
    with pytest.raises(InputError, match=r"16 shots were asked for, class 'right' has 9 videos: ask for at most 9"):
        few_shot(dataset((20, 9, 25)))
    with pytest.raises(InputError, match=r"class 'up' has 0 videos and 1 more classes have too few"):
        few_shot(dataset((20, 9, 0)))
    for shots in ((), (0,), (2, -1)):
        with pytest.raises(ValueError, match="at least 1"):
            few_shot(dataset(), shots)


def test_base_classes_are_those_with_the_most_videos() -> None:
    assert base_novel(dataset((20, 30, 25))) == (("right", "up"), ("left",))
    # equally many keep their order, and an odd one more is base
    assert base_novel(dataset((5, 5, 5))) == (("left", "right"), ("up",))
    assert base_novel(dataset((20, 30, 25)), by="order") == (("left", "right"), ("up",))
    assert base_novel(dataset((1, 2))) == (("right",), ("left",))


def test_what_cannot_be_halved_is_one_line() -> None:
    with pytest.raises(InputError, match="halved by frequency or order, found 'size'"):
        base_novel(dataset(), by="size")
    with pytest.raises(InputError, match="at least two"):
        base_novel(dataset((3,)))


def test_chosen_classes_are_labelled_anew() -> None:
    data = dataset((2, 3, 4))
    found = of_classes(data, ["up", "left"])
    assert found.classes == ("up", "left")
    assert len(found.samples) == 6
    assert all(found.classes[one.label] == one.source.split("/")[0] for one in found.samples)
    with pytest.raises(InputError, match="class 'down' is not among the 3"):
        of_classes(data, ["down"])
    with pytest.raises(InputError, match="no video is of the 1 classes chosen"):
        of_classes(dataset((2, 0, 1)), ["right"])


def test_lines_of_a_list() -> None:
    samples = [Sample("videos/a b.mp4", 0), Sample("videos/c.mp4", 12)]
    assert list_text(samples, "videos") == "a b.mp4 0\nc.mp4 12\n"
    assert list_text(samples) == "".join(f"{os.getcwd()}/{one.source} {one.label}\n" for one in samples)
    with pytest.raises(InputError, match="is not below the root 'other'"):
        list_text(samples, "other")
    for name in ("a\nb.mp4", "a.mp4 ", "a.mp4\t"):
        with pytest.raises(InputError, match="cannot stand in a list"):
            list_text([Sample(f"videos/{name}", 0)], "videos")


def test_labels_with_commas_and_quotes_read_back() -> None:
    names = ["rock, scissors, paper", 'a "move"', "plain"]
    rows = list(csv.reader(io.StringIO(labels_text(names))))
    assert rows == [["id", "name"], *([str(number), name] for number, name in enumerate(names))]


def files(folder: Path) -> dict[str, str]:
    return {path.name: path.read_text() for path in folder.iterdir()}


def test_lists_are_written_once(tmp_path: Path) -> None:
    texts = {"a.txt": "a 0\n", "b.txt": "b 1\n"}
    folder = tmp_path / "lists"
    assert write_lists(folder, texts) == ["a.txt", "b.txt"]
    assert files(folder) == texts
    before = (folder / "a.txt").stat().st_mtime_ns
    assert write_lists(folder, texts) == []
    assert (folder / "a.txt").stat().st_mtime_ns == before
    (folder / "b.txt").unlink()
    assert write_lists(folder, texts) == ["b.txt"]
    assert files(folder) == texts


def test_another_content_is_not_overwritten(tmp_path: Path) -> None:
    (tmp_path / "b.txt").write_text("mine")
    texts = {"a.txt": "a 0\n", "b.txt": "b 1\n"}
    with pytest.raises(InputError, match=r"b\.txt' is there and holds something else"):
        write_lists(tmp_path, texts)
    assert files(tmp_path) == {"b.txt": "mine"}
    assert write_lists(tmp_path, texts, force=True) == ["a.txt", "b.txt"]
    assert files(tmp_path) == texts


def test_a_full_disk_leaves_what_was_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a.txt").write_text("mine")
    written: list[Path] = []

    def fail(self: Path, data: bytes) -> int:
        written.append(self)
        if len(written) == 2:
            raise OSError(28, "No space left on device")
        return 0

    monkeypatch.setattr(Path, "write_bytes", fail)
    with pytest.raises(InputError, match="No space left on device"):
        write_lists(tmp_path, {"a.txt": "a 0\n", "b.txt": "b 1\n"}, force=True)
    assert files(tmp_path) == {"a.txt": "mine"}


def test_where_nothing_can_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match="it is not a folder"):
        write_lists(tmp_path / "file", {"a.txt": ""})
    with pytest.raises(InputError, match="there is no folder"):
        write_lists(tmp_path / "none" / "below", {"a.txt": ""})
    (tmp_path / "lists" / "a.txt").mkdir(parents=True)
    with pytest.raises(InputError, match="not a file"):
        write_lists(tmp_path / "lists", {"a.txt": ""}, force=True)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "lists"]
