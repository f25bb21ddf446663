"""One run: build, train, test."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.torch import load_file, save_file

from xclip_fast.files import replacing
from xclip_fast.reference import XCLIP
from xclip_fast.reproduce import learn, world
from xclip_fast.reproduce.models import build_model, clip_weights
from xclip_fast.reproduce.plan import FEW_SHOT, PRETRAINING, ZERO_SHOT, Job

TEXTS = [one.text for one in world.CLASSES]
UNSEEN = np.array([one.unseen for one in world.CLASSES])
_EVERY = np.arange(len(world.CLASSES))


def run_job(job: Job, clip: Path, tested: int, progress: Callable[[int], None]) -> dict[str, Any]:
    """Run it.

    Args:
        job: which.
        clip: file of the tiny CLIP's weights, which the pretraining writes and the others read.
        tested: clips to test on, the same for every run.
        progress: called after each step with the steps done.

    Returns:
        the figures of the run, ready for JSON.
    """
    start = time.process_time()
    model = build_model(job.model, job.seed, load_file(clip) if job.pretrained else None)
    figures: dict[str, Any]
    if job.kind == PRETRAINING:
        learn.pretrain(model, job.steps, job.seed, progress)
        with replacing(clip) as temporary:
            save_file(clip_weights(model), temporary)
        figures = _name_stills(model, tested)
    else:
        seen = np.flatnonzero(~UNSEEN) if job.kind == ZERO_SHOT else _EVERY
        learn.train(model, batches(job, seen), TEXTS, job.steps, progress, frozen=job.pretrained)
        figures = _test(model, job, tested)
    return {**figures, "cpu_seconds": round(time.process_time() - start, 1)}


def batches(job: Job, classes: NDArray[np.int64]) -> learn.Batches:
    """The training clips of a run: new ones in each step, or of a few-shot run always the same few.

    The clips of K shots are among those of more.
    """
    rng = np.random.default_rng([world.TRAINING, 1, job.seed])
    if job.kind != FEW_SHOT:

        def endless(step: int) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
            labels = classes[rng.integers(len(classes), size=learn.BATCH)]
            return world.make_clips(labels, rng), labels

        return endless
    assert job.shots is not None
    labels = np.tile(classes, job.shots)
    # one call a shot: what comes later changes nothing of what came first
    shots = np.random.default_rng([world.TRAINING, 2, job.seed])
    clips = np.concatenate([world.make_clips(classes, shots) for _ in range(job.shots)])

    def few(step: int) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
        drawn = rng.permutation(len(labels))[: learn.BATCH]
        return clips[drawn], labels[drawn]

    return few


def held_out(count: int, split: int = world.TEST) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
    """Clips to test on, of all classes alike and with all kinds of shapes, and their labels."""
    labels = np.arange(count) % len(world.CLASSES)
    return world.make_clips(labels, np.random.default_rng([split, 1]), least=world.MOST), labels


def _test(model: XCLIP, job: Job, tested: int) -> dict[str, Any]:
    clips, labels = held_out(tested)
    if job.kind != ZERO_SHOT:
        return _accuracies(learn.answers(model, clips, TEXTS), labels)
    new, unseen = UNSEEN[labels], np.flatnonzero(UNSEEN)
    among_new = unseen[learn.answers(model, clips[new], [TEXTS[label] for label in unseen])]
    return {
        **_accuracies(among_new, labels[new]),
        "among_all": _accuracies(learn.answers(model, clips[new], TEXTS), labels[new])["top1"],
        "seen": _accuracies(learn.answers(model, clips[~new], TEXTS), labels[~new])["top1"],
    }


def _accuracies(found: NDArray[np.int64], labels: NDArray[np.int64]) -> dict[str, Any]:
    """The share of right answers, and of those whose words are right, each by itself."""
    parts = np.array(world.CLASSES)
    words = (parts[found] == parts[labels]).mean(axis=0)
    names = world.Class._fields
    return {"top1": float((found == labels).mean()), "words": dict(zip(names, map(float, words), strict=True))}


def _name_stills(model: XCLIP, tested: int) -> dict[str, Any]:
    """How often the tiny CLIP picks the caption that names all of a still, among all such captions."""
    stills, facts = world.make_stills(tested, np.random.default_rng([world.TEST, 0]), share=1.0)
    texts = sorted(set(facts))
    found = learn.answers(model, stills[:, None], texts)
    return {"top1": float(np.mean([texts[answer] == fact for answer, fact in zip(found, facts, strict=True)]))}


def single_threaded() -> None:
    """One thread: two processes share two cores, and the same seed gives the same bits."""
    torch.set_num_threads(1)
