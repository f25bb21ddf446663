"""``train``: a configuration to a trained model, on one process or many, to be stopped and gone on with at any step."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Generator, Iterator
from contextlib import closing, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from xclip_fast.checkpoints import save_model
from xclip_fast.data import Batch, Draw, Quarantine, training_batches
from xclip_fast.devices import find_device
from xclip_fast.errors import InputError
from xclip_fast.model import XCLIP
from xclip_fast.text import TextCache
from xclip_fast.train.config import TrainConfig, load_config
from xclip_fast.train.log import RunLog, write_run
from xclip_fast.train.losses import smoothed_targets
from xclip_fast.train.mixing import Mixing, mix
from xclip_fast.train.optimizer import adamw, cosine_with_warmup, parameter_groups
from xclip_fast.train.plan import Plan
from xclip_fast.train.prepare import Videos, open_model, open_videos, tokens_of
from xclip_fast.train.state import Saved, newest_checkpoint, same_settings, save_checkpoint
from xclip_fast.train.step import Scored, losses
from xclip_fast.train.validation import validate
from xclip_fast.train.weights import MovingAverage, model_tensors, restore, trainer_tensors
from xclip_fast.video.pool import default_workers

CHECKPOINTS, WEIGHTS, BEST = "checkpoints", "model.safetensors", "best.safetensors"
# what may be another when a run goes on
_MAY_CHANGE = {"data": {"workers", "timeout"}, "run": {"device", "checkpoint_steps", "keep", "trackers"}}
_SHOWN = 8  # names of files in a message
_STREAM = 3

Progress = Callable[[dict[str, Any]], None]


@dataclass(frozen=True)
class TrainResult:
    """What a run came to.

    Attributes:
        weights: the trained model, for ``load_model``.
        steps: optimizer steps, in all.
        loss: of the last step.
        top1: accuracy on the validation videos after the last epoch, from 0 to 1, or None.
        best_top1: the highest after any epoch, of the weights in ``best.safetensors``, or None.
        quarantined: videos that this process could not use.

    Example:
        >>> from pathlib import Path
        >>> from xclip_fast.train import TrainResult
        >>> TrainResult(Path("run/model.safetensors"), steps=100, loss=0.5, top1=0.9, best_top1=0.9, quarantined=0).top1
        0.9
    """

    weights: Path
    steps: int
    loss: float
    top1: float | None
    best_top1: float | None
    quarantined: int


def train(
    config: TrainConfig | str | os.PathLike[str] | dict[str, Any],
    out: str | os.PathLike[str],
    *,
    resume: bool = False,
    progress: Progress | None = None,
) -> TrainResult:
    """Train a model by a configuration; started by torchrun or ``accelerate launch``, all processes train together.

    In ``out`` there are afterwards ``model.safetensors``, ``best.safetensors`` where there were validation videos,
    ``log.jsonl`` with a line a step, curves, ``run.json`` with all it takes to repeat the run, ``quarantine.json`` with
    the videos that could not be used, trackers' files, and the newest checkpoints. Random numbers depend on seed and
    step alone: a run that was stopped, at whatever step, and gone on with gives the same bits on one machine.

    Args:
        config: a configuration, its YAML file, or the dictionary that would hold.
        out: folder of the run, made if needed.
        resume: go on from the newest valid checkpoint in ``out``, or start where there is none.
        progress: called after each step with what the log's line holds, and ``steps``.

    Raises:
        InputError: the configuration, a list or the weights cannot be used, the folder holds a run already or one of
            another configuration, the disk is full, the loss is no number (the message names the videos).

    Example:
        >>> from xclip_fast.train import load_config, train
        >>> config = load_config({"recipe": "k400-b32-8", "data": {"train": "train.txt", "labels": "labels.csv"}})
        >>> result = train(config, out="runs/b32")  # doctest: +SKIP
    """
    settings = config if isinstance(config, TrainConfig) else load_config(config)
    find_device(settings.run.device)
    _check_trackers(settings.run.trackers)
    videos = open_videos(settings.data)
    folder = Path(os.fspath(out))
    kept = _open_folder(folder, resume)
    _check_same(kept, settings, videos)
    with torch.random.fork_rng():
        return _Run(settings, folder, videos, kept, progress or (lambda line: None))()


class _Run:
    """A run under way."""

    def __init__(
        self, settings: TrainConfig, folder: Path, videos: Videos, kept: Saved | None, progress: Progress
    ) -> None:
        from accelerate import Accelerator

        self.settings, self.folder, self.videos, self.progress = settings, folder, videos, progress
        self.accelerator = Accelerator(
            cpu=settings.run.device == "cpu", log_with=list(settings.run.trackers) or None, project_dir=str(folder)
        )
        self.device = self.accelerator.device
        self.rank, self.processes = self.accelerator.process_index, self.accelerator.num_processes
        optimizer = settings.optimizer
        self.plan = Plan(
            len(videos.train.samples),
            optimizer.batch_size,
            optimizer.epochs,
            settings.run.seed,
            self.processes,
            optimizer.accumulation,
        )
        model = open_model(settings.model, settings.run.seed).to(self.device)
        self.config = model.config
        self.texts = tokens_of(model, videos.texts).to(self.device)
        if settings.model.text == "frozen":
            self.texts = TextCache().encode(model, self.texts)
        self.module, self.engine = self._engines(model)
        trained = ((name, value) for name, value in self.module.named_parameters())
        groups = parameter_groups(trained, optimizer.lr, optimizer.weight_decay, optimizer.new_factor)
        self.rates = [group["lr"] for group in groups]
        self.optimizer = adamw(groups, optimizer.betas, optimizer.eps)
        self.average = None if optimizer.ema is None else MovingAverage(self.module, optimizer.ema)
        self.first, self.best = 0, None
        if kept is not None:
            tensors = kept.read("model"), kept.read("trainer")
            restore(self.module, self.optimizer, self.average, *tensors, where=str(kept.path))
            self.first, self.best = kept.step, kept.facts["best_top1"]
        self.loss, self.top1 = float("nan") if kept is None else kept.facts["loss"], None
        if kept is not None:
            self.top1 = kept.facts["top1"]

    def _engines(self, model: XCLIP) -> tuple[nn.Module, Any]:
        """The module whose parameters are trained, and what is called in its place."""
        scored = Scored(model, self.settings.loss.kind).to(self.device)
        if self.settings.run.engine == "fsdp2" and self.processes > 1:
            from torch.distributed.device_mesh import init_device_mesh

            from xclip_fast.parallel import average_gradient, fully_shard

            mesh = init_device_mesh(self.device.type, (self.processes,))
            fully_shard(model, mesh=mesh)
            for parameter in scored.parameters(recurse=False):
                average_gradient(parameter, mesh.get_all_groups())
            return scored, scored
        return scored, self.accelerator.prepare_model(scored)

    def __call__(self) -> TrainResult:
        main = self.accelerator.is_main_process
        if main:
            write_run(self.folder, _dump(self.settings), self.videos.facts(), str(self.device), self.processes)
        self.accelerator.init_trackers("tensorboard")
        log = RunLog(self.folder, self.first, self.accelerator.log) if main else None
        name = "quarantine.json" if main else f"quarantine-{self.rank}.json"
        quarantine = Quarantine(self.folder / name)
        try:
            with closing(self._batches(quarantine)) as batches:
                for step in range(self.first, self.plan.steps):
                    self._advance(step, batches, log)
        finally:
            if log is not None:
                log.close()
            for tracker in self.accelerator.trackers:
                tracker.finish()
        model = self._plain_model()
        if main:
            save_model(model, self.folder / WEIGHTS)
        self.accelerator.wait_for_everyone()
        return TrainResult(
            self.folder / WEIGHTS, self.plan.steps, self.loss, self.top1, self.best, len(quarantine.reasons)
        )

    def _batches(self, quarantine: Quarantine) -> Generator[Batch, None, None]:
        data = self.settings.data
        return training_batches(
            self.videos.train,
            self.plan.groups(self.first, self.rank),
            frames=self.config.frames,
            size=self.config.image_size,
            augmentation=self.videos.augmentation,
            seed=self.settings.run.seed,
            workers=data.workers,
            timeout=data.timeout,
            quarantine=quarantine,
        )

    def _advance(self, step: int, batches: Iterator[Batch], log: RunLog | None) -> None:
        """Make one step, and what comes after it: a line of the log, validation, a checkpoint."""
        start = time.perf_counter()
        waited = decoding = 0.0
        clips = 0
        torch.manual_seed(_seed_of(self.settings.run.seed, step, self.rank))
        shares = self.plan.shares(step, self.rank)
        size = self.plan.size(step)
        total = torch.zeros((), device=self.device)
        bad: list[str] = []
        for number, share in enumerate(shares, start=1):
            asked = time.perf_counter()
            batch = next(batches)
            waited += time.perf_counter() - asked
            decoding += batch.seconds
            clips += len(batch.labels)
            each = self._round(batch, share, size, last=number == len(shares))
            total += each.sum()
            if not bool(each.isfinite().all()):
                bad += [path for path, good in zip(batch.paths, each.isfinite().tolist(), strict=True) if not good]
        self.loss = float(self.accelerator.reduce(total)) / size
        if not np.isfinite(self.loss):
            raise InputError(self._not_finite(step, bad))
        norm = self._update(step)
        seconds = time.perf_counter() - start
        workers = self.settings.data.workers
        workers = default_workers(len(self.videos.train.samples)) if workers is None else workers
        line = {
            "epoch": step // self.plan.steps_per_epoch + 1,
            "loss": self.loss,
            "lr": self.optimizer.param_groups[0]["lr"],
            **({} if norm is None else {"gradient_norm": norm}),
            "clips_per_second": size / seconds,
            # of this process: what it would reach if the other never made it wait
            "compute_clips_per_second": clips / max(seconds - waited, 1e-9),
            "decode_clips_per_second": max(1, workers) * clips / decoding if decoding else None,
        }
        made = step + 1
        ends_epoch = made % self.plan.steps_per_epoch == 0
        if ends_epoch and self.videos.validation is not None:
            scores = self._validate(made)
            line |= scores
        if log is not None:
            log.add(made, **line)
        self.progress({"step": made, "steps": self.plan.steps, **line})
        every = self.settings.run.checkpoint_steps
        if made == self.plan.steps or (ends_epoch if every is None else made % every == 0):
            self._save_checkpoint(made)

    def _round(self, batch: Batch, share: list[Draw], size: int, last: bool) -> Tensor:
        """Gradients of a share of the batch; the loss of each of its videos."""
        count = len(batch.labels)
        labels, clips = batch.labels.to(self.device), batch.videos
        targets = smoothed_targets(labels, len(self.videos.names), self.settings.loss.label_smoothing)
        loss = self.settings.loss
        if loss.kind == "classes":
            seeds = [(self.settings.run.seed, draw.epoch, draw.place) for draw in share]
            clips, targets = mix(clips, targets, Mixing(loss.mixup, loss.cutmix, loss.switch), seeds)
            texts = self.texts
        else:
            texts = self.texts[labels] if count else self.texts[:1]
        if not count:
            # every process takes part in every exchange of gradients
            shape = 1, self.config.frames, self.config.image_size, self.config.image_size, 3
            clips = torch.zeros(shape, dtype=torch.uint8)
        alone = nullcontext() if last else self.accelerator.no_sync(self.engine)
        with alone:
            with torch.autocast(self.device.type, torch.bfloat16, self.settings.run.precision == "bfloat16"):
                logits = self.engine(clips.to(self.device, non_blocking=True), texts, count)
            each = losses(loss.kind, logits, targets, labels)
            # engines average over the processes
            (each.sum() * (self.processes / size)).backward()
        return each.detach()

    def _update(self, step: int) -> float | None:
        """Change the weights; the length of the gradient where it is limited."""
        settings = self.settings.optimizer
        warmup = int(settings.warmup_epochs * self.plan.steps_per_epoch)
        for group, rate in zip(self.optimizer.param_groups, self.rates, strict=True):
            least = settings.lr * settings.least_lr
            group["lr"] = cosine_with_warmup(step, self.plan.steps, warmup, rate, least)
        norm = None
        if settings.clip_norm is not None:
            found: Any = nn.utils.clip_grad_norm_(self.module.parameters(), settings.clip_norm)
            norm = float(found.full_tensor() if hasattr(found, "full_tensor") else found)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        if self.average is not None:
            self.average.update()
        return norm

    def _not_finite(self, step: int, bad: list[str]) -> str:
        names = ", ".join(bad[:_SHOWN]) + (f" and {len(bad) - _SHOWN} more" if len(bad) > _SHOWN else "")
        return (
            f"the loss of step {step + 1} is {self.loss}, from {names or 'videos of another process'}: look at these "
            "videos, or lower optimizer.lr; the last checkpoint is from before"
        )

    def _validate(self, made: int) -> dict[str, Any]:
        assert self.videos.validation is not None
        model = self._plain_model()
        dtype = getattr(torch, self.settings.run.precision)
        scores = validate(model, self.videos.validation, self.videos.texts, self.settings.data, dtype)
        self.top1 = scores["top1"]
        if self.top1 is not None and (self.best is None or self.top1 > self.best):
            self.best = self.top1
            if self.accelerator.is_main_process:
                save_model(model, self.folder / BEST)
        return scores

    def _plain_model(self) -> XCLIP:
        """The model as it is to be scored and saved: whole, its weights averaged where that was asked for."""
        tensors = model_tensors(self.module.get_submodule("model"), self.average)
        with torch.device("meta"):
            model = XCLIP(self.config).eval()
        model.load_state_dict({name: value.to(self.device) for name, value in tensors.items()}, assign=True)
        return model

    def _save_checkpoint(self, made: int) -> None:
        model = model_tensors(self.module.get_submodule("model"))
        trainer = trainer_tensors(self.module, self.optimizer, self.average)
        if self.accelerator.is_main_process:
            facts = {
                "settings": _dump(self.settings),
                "data": self.videos.facts(),
                "loss": self.loss,
                "top1": self.top1,
                "best_top1": self.best,
            }
            tensors = {"model": model, "trainer": trainer}
            save_checkpoint(self.folder / CHECKPOINTS, made, tensors, facts, self.settings.run.keep)
        self.accelerator.wait_for_everyone()


def _seed_of(*numbers: int) -> int:
    """A seed for PyTorch that other numbers do not share."""
    return int(np.random.SeedSequence([_STREAM, *numbers]).generate_state(1)[0])


def _check_trackers(names: list[str]) -> None:
    from accelerate.tracking import LOGGER_TYPE_TO_CLASS, get_available_trackers

    installed = {str(name) for name in get_available_trackers()}
    for name in names:
        if name not in LOGGER_TYPE_TO_CLASS:
            raise InputError(f"unknown tracker {name!r} in run.trackers: choose of {', '.join(LOGGER_TYPE_TO_CLASS)}")
        if name not in installed:
            raise InputError(f"tracker {name!r} in run.trackers is not installed: pip install {name}, or leave it out")


def _open_folder(folder: Path, resume: bool) -> Saved | None:
    """Make the folder of a run, or find what it goes on from."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"cannot make the folder {str(folder)!r}: {error.strerror}: choose another one") from None
    if resume:
        return newest_checkpoint(folder / CHECKPOINTS)
    if (folder / CHECKPOINTS).exists() or (folder / WEIGHTS).exists():
        raise InputError(f"{str(folder)!r} holds a run: go on with it (--resume), or choose another folder")
    return None


def _check_same(kept: Saved | None, settings: TrainConfig, videos: Videos) -> None:
    if kept is None:
        return
    now, then = (
        {name: _without(section, _MAY_CHANGE.get(name, set())) for name, section in found.items()}
        for found in (_dump(settings), kept.facts["settings"])
    )
    key = same_settings(now, then) or same_settings({"data": videos.facts()}, {"data": kept.facts["data"]})
    if key is not None:
        raise InputError(
            f"{str(kept.path)!r} is of another run: {key} differs: give its configuration, or another folder"
        )


def _without(section: Any, keys: set[str]) -> Any:
    return {key: value for key, value in section.items() if key not in keys} if isinstance(section, dict) else section


def _dump(settings: TrainConfig) -> dict[str, Any]:
    found: dict[str, Any] = settings.model_dump(mode="json")
    return found
