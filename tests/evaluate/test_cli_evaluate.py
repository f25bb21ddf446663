"""The command: far above chance on the demo's clips, the same by two processes, one line for whatever is wrong."""

from __future__ import annotations

import json
import os
import re
import socket
import subprocess
import sys
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from xclip_fast.demo.clips import CLASSES

Cli = Callable[..., tuple[int, str, str]]


def one_line(err: str) -> str:
    """The one error line of a run."""
    lines = [line for line in err.splitlines() if not line.startswith("note: ")]
    assert len(lines) == 1, err
    assert lines[0].startswith("error: ")
    return lines[0]


def test_the_demo_is_far_above_chance(clips: Path, cli: Cli) -> None:
    code, out, _ = cli("evaluate", clips / "val.txt", "--labels", clips / "labels.csv", "--json", "--predictions")
    assert code == 0
    found = json.loads(out)
    assert (found["protocol"], found["clips"], found["crops"]) == ("full", 4, 3)
    [split] = found["splits"]
    # chance is 2 of 16
    assert split["top1"]["right"] >= 14
    assert split["top1"]["low"] > 0.5
    assert split["files"] == 16
    assert split["classes"] == list(CLASSES)
    assert sum(map(sum, split["confusion"])) == 16
    assert found["summary"] == {}
    # the figures follow from the predictions
    assert len(split["predictions"]) == 16
    right = sum(one["best"][0] == one["label"] for one in split["predictions"])
    assert split["top1"]["right"] == right == sum(split["confusion"][place][place] for place in range(8))
    assert all(one["probabilities"] == sorted(one["probabilities"], reverse=True) for one in split["predictions"])
    names = {Path(one["file"]).name: one["label"] for one in split["predictions"]}
    assert names == {f"{label}_{seed}.mp4": label for label in range(8) for seed in range(2)}


def test_wrong_labels_are_wrong_answers(clips: Path, tmp_path: Path, cli: Cli) -> None:
    # every clip labelled as its reversal
    lines = [f"{label}_{seed}.mp4 {label ^ 1}\n" for label in range(8) for seed in range(2)]
    (tmp_path / "val.txt").write_text("".join(lines))
    code, out, _ = cli(
        "evaluate", tmp_path / "val.txt", "--labels", clips / "labels.csv", "--root", clips, "--json", "--views", "1x1"
    )
    assert code == 0
    [split] = json.loads(out)["splits"]
    assert split["top1"]["right"] <= 2
    assert "predictions" not in split
    assert split["per_class"][0]["mistaken_for"][0] == CLASSES[1]


def test_several_lists_are_splits(clips: Path, tmp_path: Path, cli: Cli) -> None:
    lines = (clips / "val.txt").read_text().splitlines(keepends=True)
    (tmp_path / "one.txt").write_text("".join(lines[:8]))
    wrong = [f"{label}_1.mp4 {label ^ 1}\n" for label in range(8)]
    (tmp_path / "two.txt").write_text("".join(wrong))
    arguments = (
        "evaluate",
        tmp_path / "one.txt",
        tmp_path / "two.txt",
        "--labels",
        clips / "labels.csv",
        "--root",
        clips,
    )
    code, out, _ = cli(*arguments, "--protocol", "zero-shot", "--json")
    assert code == 0
    found = json.loads(out)
    values = [split["top1"]["value"] for split in found["splits"]]
    assert values[0] >= 0.75 > 0.25 >= values[1]
    top1 = found["summary"]["top1"]
    assert top1["values"] == values
    assert top1["mean"] == pytest.approx(sum(values) / 2)
    assert top1["std"] == pytest.approx(abs(values[0] - values[1]) / 2**0.5)
    code, out, _ = cli(*arguments, "--protocol", "zero-shot")
    assert code == 0
    assert f"{100 * top1['mean']:.1f} ± {100 * top1['std']:.1f}" in out
    assert max(map(len, out.splitlines())) <= 80 or str(tmp_path) in max(out.splitlines(), key=len)


def test_base_to_novel(clips: Path, tmp_path: Path, cli: Cli) -> None:
    code, _, err = cli(
        "split", "base-novel", clips / "val.txt", "--labels", clips / "labels.csv", "--root", clips, "--out", tmp_path
    )
    assert code == 0, err
    lists = [tmp_path / "base_val.txt", tmp_path / "novel_val.txt"]
    labels = [tmp_path / "base_labels.csv", tmp_path / "novel_labels.csv"]
    options = ("--protocol", "base-novel", "--root", clips)
    code, out, _ = cli("evaluate", *lists, "--labels", labels[0], "--labels", labels[1], *options, "--json")
    assert code == 0
    found = json.loads(out)
    assert [split["classes"] for split in found["splits"]] == [list(CLASSES[:4]), list(CLASSES[4:])]
    base, novel = (split["top1"]["value"] for split in found["splits"])
    assert found["summary"] == {
        "base": base,
        "novel": novel,
        "harmonic_mean": pytest.approx(2 * base * novel / (base + novel)),
    }
    assert min(base, novel) > 0.5
    code, _, err = cli("evaluate", lists[0], lists[0], "--labels", labels[0], *options)
    assert code == 2
    assert "in common" in one_line(err)
    code, _, err = cli("evaluate", lists[0], "--labels", labels[0], *options)
    assert "base-novel takes two lists, of base and of novel classes, found 1" in one_line(err)


