"""Small clips, each told from the others by its grey."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from xclip_fast.demo.mp4 import write_mp4


@pytest.fixture(scope="session")
def grey_clip(tmp_path_factory: pytest.TempPathFactory) -> Callable[[int], Path]:
    """A clip of 12 frames of 48 x 64, all of one grey, that is written once."""
    pytest.importorskip("av")
    folder = tmp_path_factory.mktemp("greys")

    def get(grey: int) -> Path:
        path = folder / f"{grey}.mp4"
        if not path.exists():
            write_mp4(path, np.full((12, 48, 64, 3), grey, np.uint8))
        return path

    return get
