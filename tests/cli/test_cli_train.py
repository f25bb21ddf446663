"""``xclip-fast train``: a run from a file, its words, and what it refuses."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import yaml
from cli_support import Cli, one_line

from xclip_fast.demo.clips import make_clip
from xclip_fast.demo.mp4 import write_mp4
from xclip_fast.train import RECIPES

SIZES = {"image_size": 32, "patch_size": 16, "vision_width": 64, "vision_layers": 1, "embed_dim": 64}
TEXT_SIZES = {"text_width": 64, "text_layers": 1, "vocab_size": 514, "context_length": 40}


@pytest.fixture
def run_file(tmp_path: Path) -> Path:
    """A configuration on four videos of two classes."""
    for number in range(4):
        folder = tmp_path / "videos" / ("moving right", "moving left")[number % 2]
        folder.mkdir(parents=True, exist_ok=True)
        write_mp4(folder / f"{number}.mp4", make_clip(number % 2, number, frames=range(0, 40, 5)))
    settings = {
        "model": {"sizes": {**SIZES, **TEXT_SIZES}, "frames": 4},
        "data": {"train": str(tmp_path / "videos"), "validation": str(tmp_path / "videos"), "workers": 0},
        "optimizer": {"epochs": 2, "warmup_epochs": 0, "batch_size": 2},
        "run": {"device": "cpu", "trackers": []},
    }
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump(settings))
    return path


@pytest.mark.slow
def test_a_run_and_what_goes_on_from_it(cli: Cli, run_file: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    code, shown, err = cli("train", run_file, "--out", out, "--set", "optimizer.epochs=1", "--json")
    assert (code, err) == (0, "")
    found = json.loads(shown)
    assert (found["weights"], found["steps"], found["quarantined"]) == (str(out / "model.safetensors"), 2, 0)
    assert 0 <= found["top1"] <= 1
    code, _, err = cli("train", run_file, "--out", out)
    assert code == 2
    one_line(err, "holds a run", "--resume")
    code, _, err = cli("train", run_file, "--out", out, "--resume")
    assert code == 2
    one_line(err, "optimizer.epochs differs")
    code, shown, err = cli("train", run_file, "--out", out, "--set", "optimizer.epochs=1", "--resume")
    assert code == 0
    assert "wrote" in err
    clip = next((tmp_path / "videos").rglob("*.mp4"))
    code, shown, _ = cli(
        "classify", clip, "--labels", "moving right,moving left", "--weights", out / "model.safetensors", "--json"
    )
    assert code == 0
    assert len(json.loads(shown)["results"][0]["predictions"]) == 2


def test_published_settings_are_listed(cli: Cli) -> None:
    code, shown, _ = cli("train", "--recipes", "--json")
    assert code == 0
    assert json.loads(shown)["recipes"].keys() == RECIPES.keys()
    code, shown, _ = cli("train", "--recipes")
    assert code == 0
    assert all(name in shown for name in RECIPES)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["train"], ["CONFIG.yaml --out DIR"]),
        (["train", "run.yaml"], ["CONFIG.yaml --out DIR"]),
        (["train", "none.yaml", "--out", "run"], ["none.yaml", "No such file"]),
        (["train", "{run}", "--out", "run", "--set", "optimizer.rate=1"], ["optimizer.rate", "no such key"]),
        (["train", "{run}", "--out", "run", "--set", "data.train=none.txt"], ["none.txt"]),
        (["train", "{run}", "--out", "{run}"], ["cannot make the folder"]),
    ],
)
def test_refusals_are_one_line(
    cli: Cli, run_file: Path, monkeypatch: pytest.MonkeyPatch, arguments: list[str], words: list[str]
) -> None:
    monkeypatch.chdir(run_file.parent)
    code, shown, err = cli(*(argument.format(run=run_file) for argument in arguments))
    assert (code, shown) == (2, "")
    one_line(err, *words)
    assert not (run_file.parent / "run" / "log.jsonl").exists()


def test_a_missing_package_is_named(cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "yaml", None)
    for name in [name for name in sys.modules if name.startswith("xclip_fast.train")]:
        monkeypatch.delitem(sys.modules, name)
    code, _, err = cli("train", "run.yaml", "--out", "run")
    assert code == 2
    one_line(err, "yaml", "pip install 'xclip-fast[train]'")
