"""Two processes come to the losses and weights of one, the last ragged batch included."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from train_cases import run_settings, write_videos

from xclip_fast.train import train

HERE = Path(__file__).parent
# beyond Adam's rounding: a key's bias has no gradient but noise, which a small eps blows up to whole steps
EPS = {"eps": 1e-4}


def cases(videos: Path) -> dict[str, dict[str, Any]]:
    # 9 videos in batches of 4: the last batch has one, so that the second process has none
    common = {"data": {"validation": str(videos / "validation.txt")}, "optimizer": EPS}
    return {
        "classes": run_settings(videos, **common),
        "sharded": run_settings(videos, **common, run={"engine": "fsdp2"}),
        "info_nce": run_settings(videos, optimizer=EPS, loss={"kind": "info_nce"}, model={"text": "tuned"}),
        "sigmoid": run_settings(videos, optimizer=EPS, loss={"kind": "sigmoid"}, model={"text": "tuned"}),
        "sharded sigmoid": run_settings(
            videos, optimizer=EPS, loss={"kind": "sigmoid"}, model={"text": "tuned"}, run={"engine": "fsdp2"}
        ),
    }


@pytest.mark.slow
def test_two_processes_are_one(tmp_path: Path) -> None:
    write_videos(tmp_path / "videos", count=9)
    settings = cases(tmp_path / "videos")
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    script = [str(HERE / "two_processes.py"), json.dumps(settings), str(tmp_path / "two")]
    environment = {**os.environ, "PYTHONPATH": str(HERE.parents[1]), "OMP_NUM_THREADS": "1"}
    ended = subprocess.run([*torchrun, *script], capture_output=True, text=True, env=environment, timeout=280)
    assert ended.returncode == 0, ended.stderr[-3000:]
    for name, setting in settings.items():
        one, two = tmp_path / "one" / name, tmp_path / "two" / name
        train(setting, one)
        logs = [[json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()] for run in (one, two)]
        assert [line["step"] for line in logs[1]] == [*range(1, 7)]
        for mine, theirs in zip(*logs, strict=True):
            assert abs(mine["loss"] - theirs["loss"]) <= 1e-5, name
            assert mine.get("validated") == theirs.get("validated")
            assert mine.get("top1") == theirs.get("top1")
        found, expected = (load_file(run / "model.safetensors") for run in (two, one))
        assert found.keys() == expected.keys()
        for key, value in expected.items():
            assert (found[key] - value).abs().max() <= 1e-5, (name, key)
        trainers = [load_file(run / "checkpoints" / "step-0000000006" / "trainer.safetensors") for run in (two, one)]
        assert trainers[0].keys() == trainers[1].keys()
        if "sigmoid" in name:
            assert abs(trainers[0]["logit_bias"] - trainers[1]["logit_bias"]) <= 1e-5
            assert trainers[0]["logit_bias"] != torch.tensor(-10.0)
        assert json.loads((two / "run.json").read_text())["processes"] == 2
