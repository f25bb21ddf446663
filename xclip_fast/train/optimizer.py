"""AdamW as the official recipe has it: groups by name, and a learning rate for each step."""

from __future__ import annotations

from collections.abc import Iterable
from math import cos, pi
from typing import Any

import torch
from torch import nn

# what X-CLIP adds to CLIP starts from random weights and learns faster (the official utils/optimizer.py)
NEW_PARTS = ("message_", "mit", "prompts")
_NO_DECAY = "positional_embedding"


def freeze_text(model: nn.Module) -> None:
    """Leave the text tower and ``logit_scale`` as they are: what is neither visual, MIT nor prompts gets no gradient.

    Example:
        >>> import xclip_fast
        >>> from xclip_fast.train import freeze_text
        >>> config = xclip_fast.XCLIPConfig(image_size=32, vision_width=64, vision_layers=1, text_width=64)
        >>> model = xclip_fast.create_model(config)
        >>> freeze_text(model)
        >>> model.ln_final.weight.requires_grad, model.visual.proj.requires_grad
        (False, True)
    """
    for name, parameter in model.named_parameters():
        if not name.startswith(("visual.", "mit.", "prompts_")):
            parameter.requires_grad_(False)


def parameter_groups(
    parameters: Iterable[tuple[str, nn.Parameter]],
    lr: float = 8e-6,
    weight_decay: float = 0.001,
    new_factor: float = 10.0,
) -> list[dict[str, Any]]:
    """The groups of the official recipe, for an optimizer of PyTorch: every trainable parameter is in one of four.

    The parts that X-CLIP adds to CLIP (names with ``message_``, ``mit`` or ``prompts``) learn ``new_factor`` times as
    fast. Vectors, scalars, biases and positional embeddings do not decay.

    Args:
        parameters: as ``model.named_parameters()`` gives them; those without ``requires_grad`` are left out.
        lr: learning rate of what CLIP has.
        weight_decay: of the matrices.
        new_factor: learning rate of what X-CLIP adds, over ``lr``.

    Returns:
        groups with ``params``, ``lr``, ``weight_decay`` and the group's ``name``; empty ones are left out.

    Raises:
        ValueError: nothing is to be trained.

    Example:
        >>> import torch, xclip_fast
        >>> from xclip_fast.train import parameter_groups
        >>> config = xclip_fast.XCLIPConfig(image_size=32, vision_width=64, vision_layers=1, text_width=64)
        >>> groups = parameter_groups(xclip_fast.create_model(config).named_parameters(), lr=1e-5)
        >>> [(group["name"], group["lr"], group["weight_decay"]) for group in groups]
        [('clip', 1e-05, 0.001), ('clip, no decay', 1e-05, 0.0), ('new', 0.0001, 0.001), ('new, no decay', 0.0001, 0.0)]
    """
    kinds = {
        (False, False): {"name": "clip", "lr": lr, "weight_decay": weight_decay},
        (False, True): {"name": "clip, no decay", "lr": lr, "weight_decay": 0.0},
        (True, False): {"name": "new", "lr": lr * new_factor, "weight_decay": weight_decay},
        (True, True): {"name": "new, no decay", "lr": lr * new_factor, "weight_decay": 0.0},
    }
    groups: dict[tuple[bool, bool], dict[str, Any]] = {}
    for name, parameter in parameters:
        if not parameter.requires_grad:
            continue
        is_new = any(part in name for part in NEW_PARTS)
        stays = parameter.ndim <= 1 or name.endswith(".bias") or _NO_DECAY in name
        group = groups.setdefault((is_new, stays), {**kinds[is_new, stays], "params": []})
        group["params"].append(parameter)
    if not groups:
        raise ValueError("no parameter has requires_grad: there is nothing to train")
    return [groups[kind] for kind in kinds if kind in groups]


def cosine_with_warmup(step: int, steps: int, warmup: int, lr: float, least: float = 0.0) -> float:
    """The learning rate of a step: it rises from 0 in a line, then falls along a cosine that began at step 0.

    This is timm's ``CosineLRScheduler`` with ``warmup_lr_init=0``, as the official code calls it, one step on: there
    the first update is made at a rate of 0.

    Args:
        step: the step about to be made, from 0.
        steps: in the whole run; after them the rate is ``least``.
        warmup: of them, those in which the rate rises.
        lr: the highest rate, which the line leads to.
        least: the lowest of the cosine; the official recipe takes a hundredth of its ``lr`` for every group.

    Example:
        >>> from xclip_fast.train import cosine_with_warmup
        >>> [round(cosine_with_warmup(step, steps=8, warmup=2, lr=1.0), 2) for step in range(8)]
        [0.5, 0.85, 0.69, 0.5, 0.31, 0.15, 0.04, 0.0]
    """
    made = step + 1
    if made < warmup:
        return lr * made / warmup
    return least + (lr - least) * (1 + cos(pi * min(made, steps) / steps)) / 2 if steps else least


def adamw(
    groups: list[dict[str, Any]], betas: tuple[float, float] = (0.9, 0.98), eps: float = 1e-8
) -> torch.optim.AdamW:
    """AdamW with the betas of the official recipe, over what ``parameter_groups`` returns.

    Example:
        >>> import torch
        >>> from xclip_fast.train import adamw, parameter_groups
        >>> optimizer = adamw(parameter_groups(torch.nn.Linear(3, 2).named_parameters()))
        >>> optimizer.defaults["betas"]
        (0.9, 0.98)
    """
    return torch.optim.AdamW(groups, betas=betas, eps=eps)
