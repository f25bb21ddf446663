"""The scores of every video of a list, by one process or several, to the same bits."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import gcd
from typing import Any

import numpy as np
from numpy.typing import NDArray

from xclip_fast.errors import InputError
from xclip_fast.evaluate.processes import Processes, local_share
from xclip_fast.pipeline import classify_files
from xclip_fast.pipeline.batches import BATCH_SIZE
from xclip_fast.video.pool import DEADLINE_SECONDS, Source, default_workers

Report = Callable[[str, str | None], object]


@dataclass(frozen=True)
class Scored:
    """The scores of a list of videos.

    Attributes:
        scores: float32 (N, K), a row for each video that could be used.
        places: (N,), where these stand in the list, ascending.
        failed: where each other one stands, to why it cannot be used.

    Example:
        >>> import numpy as np
        >>> from xclip_fast.evaluate import Scored
        >>> Scored(np.ones((1, 2), np.float32), np.array([0]), {1: "b.mp4: damaged"}).failed[1]
        'b.mp4: damaged'
    """

    scores: NDArray[np.float32]
    places: NDArray[np.int64]
    failed: dict[int, str]


def score_files(
    model: Any,
    sources: Sequence[Source],
    texts: Any,
    *,
    logits: bool = False,
    among: Processes | None = None,
    report: Report = lambda path, error: None,
    batch_size: int = BATCH_SIZE,
    clips: int = 1,
    crops: int = 1,
    preset: str = "official",
    backend: str = "auto",
    workers: int | None = None,
    timeout: float = DEADLINE_SECONDS,
) -> Scored:
    """The class probabilities, or logits, of each video of a list.

    The list is cut into groups of files that fill whole batches, whoever computes them, and each process takes every
    n-th group. So what shares a batch, and with it every bit of the scores, does not depend on how many there are, as
    long as they run on the same kind of machine with the same number of threads.

    Args:
        model, texts, logits: as for ``classify_files``.
        sources: the videos.
        among: the processes that share the work; each gets the scores of all. By default this one alone.
        report: told each video of this process, with the reason where it cannot be used.
        batch_size, clips, crops, preset, backend, workers, timeout: as for ``classify_files``.

    Raises:
        InputError: no video can be used, or as ``classify_files``.

    Example:
        >>> import xclip_fast
        >>> from xclip_fast.demo.models import load_trained
        >>> from xclip_fast.evaluate import score_files
        >>> engine = xclip_fast.Engine(load_trained("xclip"))
        >>> found = score_files(engine, ["moving_right.mp4", "none.mp4"], ["moving right", "moving left"], preset="hf")
        >>> found.scores.shape, found.places.tolist(), list(found.failed)
        ((1, 2), [0], [1])
    """
    among = Processes() if among is None else among
    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, found {batch_size}")
    size = batch_size // gcd(batch_size, clips * crops)
    groups = [range(first, min(first + size, len(sources))) for first in range(0, len(sources), size)]
    own = [place for group in groups[among.rank :: among.count] for place in group]
    last = {group[-1] for group in groups}
    if workers is None:
        workers = local_share(default_workers(len(own)))
    rows, places, failed = [], [], {}
    files = classify_files(
        model,
        [sources[place] for place in own],
        texts,
        logits=logits,
        ends=frozenset(number for number, place in enumerate(own) if place in last),
        batch_size=batch_size,
        clips=clips,
        crops=crops,
        preset=preset,
        backend=backend,
        workers=workers,
        timeout=timeout,
    )
    for place, file in zip(own, files, strict=True):
        report(str(file.path), None if file.error is None else str(file.error))
        if file.scores is None:
            failed[place] = str(file.error)
        else:
            rows.append(file.scores.numpy())
            places.append(place)
    return _gathered(among, rows, places, failed, len(sources))


def _gathered(among: Processes, rows: list[Any], places: list[int], failed: dict[int, str], total: int) -> Scored:
    width = rows[0].size if rows else 0
    facts = [json.loads(part) for part in among.gather(json.dumps([width, places, [*failed.items()]]).encode())]
    parts = among.gather(np.stack(rows).tobytes() if rows else b"")
    width = max(fact[0] for fact in facts)
    errors = {place: error for fact in facts for place, error in fact[2]}
    if not width:
        why = f": {errors[min(errors)]}" if errors else ""
        raise InputError(f"none of the {total} videos could be used, the first{why}")
    found = np.concatenate([np.frombuffer(part, np.float32).reshape(-1, width) for part in parts if part])
    where = np.array([place for fact in facts for place in fact[1]], np.int64)
    order = np.argsort(where)
    return Scored(found[order], where[order], dict(sorted(errors.items())))


def shown_path(source: Source) -> str:
    """A source as results name it: what UTF-8 cannot hold is spelled out."""
    return os.fsencode(str(source)).decode("utf-8", "backslashreplace")
