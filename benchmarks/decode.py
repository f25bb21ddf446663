"""How fast training batches are decoded beside the bare pool on the same videos: ``python -m benchmarks decode``.

The two take turns. A rate is of the clips between the first batch and the last, when all processes are up. On a machine
with other work the processor seconds of a clip, of this process and those that decode, say more than the clock.
"""

from __future__ import annotations

import json
import os
import statistics
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np

from xclip_fast.data import Augmentation, Dataset, Draw, Quarantine, Sample, training_batches
from xclip_fast.errors import InputError
from xclip_fast.files import check_writable, replacing
from xclip_fast.video.pool import decode_files

FRAMES, SIZE, BATCH = 8, 224, 8
KINDS = {
    "pool": None,
    "training, no augmentation": Augmentation.none(),
    "training": Augmentation(),
}


def measure(videos: Sequence[str], clips: int, workers: int, rounds: int, out: Path | None) -> int:
    """Print clips a second of each kind, and of each round the ratio to the pool.

    Args:
        videos: files; without any some are made, 340 x 256 and 250 frames of H.264.
        clips: of a turn, in batches of 8, one of them not counted.
        workers: processes.
        rounds: turns of each kind.
        out: where the figures go as JSON.

    Raises:
        InputError: there are too few clips, a video cannot be used, or ``out`` cannot be written.
    """
    if clips < 3 * BATCH or clips % BATCH or workers < 1 or rounds < 1:
        raise InputError(f"--clips takes a multiple of {BATCH} from {3 * BATCH}, --workers and --rounds at least 1")
    if out is not None:
        check_writable(out)
    with tempfile.TemporaryDirectory() as folder:
        paths = list(videos) or _made(Path(folder))
        turns: dict[str, list[dict[str, float]]] = {kind: [] for kind in KINDS}
        for number in range(rounds):
            for kind in KINDS if number % 2 == 0 else reversed(KINDS):
                turns[kind].append(_turn(KINDS[kind], paths, clips, workers))
    ratios: dict[str, dict[str, list[float]]] = {}
    for kind, found in turns.items():
        pairs = list(zip(found, turns["pool"], strict=True))
        ratios[kind] = {
            "clips_per_second": [one["clips_per_second"] / pool["clips_per_second"] for one, pool in pairs],
            "cpu_seconds": [pool["cpu_seconds"] / one["cpu_seconds"] for one, pool in pairs],
        }
    print(f"{workers} processes, {clips} clips a turn, {rounds} rounds: medians")
    print(f"{'':28}{'clips/s':>10}{'to pool':>10}{'CPU s/clip':>12}{'to pool':>10}")
    for kind, found in turns.items():
        rate, cpu = (statistics.median(one[key] for one in found) for key in ("clips_per_second", "cpu_seconds"))
        by_clock, by_cpu = (statistics.median(one) for one in ratios[kind].values())
        print(f"{kind:28}{rate:10.1f}{by_clock:10.3f}{cpu:12.4f}{by_cpu:10.3f}")
    if out is not None:
        options = {"workers": workers, "clips": clips, "frames": FRAMES, "size": SIZE}
        with replacing(out) as unfinished:
            text = json.dumps({**options, "turns": turns, "to_pool": ratios}, indent=1)
            unfinished.write_text(text + "\n", encoding="utf-8")
    return 0


def _turn(augmentation: Augmentation | None, paths: Sequence[str], clips: int, workers: int) -> dict[str, float]:
    chosen = [paths[number % len(paths)] for number in range(clips)]
    marks = []
    with closing(_batches(augmentation, chosen, workers)) as batches:
        for _ in batches:
            marks.append((time.perf_counter(), _cpu_seconds()))
            # the last ones are decoded by fewer processes, which end meanwhile
            if len(marks) == clips // BATCH - 1:
                break
    counted = (len(marks) - 1) * BATCH
    (start, cpu_start), (end, cpu_end) = marks[0], marks[-1]
    return {"clips_per_second": counted / (end - start), "cpu_seconds": (cpu_end - cpu_start) / counted}


def _batches(augmentation: Augmentation | None, paths: Sequence[str], workers: int) -> Iterator[Any]:
    if augmentation is None:
        with closing(decode_files(paths, frames=FRAMES, size=SIZE, workers=workers)) as decoded:
            for number, found in enumerate(decoded, start=1):
                if isinstance(found, InputError):
                    raise found
                if number % BATCH == 0:
                    yield None
        return
    dataset = Dataset(tuple(Sample(path, 0) for path in paths), ("any",))
    groups = [[Draw(0, place, place) for place in range(at, at + BATCH)] for at in range(0, len(paths), BATCH)]
    yield from training_batches(
        dataset,
        groups,
        frames=FRAMES,
        size=SIZE,
        augmentation=augmentation,
        seed=0,
        workers=workers,
        quarantine=Quarantine(),
    )


def _cpu_seconds() -> float:
    """Of this process, and of those that decode for it."""
    ticks = 0
    for entry in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = entry.read_text().rpartition(")")[2].split()
        except OSError:
            continue  # it ended meanwhile
        if int(fields[1]) == os.getpid():
            ticks += int(fields[11]) + int(fields[12])
    return time.process_time() + ticks / os.sysconf("SC_CLK_TCK")


def _made(folder: Path) -> list[str]:
    from xclip_fast.demo.mp4 import write_mp4

    y, x = np.mgrid[:256, :340]
    paths = []
    for number in range(4):
        waves = np.random.default_rng(number).normal(size=(6, 3)) / 30
        frames = np.empty((250, 256, 340, 3), np.uint8)
        for time_, frame in enumerate(frames):
            parts = [np.sin(a * x + b * y + 9 * c * time_) for a, b, c in waves]
            frame[:] = np.stack([127 + 60 * parts[channel] + 60 * parts[channel + 3] for channel in range(3)], -1)
        paths.append(str(folder / f"{number}.mp4"))
        write_mp4(Path(paths[-1]), frames)
    return paths
