"""``xclip-fast demo``: the shipped weights end to end, and what happens when the figures are bad."""

from __future__ import annotations

import json
import os
from dataclasses import replace
from pathlib import Path

import pytest
from cli_support import Cli, one_line

import xclip_fast.demo
from xclip_fast.demo import DemoResult, Score
from xclip_fast.demo.clips import CLASSES

PAIRS = {f"{CLASSES[2 * pair]} / {CLASSES[2 * pair + 1]}": 1.0 for pair in range(len(CLASSES) // 2)}
GOOD = DemoResult(
    clips=128,
    frames=40,
    folder=None,
    classes=CLASSES,
    scores=(
        Score("xclip", "X-CLIP", 0.961, 0.984, PAIRS),
        Score("no_cfa", "X-CLIP without CFA", 0.8, 0.85, PAIRS),
        Score("average", "frame averaging", 0.41, 0.507, PAIRS),
    ),
    video=None,
    seconds=1.0,
)
DULL = replace(GOOD, scores=(replace(GOOD.scores[0], top1=0.94), *GOOD.scores[1:]))
TOO_CLEVER = replace(GOOD, scores=(*GOOD.scores[:2], replace(GOOD.scores[2], pair_accuracy=0.61)))


@pytest.mark.parametrize(("result", "code"), [(GOOD, 0), (DULL, 1), (TOO_CLEVER, 1)], ids=["good", "dull", "clever"])
def test_the_exit_code_is_the_check(result: DemoResult, code: int, cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(xclip_fast.demo, "run", lambda *_: result)
    found, out, err = cli("demo")
    assert found == code
    assert ("the check failed" in err) == (code == 1)
    for score in result.scores:
        assert score.title in out
        assert f"{score.top1:.1%}" in out
        assert f"{score.pair_accuracy:.1%}" in out
    assert max(map(len, out.splitlines())) <= 80

    found, out, _ = cli("demo", "--json")
    assert found == code
    assert json.loads(out)["passed"] == (code == 0)


@pytest.mark.slow
def test_the_shipped_model_on_real_files(cli: Cli, bikes: Path, tmp_path: Path) -> None:
    code, out, err = cli("demo", "--clips-per-class", "2", "--out", tmp_path / "clips", "--video", bikes, "--json")
    assert (code, err) == (0, "")
    answer = json.loads(out)
    assert answer["clips"] == len(os.listdir(tmp_path / "clips")) == 2 * len(CLASSES)
    assert answer["scores"][0]["top1"] >= 0.95
    assert answer["video"]["path"] == str(bikes)

    # the files it wrote are videos like any other, and the demo's model the default one
    clip = tmp_path / "clips" / "a_shape_growing_000.mp4"
    code, out, err = cli("classify", clip, "--labels", "a shape growing,a shape shrinking", "--json")
    assert code == 0
    assert err.startswith("note: the demo's model knows nothing but its moving shapes")
    assert err.count("\n") == 1
    assert json.loads(out)["preset"] == "hf"
    assert json.loads(out)["results"][0]["predictions"][0]["label"] == "a shape growing"


@pytest.mark.slow
def test_ten_thousand_labels_for_the_shipped_model(cli: Cli, bikes: Path, tmp_path: Path) -> None:
    (tmp_path / "labels.txt").write_text("\n".join(f"class {number}" for number in range(10_000)))
    code, out, _ = cli("classify", bikes, "--labels-file", tmp_path / "labels.txt", "--json")
    assert code == 0
    assert json.loads(out)["classes"] == 10_000


def test_a_bad_video_ends_the_demo_before_the_work(cli: Cli, bad_files: dict[str, Path], tmp_path: Path) -> None:
    code, out, err = cli("demo", "--video", bad_files["text"], "--out", tmp_path / "clips")
    assert (code, out) == (2, "")
    one_line(err, str(bad_files["text"]))
    assert not os.listdir(tmp_path)
