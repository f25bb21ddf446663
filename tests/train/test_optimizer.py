"""Groups of the official recipe and its schedule, against an independent reading of each."""

from __future__ import annotations

from math import cos, pi

import pytest
import torch
from torch import nn

from xclip_fast import XCLIPConfig, create_model
from xclip_fast.train import adamw, cosine_with_warmup, freeze_text, parameter_groups

CONFIG = XCLIPConfig(
    image_size=32,
    patch_size=16,
    vision_width=64,
    vision_layers=1,
    embed_dim=64,
    text_width=64,
    text_layers=1,
    vocab_size=514,
)


def groups_by_name(model: nn.Module, **options: float) -> dict[str, tuple[float, float]]:
    """Learning rate and weight decay of each trainable parameter, which is in one group."""
    names = {id(value): name for name, value in model.named_parameters()}
    found: dict[str, tuple[float, float]] = {}
    for group in parameter_groups(model.named_parameters(), **options):
        for parameter in group["params"]:
            assert names[id(parameter)] not in found
            found[names[id(parameter)]] = group["lr"], group["weight_decay"]
    return found


def test_every_parameter_is_in_one_group_with_its_rate_and_decay() -> None:
    model = create_model(CONFIG, seed=0)
    found = groups_by_name(model, lr=1.0, weight_decay=0.5, new_factor=10.0)
    assert found.keys() == dict(model.named_parameters()).keys()
    for name, parameter in model.named_parameters():
        # the words of the recipe, one by one
        is_new = "message_" in name or name.startswith("mit.") or "prompts" in name
        stays = parameter.ndim < 2 or name.endswith("bias") or "positional_embedding" in name
        assert found[name] == (10.0 if is_new else 1.0, 0.0 if stays else 0.5), name


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("visual.conv1.weight", (1.0, 0.5)),
        ("visual.positional_embedding", (1.0, 0.0)),
        ("visual.class_embedding", (1.0, 0.0)),
        ("visual.transformer.resblocks.0.message_attn.in_proj_weight", (10.0, 0.5)),
        ("visual.transformer.resblocks.0.message_ln.weight", (10.0, 0.0)),
        ("visual.transformer.resblocks.0.attn.in_proj_weight", (1.0, 0.5)),
        ("mit.positional_embedding", (10.0, 0.0)),
        ("mit.resblocks.0.mlp.c_fc.weight", (10.0, 0.5)),
        ("prompts_visual_proj", (10.0, 0.5)),
        ("prompts_generator.alpha", (10.0, 0.0)),
        ("transformer.resblocks.0.attn.in_proj_weight", (1.0, 0.5)),
        ("token_embedding.weight", (1.0, 0.5)),
        ("logit_scale", (1.0, 0.0)),
    ],
)
def test_named_parameters(name: str, expected: tuple[float, float]) -> None:
    assert groups_by_name(create_model(CONFIG, seed=0), lr=1.0, weight_decay=0.5)[name] == expected


def test_frozen_text_leaves_the_rest() -> None:
    model = create_model(CONFIG, seed=0)
    freeze_text(model)
    frozen = {name for name, value in model.named_parameters() if not value.requires_grad}
    text = ("transformer.", "token_embedding", "positional_embedding", "ln_final", "text_projection", "logit_scale")
    assert frozen == {name for name, _ in model.named_parameters() if name.startswith(text)}
    assert groups_by_name(model).keys() == dict(model.named_parameters()).keys() - frozen


def test_nothing_to_train_is_refused() -> None:
    with pytest.raises(ValueError, match="nothing to train"):
        parameter_groups(nn.Linear(2, 2).requires_grad_(False).named_parameters())


def timm_rate(t: int, steps: int, warmup: int, lr: float, least: float) -> float:
    """timm 1.0's CosineLRScheduler(t_initial=steps, warmup_t=warmup, warmup_lr_init=0, cycle_limit=1) at t."""
    if t < warmup:
        return t * lr / warmup
    if t >= steps:
        return least
    return least + 0.5 * (lr - least) * (1 + cos(pi * t / steps))


@pytest.mark.parametrize(("steps", "warmup"), [(100, 10), (7, 0), (1, 0), (3, 3), (5, 1)])
def test_schedule_is_timms_one_step_on(steps: int, warmup: int) -> None:
    rates = [cosine_with_warmup(step, steps, warmup, 3.0, 0.03) for step in range(steps + 2)]
    assert rates == pytest.approx([timm_rate(step + 1, steps, warmup, 3.0, 0.03) for step in range(steps + 2)])
    assert rates[-1] == 0.03
    assert min(rates) > 0


def test_adamw_has_the_official_betas() -> None:
    optimizer = adamw(parameter_groups(nn.Linear(2, 2).named_parameters()))
    assert isinstance(optimizer, torch.optim.AdamW)
    assert optimizer.defaults["betas"] == (0.9, 0.98)
    assert optimizer.defaults["eps"] == 1e-8
