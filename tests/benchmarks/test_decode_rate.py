"""The command that sets training batches beside the bare pool."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from benchmarks.__main__ import main
from xclip_fast.demo.mp4 import write_mp4

pytest.importorskip("av")
pytest.importorskip("torchvision")


@pytest.mark.slow
def test_rates_of_each_kind(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    clip, out = tmp_path / "clip.mp4", tmp_path / "rates.json"
    write_mp4(clip, np.zeros((12, 48, 64, 3), np.uint8))
    options = ["--clips", "24", "--workers", "1", "--rounds", "1", "--json", str(out)]
    assert main(["decode", str(clip), *options]) == 0
    assert "training, no augmentation" in capsys.readouterr().out
    found = json.loads(out.read_text())
    assert found["to_pool"]["pool"] == {"clips_per_second": [1.0], "cpu_seconds": [1.0]}
    for kind in ("pool", "training", "training, no augmentation"):
        assert found["turns"][kind][0]["clips_per_second"] > 0
        assert len(found["to_pool"][kind]["cpu_seconds"]) == 1


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--clips", "20"], "--clips takes a multiple of 8"),
        (["--workers", "0"], "--workers"),
        (["--json", "/no/such/folder/file.json"], "no folder"),
    ],
)
def test_bad_options_are_one_line(options: list[str], words: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["decode", *options]) == 2
    assert words in capsys.readouterr().err
