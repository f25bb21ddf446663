"""What the tests of evaluation share: clips of the demo with their lists, and the command in this process."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from xclip_fast import Engine
from xclip_fast.cli import main
from xclip_fast.demo.clips import CLASSES, make_clip
from xclip_fast.demo.models import load_trained
from xclip_fast.demo.mp4 import write_mp4

EACH = 2  # clips of each class


@pytest.fixture(scope="session")
def clips(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of the demo's held-out clips with ``val.txt``, ``labels.csv`` and ``captions.txt``; do not change it."""
    folder = tmp_path_factory.mktemp("clips")
    lines = []
    for seed in range(EACH):
        for label in range(len(CLASSES)):
            write_mp4(folder / f"{label}_{seed}.mp4", make_clip(label, seed))
            lines.append(f"{label}_{seed}.mp4 {label}\n")
    (folder / "val.txt").write_text("".join(lines))
    (folder / "labels.csv").write_text(
        "id,name\n" + "".join(f'{place},"{name}"\n' for place, name in enumerate(CLASSES))
    )
    captions = [f"{label}_{seed}.mp4\t{CLASSES[label]}\n" for label in range(4) for seed in range(EACH)]
    (folder / "captions.txt").write_text("".join(captions))
    return folder


@pytest.fixture(scope="session")
def engine() -> Any:
    return Engine(load_trained("xclip"))


@pytest.fixture
def cli(capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str, str]]:
    """Run a command in this process: (exit code, stdout, stderr)."""

    def call(*arguments: object) -> tuple[int, str, str]:
        code = main([str(argument) for argument in arguments])
        return code, *capsys.readouterr()

    return call
