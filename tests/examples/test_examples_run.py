"""Each example runs from its command line and learns; its own check of that can fail."""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "examples"
NEEDS = {
    "plain_torch": None,
    "accelerate_loop": "accelerate",
    "lightning_module": "lightning",
    "hf_trainer": "transformers",
    "lora_peft": "peft",
    "fsdp2": None,
}
TORCHRUN = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")
RUNS = {
    **{name: (name, (), ()) for name in NEEDS},
    "plain_torch, bfloat16 and checkpointing": ("plain_torch", (), ("--bfloat16", "--checkpointing")),
    "accelerate_loop, two processes": ("accelerate_loop", TORCHRUN, ()),
    "fsdp2, two processes": ("fsdp2", TORCHRUN, ()),
}


def run(name: str, before: tuple[str, ...], options: tuple[str, ...]) -> subprocess.CompletedProcess[str]:
    package = NEEDS[name]
    if package is not None and importlib.util.find_spec(package) is None:
        pytest.skip(f"{package} is not installed")
    command = [sys.executable, *before, str(FOLDER / f"{name}.py"), "--device", "cpu", *options]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=280)


def test_every_example_is_run_and_in_the_table() -> None:
    assert {path.stem for path in FOLDER.glob("[!_]*.py")} == set(NEEDS)
    table = (FOLDER / "README.md").read_text(encoding="utf-8")
    assert [name for name in NEEDS if f"| [{name}.py]({name}.py) |" not in table] == []
    assert [path.name for path in FOLDER.glob("*.py") if len(path.read_text().splitlines()) > 80] == []


@pytest.mark.parametrize("case", RUNS.values(), ids=RUNS)
@pytest.mark.slow
def test_an_example_learns(case: tuple[str, tuple[str, ...], tuple[str, ...]]) -> None:
    done = run(*case)
    assert done.returncode == 0, done.stderr[-3000:]
    first, last, steps = map(float, re.findall(r"^loss ([\d.]+) -> ([\d.]+) in (\d+) steps$", done.stdout, re.M)[0])
    assert last < 0.9 * first
    assert steps == 40


@pytest.mark.slow
def test_an_example_that_learns_nothing_fails() -> None:
    done = run("plain_torch", (), ("--lr", "0", "--steps", "20"))
    assert done.returncode == 1
    assert "the loss has not fallen" in done.stderr
