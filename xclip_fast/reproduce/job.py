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
from torch import Tensor

from xclip_fast.files import replacing
from xclip_fast.reference import XCLIP
from xclip_fast.reproduce import learn, world
from xclip_fast.reproduce.models import build_model, clip_weights
from xclip_fast.reproduce.plan import CLIP, FEW_SHOT, LADDER, PRETRAINING, SCRATCH, VIDEOS, ZERO_SHOT, Job

TEXTS = [one.text for one in world.CLASSES]
UNSEEN = np.array([one.unseen for one in world.CLASSES])


def run_job(job: Job, folder: Path, tested: int, progress: Callable[[int], None]) -> dict[str, Any]:
    """Run it.

    Args:
        job: which.
        folder: for weights. The pretraining and zero-shot training leave theirs, for those that start from them.
        tested: clips to test on, the same for every run.
        progress: called after each step with the steps done.

    Returns:
        the figures of the run, ready for JSON.
    """
    start = time.process_time()
    model = _start(job, folder)
    figures: dict[str, Any]
    if job.kind == PRETRAINING:
        learn.pretrain(model, job.steps, job.seed, progress)
        _save(clip_weights(model), weights_path(job, folder))
        figures = _name_stills(model, tested)
    else:
        classes = training_classes(job)
        # texts of classes that are not trained on are not seen in training, as negatives neither
        texts = [TEXTS[one] for one in classes]
        learn.train(model, batches(job), texts, job.steps, progress, frozen=job.start != SCRATCH)
        if leaves_weights(job):
            _save(model.state_dict(), weights_path(job, folder))
        figures = _test(model, job, tested)
    return {**figures, "cpu_seconds": round(time.process_time() - start, 1)}


def leaves_weights(job: Job) -> bool:
    """Whether others start from what it has learned."""
    return job.kind in (PRETRAINING, ZERO_SHOT)


def weights_path(job: Job, folder: Path) -> Path:
    """Where a run leaves its weights."""
    return folder / f"{job.name}.safetensors"


def training_classes(job: Job) -> NDArray[np.int64]:
    """Indices of the classes that a run is trained on: all, but zero-shot the seen and few-shot the unseen ones."""
    return {LADDER: np.arange(len(TEXTS)), ZERO_SHOT: np.flatnonzero(~UNSEEN), FEW_SHOT: np.flatnonzero(UNSEEN)}[
        job.kind
    ]


def _start(job: Job, folder: Path) -> XCLIP:
    clip = None
    if job.start == CLIP:
        clip = load_file(folder / "pretraining-mean-0.safetensors")
    model = build_model(job.model, job.seed, clip)
    if job.start == VIDEOS:
        model.load_state_dict(load_file(folder / f"{ZERO_SHOT}-{job.model}-{job.seed}.safetensors"))
    return model


def _save(weights: dict[str, Tensor], path: Path) -> None:
    with replacing(path) as temporary:
        save_file({name: value.contiguous() for name, value in weights.items()}, temporary)


def batches(job: Job) -> learn.Batches:
    """The training clips of a run: new ones in each step, or of a few-shot run always the same few.

    Labels are indices into ``training_classes``. The clips of K shots are among those of more.
    """
    classes = training_classes(job)
    rng = np.random.default_rng([world.TRAINING, 1, job.seed])
    if job.kind != FEW_SHOT:

        def endless(step: int) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
            labels = rng.integers(len(classes), size=learn.BATCH)
            return world.make_clips(classes[labels], rng), labels

        return endless
    assert job.shots is not None
    labels = np.tile(np.arange(len(classes)), job.shots)
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
    if job.kind == LADDER:
        return _accuracies(learn.answers(model, clips, TEXTS), labels)
    new, unseen = UNSEEN[labels], np.flatnonzero(UNSEEN)
    among_new = unseen[learn.answers(model, clips[new], [TEXTS[label] for label in unseen])]
    figures = _accuracies(among_new, labels[new])
    if job.kind == ZERO_SHOT:
        figures["among_all"] = _accuracies(learn.answers(model, clips[new], TEXTS), labels[new])["top1"]
        figures["seen"] = _accuracies(learn.answers(model, clips[~new], TEXTS), labels[~new])["top1"]
    return figures


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