def test_retrieval(clips: Path, cli: Cli) -> None:
    code, out, err = cli("evaluate", clips / "captions.txt", "--protocol", "retrieval", "--json")
    assert code == 0, err
    [split] = json.loads(out)["splits"]
    assert (split["files"], split["captions"]) == (8, 8)
    figures = split["figures"]
    # two videos share each caption: its own stands first or second
    assert figures["text_to_video"]["recall"]["5"]["value"] == 1
    assert figures["text_to_video"]["median"] <= 2
    assert figures["video_to_text"]["recall"]["5"]["value"] == 1
    code, out, _ = cli("evaluate", clips / "captions.txt", "--protocol", "retrieval")
    assert code == 0
    assert "text to video R@1 %" in out
    code, _, err = cli("evaluate", clips / "captions.txt", "--protocol", "retrieval", "--labels", clips / "labels.csv")
    assert code == 2
    assert "leave it out" in one_line(err)


def test_bad_videos_are_reported_and_count_in_no_figure(clips: Path, tmp_path: Path, cli: Cli) -> None:
    (tmp_path / "bad.mp4").write_text("no video")
    lines = [f"{clips}/{label}_0.mp4 {label}\n" for label in range(8)]
    (tmp_path / "val.txt").write_text("".join([*lines[:3], "bad.mp4 3\n", *lines[3:]]))
    code, out, err = cli(
        "evaluate", tmp_path / "val.txt", "--labels", clips / "labels.csv", "--views", "1x1", "--json", "--predictions"
    )
    assert code == 2
    assert "bad.mp4" in one_line(err)
    [split] = json.loads(out)["splits"]
    assert split["files"] == 9
    assert split["top1"]["total"] == 8
    assert list(split["failed"]) == [str(tmp_path / "bad.mp4")]
    assert [one["label"] for one in split["predictions"]] == list(range(8))
    code, out, _ = cli("evaluate", tmp_path / "val.txt", "--labels", clips / "labels.csv", "--views", "1x1")
    assert code == 2
    assert re.search(r"unusable +1\b", out)


def test_class_names_are_made_words(tmp_path: Path, clips: Path, cli: Cli) -> None:
    (tmp_path / "labels.csv").write_text("id,name\n0,AShapeMovingRight\n1,a_shape_moving_left\n")
    (tmp_path / "val.txt").write_text(f"{clips}/0_0.mp4 0\n{clips}/1_0.mp4 1\n")
    arguments = ("evaluate", tmp_path / "val.txt", "--labels", tmp_path / "labels.csv", "--views", "1x1", "--json")
    for option, first in (("--split-camel-case", "ashape moving right"), ("--keep-camel-case", "ashapemovingright")):
        code, out, _ = cli(*arguments, option)
        assert code == 0
        names = json.loads(out)["splits"][0]["classes"]
        assert names[1] == "a shape moving left"
        assert names[0].replace("a shape", "ashape") == first


class Page(HTMLParser):
    """What a browser would make of a page."""

    def __init__(self) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.text = ""
        self.attributes: list[tuple[str, str | None]] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += attrs

    def handle_data(self, data: str) -> None:
        self.text += data


def test_the_page_is_one_file_and_escapes_names(clips: Path, tmp_path: Path, cli: Cli) -> None:
    evil = "<script>alert(1)</script>"
    labels = ["id,name", f'0,"{evil}"', '1,"a & b $x^1$ \u4e2d"']
    (tmp_path / "labels.csv").write_text("\n".join(labels), encoding="utf-8")
    folder = tmp_path / "<img src=x onerror=alert(2)>"
    folder.mkdir()
    (folder / "bad.mp4").write_text("no video")
    (folder / "val.txt").write_text(f"{clips}/0_0.mp4 0\n{clips}/1_0.mp4 1\nbad.mp4 0\n")
    out = tmp_path / "out"
    code, _, _ = cli(
        "evaluate", folder / "val.txt", "--labels", tmp_path / "labels.csv", "--views", "1x1", "--out", out
    )
    assert code == 2
    assert sorted(path.name for path in out.iterdir()) == ["evaluation.html", "evaluation.json"]
    text = (out / "evaluation.html").read_text(encoding="utf-8")
    page = Page()
    page.feed(text)
    assert "script" not in page.tags
    assert "img" not in page.tags
    assert page.tags.count("svg") == 2
    assert evil in page.text
    assert "a & b $x^1$" in page.text
    assert "bad.mp4" in page.text
    assert not any(name.startswith("on") for name, _ in page.attributes)
    # nothing is fetched: what is linked lies in the page
    links = [value or "" for name, value in page.attributes if name in ("href", "src", "xlink:href")]
    assert all(value.startswith(("#", "data:")) for value in links)
    stored = json.loads((out / "evaluation.json").read_text())
    assert stored["splits"][0]["classes"][0] == evil


