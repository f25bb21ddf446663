"""What the tests of whole runs share: tiny videos of four classes that their colour tells apart, and settings."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from xclip_fast.demo.mp4 import write_mp4

CLASSES = ("red light", "green light", "blue light", "white light")
_COLOURS = np.array([[220, 30, 30], [30, 220, 30], [30, 30, 220], [220, 220, 220]])
SIZES = {
    "image_size": 32,
    "patch_size": 16,
    "vision_width": 64,
    "vision_layers": 2,
    "embed_dim": 64,
    "text_width": 64,
    "text_layers": 1,
    "vocab_size": 514,
    "context_length": 16,
}


def write_videos(folder: Path, count: int = 11, seed: int = 0) -> None:
    """Videos, ``train.txt``, ``validation.txt`` (the same videos) and ``labels.csv`` in a folder."""
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(seed)
    lines = []
    for number in range(count):
        label = number % len(CLASSES)
        frames = _COLOURS[label] + rng.integers(-25, 25, size=(6, 36, 40, 3))
        write_mp4(folder / f"a clip {number}.mp4", frames.clip(0, 255).astype(np.uint8))
        lines.append(f"a clip {number}.mp4 {label}\n")
    for name in ("train.txt", "validation.txt"):
        (folder / name).write_text("".join(lines))
    labels = "".join(f"{number},{name}\n" for number, name in enumerate(CLASSES))
    (folder / "labels.csv").write_text(f"id,name\n{labels}")


def run_settings(folder: Path, **sections: dict[str, Any]) -> dict[str, Any]:
    """A run of six steps, 2 epochs of 11 videos in batches of 4; ``sections`` go over it."""
    settings: dict[str, dict[str, Any]] = {
        "model": {"sizes": SIZES, "frames": 4},
        "data": {
            "train": str(folder / "train.txt"),
            "root": str(folder),
            "labels": str(folder / "labels.csv"),
            "workers": 0,
        },
        "optimizer": {"lr": 1e-3, "new_factor": 1, "epochs": 2, "warmup_epochs": 1, "batch_size": 4},
        "run": {"device": "cpu", "trackers": []},
    }
    return {name: {**settings.get(name, {}), **sections.get(name, {})} for name in {**settings, **sections}}
