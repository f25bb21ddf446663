"""Training and testing on clips that are made on the fly."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from xclip_fast.reference import XCLIP
from xclip_fast.reproduce import world
from xclip_fast.reproduce.models import tokenize
from xclip_fast.train import adamw, cosine_with_warmup, freeze_text, info_nce, parameter_groups

BATCH = 64  # clips
STILLS = 128
RATE = 5e-4  # of what CLIP has
NEW_FACTOR = 4.0  # of what X-CLIP adds, over that
PRETRAINING_RATE = 1e-3
WARM_UP = 50  # steps
WEIGHT_DECAY = 0.02
LARGEST_GRADIENT = 1.0
_TESTED_AT_ONCE = 128

Progress = Callable[[int], None]
Batches = Callable[[int], tuple[NDArray[np.uint8], NDArray[np.int64]]]


def pretrain(model: XCLIP, steps: int, seed: int, progress: Progress) -> None:
    """Train both towers on stills and captions, contrastively (InfoNCE)."""
    rng = np.random.default_rng([world.TRAINING, 0, seed])

    def loss() -> Tensor:
        stills, captions = world.make_stills(STILLS, rng)
        texts, labels = np.unique(captions, return_inverse=True)
        own = torch.from_numpy(labels)
        features = model.encode_video(torch.from_numpy(stills)[:, None]).video
        return info_nce(features, model.encode_text(tokenize(texts.tolist()))[own], model.logit_scale.exp(), own).mean()

    _train(model, loss, steps, PRETRAINING_RATE, progress)


def train(
    model: XCLIP, batches: Batches, texts: Sequence[str], steps: int, progress: Progress, frozen: bool = True
) -> None:
    """Train on clips, all but a frozen text tower, with the cross-entropy over class texts.

    Args:
        model: trained in place.
        batches: step to clips (B, T, H, W, 3) and labels (B,), indices into ``texts``.
        texts: of the classes, (K,).
        steps: of the optimiser.
        progress: called after each step with the steps done.
        frozen: whether the text tower and the logit scale stay as they are.
    """
    tokens = tokenize(texts)
    if frozen:
        freeze_text(model)
    with torch.no_grad():
        known = model.encode_text(tokens)
    step = -1

    def loss() -> Tensor:
        nonlocal step
        step += 1
        clips, labels = batches(step)
        encoded = known if frozen else model.encode_text(tokens)
        return cross_entropy(
            model.logits(model.encode_video(torch.from_numpy(clips)), encoded), torch.from_numpy(labels)
        )

    _train(model, loss, steps, RATE, progress)


def _train(model: XCLIP, loss: Callable[[], Tensor], steps: int, rate: float, progress: Progress) -> None:
    model.train()
    optimiser = adamw(parameter_groups(model.named_parameters(), rate, WEIGHT_DECAY, NEW_FACTOR))
    rates = [group["lr"] for group in optimiser.param_groups]
    for step in range(steps):
        for group, highest in zip(optimiser.param_groups, rates, strict=True):
            group["lr"] = cosine_with_warmup(step, steps, WARM_UP, highest)
        optimiser.zero_grad()
        loss().backward()
        nn.utils.clip_grad_norm_(model.parameters(), LARGEST_GRADIENT)
        optimiser.step()
        progress(step + 1)
    model.eval()


@torch.no_grad()
def answers(model: XCLIP, clips: NDArray[np.uint8], texts: Sequence[str]) -> NDArray[np.int64]:
    """The likeliest of the class texts for each clip, (B,)."""
    model.eval()
    known = model.encode_text(tokenize(texts))
    found = [
        model.logits(model.encode_video(part), known).argmax(dim=1)
        for part in torch.from_numpy(clips).split(_TESTED_AT_ONCE)
    ]
    return torch.cat(found).numpy()
