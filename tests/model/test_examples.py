"""The examples in public docstrings run, and no public name of these rooms is without one."""

from __future__ import annotations

import doctest
import importlib
import inspect
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

from xclip_fast import checkpoints, devices, parallel, patch, pipeline, text, video

ROOMS = (checkpoints, pipeline, text, video)
PUBLIC = [getattr(room, name) for room in ROOMS for name in room.__all__ if callable(getattr(room, name))]
PUBLIC += [devices.find_device, parallel.fully_shard, patch.OptimizeReport, patch.optimize, patch.restore]
HOMES = sorted({thing.__module__ for thing in PUBLIC})


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder to work in, with a video: clip.mp4, 12 frames of 48 x 64."""
    av = pytest.importorskip("av", reason="writes the video of the examples")
    with av.open(str(tmp_path / "clip.mp4"), "w") as container:
        stream = container.add_stream("mpeg4", rate=10)
        stream.height, stream.width, stream.pix_fmt = 48, 64, "yuv420p"
        for shade in range(0, 240, 20):
            frame = av.VideoFrame.from_ndarray(np.full((48, 64, 3), shade, np.uint8), format="rgb24")
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    monkeypatch.chdir(tmp_path)
    return tmp_path


def examples(module: ModuleType) -> list[doctest.DocTest]:
    return [test for test in doctest.DocTestFinder(exclude_empty=True).find(module) if test.examples]


@pytest.mark.usefixtures("folder")
@pytest.mark.parametrize("name", HOMES)
def test_the_examples_run(name: str) -> None:
    module = importlib.import_module(name)
    runner = doctest.DocTestRunner()
    said: list[str] = []
    for test in examples(module):
        runner.run(test, out=said.append)
    assert runner.failures == 0, "".join(said)


@pytest.mark.parametrize("thing", PUBLIC, ids=lambda thing: thing.__qualname__)
def test_each_public_name_has_an_example(thing: object) -> None:
    assert "Example:\n" in (inspect.getdoc(thing) or "")
