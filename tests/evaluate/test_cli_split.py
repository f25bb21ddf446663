"""The lists as files: they read back, and a wrong request writes nothing."""

from __future__ import annotations

import json
import tarfile
from collections.abc import Callable
from pathlib import Path

from xclip_fast.data import read_dataset, read_labels

Cli = Callable[..., tuple[int, str, str]]


def said(cli: Cli, *arguments: object) -> str:
    """The one line of a refusal."""
    code, out, err = cli("split", *arguments)
    assert (code, out) == (2, "")
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    return err


def test_few_shot_lists_read_back(clips: Path, tmp_path: Path, cli: Cli) -> None:
    labels = clips / "labels.csv"
    code, _, err = cli("split", "few-shot", clips / "val.txt", "--labels", labels, "--out", tmp_path, "--shots", "1,2")
    assert code == 0
    assert "few_shot_1.txt, few_shot_2.txt, labels.csv" in err
    found = [read_dataset(tmp_path / f"few_shot_{count}.txt", labels=tmp_path / "labels.csv") for count in (1, 2)]
    assert [len(one.samples) for one in found] == [8, 16]
    assert set(found[0].samples) < set(found[1].samples)
    assert set(found[1].samples) == set(read_dataset(clips / "val.txt", labels=labels).samples)
    assert found[0].classes == tuple(read_labels(labels))
    # again: the same, nothing written
    code, _, err = cli("split", "few-shot", clips / "val.txt", "--labels", labels, "--out", tmp_path, "--shots", "1,2")
    assert code == 0
    assert "wrote nothing" in err
    # another seed is another content
    other = ("few-shot", clips / "val.txt", "--labels", labels, "--out", tmp_path, "--shots", "1,2", "--seed", 1)
    assert "holds something else: choose another folder, or --force" in said(cli, *other)
    assert cli("split", *other, "--force")[0] == 0
    again = read_dataset(tmp_path / "few_shot_1.txt", labels=tmp_path / "labels.csv")
    assert again.samples != found[0].samples


def test_paths_below_a_root_stay_below_it(clips: Path, tmp_path: Path, cli: Cli) -> None:
    code, _, _ = cli(
        "split", "few-shot", clips / "val.txt", "--labels", clips / "labels.csv", "--root", clips,
        "--out", tmp_path, "--shots", "2",
    )  # fmt: skip
    assert code == 0
    lines = (tmp_path / "few_shot_2.txt").read_text().splitlines()
    assert sorted(lines) == sorted((clips / "val.txt").read_text().splitlines())


def test_videos_in_an_archive(clips: Path, tmp_path: Path, cli: Cli) -> None:
    with tarfile.open(tmp_path / "shard.tar", "w") as tar:
        for label in range(8):
            for seed in range(2):
                key = f"{label}{seed}"
                tar.add(clips / f"{label}_{seed}.mp4", f"{key}.mp4")
                (tmp_path / "label").write_text(str(label))
                tar.add(tmp_path / "label", f"{key}.cls")
    labels = clips / "labels.csv"
    code, _, err = cli("split", "few-shot", tmp_path / "shard.tar", "--labels", labels, "--out", tmp_path, "--shots", 1)
    assert code == 0, err
    found = read_dataset(tmp_path / "few_shot_1.txt", labels=labels)
    assert set(found.samples) < set(read_dataset(str(tmp_path / "shard.tar"), labels=labels).samples)
    totals = []
    for name in ("few_shot_1.txt", "shard.tar"):
        code, out, err = cli("evaluate", tmp_path / name, "--labels", labels, "--views", "1x1", "--json")
        assert code == 0, err
        [split] = json.loads(out)["splits"]
        totals.append(split["top1"]["total"])
        assert split["top1"]["value"] > 0.7
    assert totals == [8, 16]


def test_new_classes_with_their_videos(clips: Path, tmp_path: Path, cli: Cli) -> None:
    (tmp_path / "older.csv").write_text('id,name\n0,shape moving right\n1,"a disc, then a ring"\n2,yoga\n')
    code, out, _ = cli(
        "split", "new-classes", clips / "labels.csv", tmp_path / "older.csv", "--videos", clips / "val.txt",
        "--out", tmp_path / "new", "--count", 4, "--draws", 2,
    )  # fmt: skip
    assert code == 0
    assert "'a shape moving right' is 'shape moving right': an article" in out
    assert out.endswith("new classes: 6\n")
    for name, classes, videos in (("new", 6, 12), ("draw_1", 4, 8), ("draw_2", 4, 8)):
        found = read_dataset(tmp_path / "new" / f"{name}.txt", labels=tmp_path / "new" / f"{name}_labels.csv")
        assert (len(found.classes), len(found.samples)) == (classes, videos)
        names = read_labels(clips / "labels.csv")
        assert all(found.classes[one.label] == names[int(Path(str(one.source)).name[0])] for one in found.samples)


def test_halves_of_several_lists(clips: Path, tmp_path: Path, cli: Cli) -> None:
    lines = (clips / "val.txt").read_text().splitlines(keepends=True)
    # of the training list some classes have more videos
    train = [line for line in lines if int(line.split()[1]) % 2 or "_0" in line]
    (tmp_path / "train.txt").write_text("".join(f"{clips}/{line}" for line in train))
    for by, places in (("frequency", [1, 3, 5, 7]), ("order", [0, 1, 2, 3])):
        code, _, err = cli(
            "split", "base-novel", tmp_path / "train.txt", clips / "val.txt", "--labels", clips / "labels.csv",
            "--by", by, "--out", tmp_path / by,
        )  # fmt: skip
        assert code == 0, err
        names = read_labels(clips / "labels.csv")
        assert read_labels(tmp_path / by / "base_labels.csv") == [names[place] for place in places]
        for half in ("base", "novel"):
            found = read_dataset(tmp_path / by / f"{half}_val.txt", labels=tmp_path / by / f"{half}_labels.csv")
            assert len(found.samples) == 8


def test_each_bad_input_is_one_line_and_writes_nothing(clips: Path, tmp_path: Path, cli: Cli) -> None:
    val, labels, out = clips / "val.txt", clips / "labels.csv", tmp_path / "out"
    few = ("few-shot", val, "--labels", labels, "--out", out)
    assert "16 shots were asked for, class 'a disc, then a ring' has 2 videos and 7 more" in said(cli, *few)
    for shots in ("", "2,", "two", "0", "-1", "2;4"):
        assert "--shots takes numbers" in said(cli, *few, "--shots", shots)
    assert "none.txt" in said(cli, "few-shot", clips / "none.txt", "--labels", labels, "--out", out)
    assert "there is no folder" in said(
        cli, "few-shot", val, "--labels", labels, "--shots", "2", "--out", out / "below"
    )
    assert "not a folder" in said(cli, "few-shot", val, "--labels", labels, "--shots", "2", "--out", labels)
    halves = ("base-novel", val, "--labels", labels, "--out", out)
    assert "halved by frequency or order" in said(cli, *halves, "--by", "size")
    assert "one name" in said(cli, "base-novel", val, val, "--labels", labels, "--out", out)
    assert "draws of 160 classes were asked for" in said(cli, "new-classes", labels, _older(tmp_path), "--out", out)
    assert "older ones: give the newer list first" in said(cli, "new-classes", labels, labels, "--out", out)
    assert "--root was given without --videos" in said(
        cli, "new-classes", labels, _older(tmp_path), "--out", out, "--count", 2, "--root", clips
    )
    assert not out.exists()


def _older(folder: Path) -> Path:
    path = folder / "older.csv"
    path.write_text("id,name\n0,yoga\n")
    return path
