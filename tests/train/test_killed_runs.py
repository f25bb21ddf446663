"""Twenty kills at random places, and the run comes to the bits of one that nobody stopped."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from train_cases import run_settings, write_videos

from xclip_fast.train import train

HERE = Path(__file__).parent
KILLS = 20


@pytest.mark.slow
def test_twenty_kills_change_no_bit(tmp_path: Path) -> None:
    write_videos(tmp_path / "videos")
    settings = run_settings(
        tmp_path / "videos",
        model={"drop_path": 0.1},
        optimizer={"epochs": 20, "ema": 0.9},
        run={"checkpoint_steps": 1},
    )
    out = tmp_path / "killed"
    script = [sys.executable, str(HERE / "killed_runs.py"), json.dumps(settings), str(out), str(KILLS)]
    environment = {**os.environ, "PYTHONPATH": str(HERE.parents[1]), "OMP_NUM_THREADS": "1"}
    ended = subprocess.run(script, capture_output=True, text=True, env=environment, timeout=280)
    assert ended.returncode == 0, ended.stderr[-2000:]
    tries = json.loads(ended.stdout.splitlines()[-1])
    assert sum(found.startswith("killed") for found in tries) == KILLS, tries
    # they went on from different steps, and were stopped in both ways
    assert len({found.split("from ")[1] for found in tries}) > 5, tries
    assert any("amid" in found for found in tries)
    assert any("at step" in found for found in tries)
    train(settings, out, resume=True)
    whole = train(settings, tmp_path / "whole")
    for file in ("model.safetensors", f"checkpoints/step-{whole.steps:010}/trainer.safetensors"):
        assert (out / file).read_bytes() == (tmp_path / "whole" / file).read_bytes(), file
    logs = [
        [
            (line["step"], line["loss"], line["lr"])
            for line in map(json.loads, (run / "log.jsonl").read_text().splitlines())
        ]
        for run in (out, tmp_path / "whole")
    ]
    assert logs[0] == logs[1]
