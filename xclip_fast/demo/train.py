"""Train the demo's models: ``python -m xclip_fast.demo.train`` writes the weights that the package ships.

The three models see the same clips in the same order and start from the same random numbers. On one machine with one
version of torch and one number of threads, the same seed gives the same bits; elsewhere, weights of the same quality.
Nothing is pretrained, so the tables that tell places, times and letters apart start wider than CLIP's and X-CLIP's.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from copy import deepcopy
from math import cos, pi
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor
from torch.nn.functional import cross_entropy

from xclip_fast.checkpoints import save_model
from xclip_fast.demo.clips import CLASSES, FRAMES, PAIRS, SAMPLED, TRAINING, VALIDATION, make_clip
from xclip_fast.demo.models import CONFIG, FOLDER, MODELS, build_model, load_trained, weights_path
from xclip_fast.demo.scores import score
from xclip_fast.files import replacing
from xclip_fast.reference import XCLIP
from xclip_fast.text import get_tokenizer
from xclip_fast.video.sampling import segment_indices, uniform_indices

STEPS = 1200
CLIPS_PER_PAIR = 4  # in a batch, and each of them backwards too
LEARNING_RATE = 1e-3
WARM_UP = 40  # steps
WEIGHT_DECAY = 0.05
LARGEST_GRADIENT = 1.0


def train(
    names: Sequence[str] = tuple(MODELS),
    *,
    seed: int = 0,
    steps: int = STEPS,
    progress: Callable[[int, dict[str, float]], None] | None = None,
) -> dict[str, XCLIP]:
    """Train some of ``MODELS`` side by side, end to end: vision, text and prompts.

    Args:
        names: which of the models.
        seed: of the weights and of the frames that are sampled; the clips are those of the training set, in order.
        steps: of the optimiser; the learning rate falls to zero over them.
        progress: called after each step with the steps done and the loss of each model.

    Returns:
        the models by name, in evaluation mode.
    """
    with _deterministic():
        models = {name: build_model(name, seed).train() for name in names}
        optimisers = {}
        for name, model in models.items():
            _widen_tables(model, seed)
            optimisers[name] = torch.optim.AdamW(
                model.parameters(), lr=LEARNING_RATE, betas=(0.9, 0.98), weight_decay=WEIGHT_DECAY
            )
        tokens = get_tokenizer(CONFIG)(CLASSES)
        for step in range(steps):
            videos, labels = _training_batch(step, seed)
            rate = LEARNING_RATE * min((step + 1) / WARM_UP, (1 + cos(pi * step / steps)) / 2)
            losses = {
                name: _update(model, optimisers[name], rate, videos, tokens, labels) for name, model in models.items()
            }
            if progress is not None:
                progress(step + 1, losses)
    return {name: model.eval() for name, model in models.items()}


def _update(
    model: XCLIP, optimiser: torch.optim.Optimizer, rate: float, videos: Tensor, tokens: Tensor, labels: Tensor
) -> float:
    for group in optimiser.param_groups:
        group["lr"] = rate
    loss = cross_entropy(model(videos, tokens), labels)
    optimiser.zero_grad()
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), LARGEST_GRADIENT)
    optimiser.step()
    return loss.item()


def _training_batch(step: int, seed: int) -> tuple[Tensor, Tensor]:
    rng = np.random.default_rng([seed, step])
    clips = [
        make_clip(2 * pair, step * CLIPS_PER_PAIR + number, TRAINING, segment_indices(FRAMES, SAMPLED, rng))
        for pair in range(len(PAIRS))
        for number in range(CLIPS_PER_PAIR)
    ]
    return _both_ways(clips)


def validation_clips(clips_per_class: int) -> tuple[Tensor, Tensor]:
    """Clips of the validation set: uint8 (B, T, H, W, 3) and their labels (B,)."""
    frames = uniform_indices(FRAMES, SAMPLED)
    clips = [make_clip(2 * pair, n, VALIDATION, frames) for pair in range(len(PAIRS)) for n in range(clips_per_class)]
    return _both_ways(clips)


def _both_ways(clips: list[np.ndarray]) -> tuple[Tensor, Tensor]:
    """The same number of clips of the first class of each pair, and their reversals, which are of the second."""
    forwards = torch.from_numpy(np.stack(clips))
    labels = torch.arange(0, len(CLASSES), 2).repeat_interleave(len(clips) // len(PAIRS))
    return torch.cat([forwards, forwards.flip(1)]), torch.cat([labels, labels + 1])


@torch.no_grad()
def _widen_tables(model: XCLIP, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for table, deviation in (
        (model.visual.positional_embedding, 0.5),
        (model.token_embedding.weight, 1.0),
        (model.positional_embedding, 1.0),
        (getattr(model.mit, "positional_embedding", None), 0.5),
    ):
        if table is not None:
            table.normal_(std=deviation, generator=generator)


@contextmanager
def _deterministic() -> Iterator[None]:
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before)


def save(models: dict[str, XCLIP], folder: Path) -> None:
    """Write weights as float16, half the size: ``load_trained`` reads them."""
    for name, trained in models.items():
        model = deepcopy(trained).half()
        path = weights_path(name, folder)
        if name == "xclip":
            save_model(model, path)
        else:
            with replacing(path) as temporary:
                save_file(model.state_dict(), temporary)


def main(arguments: Sequence[str] | None = None) -> None:
    """Train, save, and report accuracies on the validation set."""
    parser = argparse.ArgumentParser(prog="python -m xclip_fast.demo.train", description="Train the demo's models.")
    parser.add_argument("--out", type=Path, default=FOLDER, help="folder for the weights")
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS), help="which models to train")
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=2, help="of torch; another number gives other last bits")
    parser.add_argument("--clips", type=int, default=64, help="of each class, to validate on")
    options = parser.parse_args(arguments)
    if not options.out.is_dir():
        parser.error(f"--out {options.out} is no folder: make it first")
    torch.set_num_threads(options.threads)

    def show(step: int, losses: dict[str, float]) -> None:
        if step % 10 == 0 or step == options.steps:
            text = "  ".join(f"{name} {loss:.3f}" for name, loss in losses.items())
            print(f"\rstep {step}/{options.steps}  loss: {text}  ", end="", file=sys.stderr, flush=True)

    models = train(options.models, seed=options.seed, steps=options.steps, progress=show)
    print(file=sys.stderr)
    save(models, options.out)
    videos, labels = validation_clips(options.clips)
    tokens = get_tokenizer(CONFIG)(CLASSES)
    with torch.inference_mode():
        for name in models:
            result = score(name, load_trained(name, options.out)(videos, tokens), labels)
            print(f"{result.title}: validation top-1 {result.top1:.1%}, within pairs {result.pair_accuracy:.1%}")


if __name__ == "__main__":
    main()