def test_a_path_that_is_no_unicode_is_spelled_out(clips: Path, tmp_path: Path, cli: Cli) -> None:
    folder = tmp_path / os.fsdecode(b"f\xff")
    folder.mkdir()
    (folder / "val.txt").write_text(f"{clips}/0_0.mp4 0\n{clips}/1_0.mp4 1\n")
    (tmp_path / "labels.csv").write_text("id,name\n0,left\n1,right\n")
    arguments = (folder / "val.txt", "--labels", tmp_path / "labels.csv", "--views", "1x1", "--out", folder / "out")
    code, _, err = cli("evaluate", *arguments)
    assert code == 0, err
    assert "f\\xff" in json.loads((folder / "out" / "evaluation.json").read_text())["splits"][0]["name"]
    assert "f\\xff" in (folder / "out" / "evaluation.html").read_text(encoding="utf-8")


def documented(text: str, heading: str) -> set[str]:
    """The keys that a table of the page names."""
    table = text.partition(heading)[2].partition("| key | |")[2].partition("\n\n")[0]
    return {key for row in re.findall(r"^\| (`[^|]*) \|", table, re.MULTILINE) for key in re.findall(r"`(\w+)`", row)}


def test_the_page_names_each_key_of_the_json(clips: Path, cli: Cli) -> None:
    text = (Path(__file__).parents[2] / "docs" / "start" / "evaluate.md").read_text(encoding="utf-8")
    arguments = ("evaluate", clips / "val.txt", "--labels", clips / "labels.csv", "--views", "1x1", "--json")
    found = json.loads(cli(*arguments, "--predictions")[1])
    assert set(found) == documented(text, "is one object")
    assert set(found["splits"][0]) == documented(text, "A split of labelled videos has")
    for key in ("calibration", "per_class", "predictions"):
        part = found["splits"][0][key]
        row = next(line for line in text.splitlines() if line.startswith(f"| `{key}`"))
        names = set(part[0]) if isinstance(part, list) else {*part, *part["bins"][0]}
        assert names <= set(re.findall(r"`(\w+)`", row))
    retrieved = json.loads(cli("evaluate", clips / "captions.txt", "--protocol", "retrieval", "--json")[1])["splits"][0]
    said = text.partition("and one of captions ")[2].partition("\n\n")[0]
    assert {*retrieved, *retrieved["figures"], *retrieved["figures"]["text_to_video"]} <= set(
        re.findall(r"`(\w+)`", said)
    )


def environment(rank: int, count: int, port: int) -> dict[str, str]:
    names = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": count, "LOCAL_WORLD_SIZE": count, "MASTER_PORT": port}
    found = {**os.environ, **{name: str(value) for name, value in names.items()}, "MASTER_ADDR": "127.0.0.1"}
    return {**found, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}


def together(count: int, *arguments: object) -> list[subprocess.CompletedProcess[str]]:
    """The command in several processes, as torchrun starts them."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "xclip_fast.cli", *map(str, arguments)]
    started = [
        subprocess.Popen(
            command, env=environment(rank, count, port), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        for rank in range(count)
    ]
    outputs = [one.communicate(timeout=240) for one in started]
    return [
        subprocess.CompletedProcess(command, one.returncode, out, err)
        for one, (out, err) in zip(started, outputs, strict=True)
    ]


@pytest.mark.slow
def test_two_processes_give_the_figures_of_one(clips: Path, tmp_path: Path) -> None:
    (tmp_path / "bad.mp4").write_text("no video")
    lines = (clips / "val.txt").read_text().splitlines()
    (tmp_path / "val.txt").write_text("".join(f"{clips}/{line}\n" for line in lines) + f"{tmp_path}/bad.mp4 5\n")
    options = (
        "--labels",
        clips / "labels.csv",
        "--predictions",
        "--views",
        "3x1",
        "--batch-size",
        4,
        "--device",
        "cpu",
    )
    found = []
    for count in (1, 2):
        out = tmp_path / f"by_{count}"
        done = together(count, "evaluate", tmp_path / "val.txt", *options, "--out", out)
        # the first process says what was found, and that a video could not be used
        assert [one.returncode for one in done] == [2] + [0] * (count - 1), done
        assert not any(one.stdout for one in done[1:])
        stored = json.loads((out / "evaluation.json").read_text())
        assert stored.pop("processes") == count
        found.append(stored)
    assert found[0] == found[1]
    assert found[0]["splits"][0]["top1"]["total"] == 16


@pytest.mark.slow
def test_of_several_processes_one_says_what_is_wrong(clips: Path, tmp_path: Path) -> None:
    done = together(2, "evaluate", tmp_path / "none.txt", "--labels", clips / "labels.csv")
    assert [one.returncode for one in done] == [2, 2]
    assert "none.txt" in one_line(done[0].stderr)
    assert "error:" not in done[1].stderr


def refused(cli: Cli, *arguments: Any) -> str:
    code, out, err = cli("evaluate", *arguments)
    assert (code, out) == (2, "")
    assert not err.startswith("note: the demo's model"), "the weights were read first"
    return one_line(err)


def test_each_bad_input_is_one_line_before_the_weights_are_read(clips: Path, tmp_path: Path, cli: Cli) -> None:
    val, labels = clips / "val.txt", clips / "labels.csv"

    def wrote(name: str, text: str) -> Path:
        (tmp_path / name).write_text(text)
        return tmp_path / name

    assert "none.txt" in refused(cli, tmp_path / "none.txt", "--labels", labels)
    assert "none.csv" in refused(cli, val, "--labels", tmp_path / "none.csv")
    assert "their names as labels" in refused(cli, val)
    missing = wrote("missing.txt", "0_0.mp4 0\n")
    assert "not there" in refused(cli, missing, "--labels", labels)
    beyond = wrote("beyond.txt", f"{clips}/0_0.mp4 8\n")
    assert "label 8" in refused(cli, beyond, "--labels", labels)
    few = wrote("few.csv", "id,name\n0,left\n1,right\n")
    assert "not in the label list" in refused(cli, val, "--labels", few)
    empty = wrote("empty.csv", labels.read_text() + "8,standing still\n")
    assert "standing still" in refused(cli, val, "--labels", empty)
    blank = wrote("blank.csv", 'id,name\n0,left\n1," "\n')
    assert "blank" in refused(cli, val, "--labels", blank)
    two = wrote("two.txt", f"{clips}/0_0.mp4 0\n{clips}/1_0.mp4 1\n")
    alike = wrote("alike.csv", "id,name\n0,MoveLeft\n1,move_left\n")
    assert "the same" in refused(cli, two, "--labels", alike)
    assert "1 lists of videos and 2 of labels" in refused(cli, val, "--labels", labels, "--labels", labels)
    assert "unknown protocol 'none'" in refused(cli, val, "--labels", labels, "--protocol", "none")
    assert "--views" in refused(cli, val, "--labels", labels, "--views", "4x2")
    assert "places '{}'" in refused(cli, val, "--labels", labels, "--template", "a video")
    assert "--timeout" in refused(cli, val, "--labels", labels, "--timeout", "0")
    assert "no such folder" in refused(cli, val, "--labels", labels, "--root", tmp_path / "none")
    # an --out that cannot be written
    assert "not a folder" in refused(cli, val, "--labels", labels, "--out", two)
    assert "there is no folder" in refused(cli, val, "--labels", labels, "--out", tmp_path / "a" / "b")
    (tmp_path / "out" / "evaluation.json").mkdir(parents=True)
    assert "not a file" in refused(cli, val, "--labels", labels, "--out", tmp_path / "out")


def test_empty_classes_are_taken_where_they_are_asked_for(clips: Path, tmp_path: Path, cli: Cli) -> None:
    (tmp_path / "labels.csv").write_text((clips / "labels.csv").read_text() + "8,standing still\n")
    arguments = ("evaluate", clips / "val.txt", "--labels", tmp_path / "labels.csv", "--views", "1x1", "--json")
    code, out, _ = cli(*arguments, "--empty-classes")
    assert code == 0
    [split] = json.loads(out)["splits"]
    assert split["per_class"][8]["accuracy"] is None
    assert len(split["confusion"]) == 9


def test_a_page_needs_its_libraries(clips: Path, tmp_path: Path, cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("xclip_fast.evaluate.page.find_spec", lambda name: None)
    said = refused(cli, clips / "val.txt", "--labels", clips / "labels.csv", "--out", tmp_path / "out")
    assert "pip install 'xclip-fast[train]'" in said
    assert not (tmp_path / "out").exists()


def test_processes_that_do_not_meet_are_one_line(clips: Path, cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.delenv("MASTER_ADDR", raising=False)
    assert "use torchrun" in refused(cli, clips / "val.txt", "--labels", clips / "labels.csv")
