"""Making models: configurations are checked, seeds reproduce weights and touch nothing else."""

from __future__ import annotations

import dataclasses
import json
import math

import numpy
import pytest
import torch

import xclip_fast
from xclip_fast import VARIANTS, XCLIPConfig, layers, reference

TINY = XCLIPConfig(
    image_size=16,
    patch_size=8,
    vision_width=64,
    vision_layers=1,
    embed_dim=64,
    context_length=8,
    vocab_size=20,
    text_width=64,
    text_layers=1,
    frames=4,
)


def test_same_seed_same_weights() -> None:
    torch.manual_seed(1)
    first = xclip_fast.create_model(TINY, seed=3).state_dict()
    torch.manual_seed(2)
    second = xclip_fast.create_model(TINY, seed=3).state_dict()
    other = xclip_fast.create_model(TINY, seed=4).state_dict()
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert not torch.equal(first["visual.conv1.weight"], other["visual.conv1.weight"])


def test_seed_leaves_global_random_state(monkeypatch: pytest.MonkeyPatch) -> None:
    reseeded: list[int] = []
    monkeypatch.setattr(torch.cuda, "manual_seed_all", reseeded.append)
    before = torch.get_rng_state()
    xclip_fast.create_model(TINY, seed=3)
    assert torch.equal(torch.get_rng_state(), before)
    assert not reseeded


def test_without_seed_weights_follow_the_global_state() -> None:
    torch.manual_seed(5)
    first = xclip_fast.create_model(TINY).state_dict()
    second = xclip_fast.create_model(TINY).state_dict()
    torch.manual_seed(5)
    again = xclip_fast.create_model(TINY).state_dict()
    assert not torch.equal(first["visual.conv1.weight"], second["visual.conv1.weight"])
    assert all(torch.equal(first[name], again[name]) for name in first)


def test_models_start_in_evaluation_mode_with_gradients_on() -> None:
    model = xclip_fast.create_model(TINY)
    assert not any(module.training for module in model.modules())
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_new_modules_start_as_the_paper_says() -> None:
    model = xclip_fast.create_model(dataclasses.replace(TINY, vision_width=256, embed_dim=256), seed=0)
    block = model.visual.transformer.resblocks[0]
    assert torch.equal(model.prompts_generator.alpha, torch.full((256,), 0.1))
    assert model.logit_scale.item() == pytest.approx(math.log(1 / 0.07))
    assert block.message_attn.in_proj_weight.abs().max().item() == pytest.approx((6 / (4 * 256)) ** 0.5, rel=1e-2)
    assert not block.message_attn.in_proj_bias.any()
    assert not block.message_attn.out_proj.bias.any()
    assert block.message_fc.weight.abs().max().item() == pytest.approx(256**-0.5, rel=1e-2)
    assert torch.equal(block.message_ln.weight, torch.ones(256))
    linears = [m for m in [*model.mit.modules(), *model.prompts_generator.modules()] if isinstance(m, torch.nn.Linear)]
    for linear in linears:
        assert linear.weight.std().item() == pytest.approx(0.02, rel=5e-2)
        assert linear.bias is None or not linear.bias.any()
    assert model.mit.positional_embedding.std().item() == pytest.approx(0.02, rel=0.1)
    assert model.prompts_visual_proj.std().item() == pytest.approx(1, rel=5e-2)


@pytest.mark.parametrize("frames", [1, 8, 32])
def test_frames_set_the_temporal_table_alone(frames: int) -> None:
    model = xclip_fast.create_model(TINY, frames=frames)
    assert model.config == TINY.with_frames(frames)
    assert model.mit.positional_embedding.shape == (1, frames, 64)
    assert xclip_fast.create_model(TINY).config.frames == 4


@pytest.mark.parametrize("name", VARIANTS)
def test_variants_by_name(name: str) -> None:
    with torch.device("meta"):
        model = xclip_fast.create_model(name, frames=16)
    assert model.config == VARIANTS[name].with_frames(16)


@pytest.mark.parametrize("name", ["", "b/32", "B32", "ViT-B/32", "L/14@336"])
def test_unknown_variant_names_the_known_ones(name: str) -> None:
    with pytest.raises(ValueError, match=f"unknown variant '{name}': choose one of B/32, B/16, L/14, L/14-336"):
        xclip_fast.create_model(name)


@pytest.mark.parametrize("frames", [0, -8, 2.5, "8", True])
def test_frames_must_be_a_positive_integer(frames: object) -> None:
    with pytest.raises(ValueError, match="frames must be a positive integer, found"):
        xclip_fast.create_model(TINY, frames=frames)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"image_size": 225}, "image_size must be a multiple of patch_size, found 225 and 32"),
        ({"patch_size": 0}, "patch_size must be a positive integer, found 0"),
        ({"vision_width": 770}, "vision_width must be a multiple of vision_heads, found 770 and 12"),
        ({"vision_width": 32}, "vision_heads must be a positive integer, found 0"),
        ({"vision_heads": 7}, "vision_width must be a multiple of vision_heads, found 768 and 7"),
        ({"vision_heads": -12}, "vision_heads must be a positive integer, found -12"),
        ({"text_heads": 3}, "text_width must be a multiple of text_heads, found 512 and 3"),
        ({"embed_heads": 5}, "embed_dim must be a multiple of embed_heads, found 512 and 5"),
        ({"vision_layers": 12.0}, "vision_layers must be a positive integer, found 12.0"),
        ({"mit_layers": 0}, "mit_layers must be a positive integer, found 0"),
        ({"prompt_layers": True}, "prompt_layers must be a positive integer, found True"),
        ({"context_length": 0}, "context_length must be a positive integer"),
        ({"vocab_size": "many"}, "vocab_size must be a positive integer, found 'many'"),
        ({"vision_width": "768"}, "vision_width must be a positive integer, found '768'"),
        ({"text_width": None}, "text_width must be a positive integer, found None"),
        ({"prompt_alpha": "small"}, "prompt_alpha must be a finite number, found 'small'"),
        ({"prompt_alpha": math.nan}, "prompt_alpha must be a finite number, found nan"),
        ({"prompt_alpha": True}, "prompt_alpha must be a finite number, found True"),
        ({"prompt_alpha": numpy.True_}, "prompt_alpha must be a finite number, found"),
        ({"prompt_alpha": torch.ones(2)}, "prompt_alpha must be a finite number, found"),
        ({"prompt_alpha": "0.1"}, "prompt_alpha must be a finite number, found '0.1'"),
        ({"prompt_alpha": 10**400}, "prompt_alpha must be a finite number, found 1000"),
        ({"prompt_alpha": None}, "prompt_alpha must be a finite number, found None"),
        ({"frames": numpy.float32(8)}, "frames must be a positive integer, found"),
        ({"frames": numpy.True_}, "frames must be a positive integer, found"),
        ({"vision_layers": numpy.int64(-1)}, "vision_layers must be a positive integer, found"),
        ({"activation": "relu"}, "activation must be one of quick_gelu, gelu, found 'relu'"),
        ({"pixel_mean": (0.5, 0.5)}, "pixel_mean and pixel_std must hold three numbers each"),
        ({"pixel_std": (0.5, 0.5, 0.0)}, "pixel_mean and pixel_std must hold three numbers each, the latter positive"),
        ({"pixel_std": ()}, "pixel_mean and pixel_std must hold three numbers each"),
        ({"pixel_std": (0.5, 0.5, math.nan)}, "pixel_mean and pixel_std must hold three numbers each"),
        ({"pixel_mean": None}, "pixel_mean must hold three numbers, found None"),
        ({"pixel_mean": ("r", "g", "b")}, "pixel_mean must hold three numbers, found"),
        ({"pixel_mean": "123"}, "pixel_mean must hold three numbers, found '123'"),
        ({"pixel_std": (True, True, True)}, "pixel_std must hold three numbers, found"),
        ({"pixel_std": (1, 1, 10**400)}, "pixel_std must hold three numbers, found"),
    ],
)
def test_configuration_refuses(change: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        XCLIPConfig(**change)  # type: ignore[arg-type]


@pytest.mark.parametrize("alpha", [1, numpy.float64(1), numpy.float32(1), numpy.int32(1), torch.tensor(1)], ids=repr)
def test_numbers_of_any_type_make_one_configuration_and_its_model(alpha: object) -> None:
    plain = dataclasses.replace(TINY, prompt_alpha=1.0, pixel_mean=(0.0, 0.5, 1.0))
    mean = numpy.array([0, 0.5, 1], dtype=numpy.float32)
    frames, depth = numpy.int64(plain.frames), numpy.uint8(plain.vision_layers)
    config = dataclasses.replace(TINY, prompt_alpha=alpha, pixel_mean=mean, frames=frames, vision_layers=depth)
    assert config == plain
    assert json.dumps(config.to_dict()) == json.dumps(plain.to_dict())
    assert {type(value) for value in config.to_dict().values()} == {int, float, str, tuple}
    prompt_alpha = xclip_fast.create_model(config).prompts_generator.alpha
    assert prompt_alpha.equal(torch.ones(config.embed_dim))
    assert prompt_alpha.dtype == torch.float32


def test_prompts_of_their_own_take_a_whole_number_for_alpha() -> None:
    for layer in (reference.VideoPrompts, layers.VideoPrompts):
        assert layer(64, 1, alpha=1).alpha.equal(torch.ones(64))


def test_head_counts_follow_the_widths() -> None:
    large = VARIANTS["L/14"]
    assert (large.vision_heads, large.embed_heads, large.text_heads, large.vision_mlp_width) == (16, 12, 12, 4096)
    base = VARIANTS["B/16"]
    assert (base.vision_heads, base.embed_heads, base.text_heads, base.patches) == (12, 8, 8, 196)


def test_configuration_is_frozen() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        TINY.frames = 8  # type: ignore[misc]


def test_configuration_survives_json() -> None:
    for config in (TINY, *VARIANTS.values()):
        assert XCLIPConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config


def test_configuration_refuses_unknown_keys() -> None:
    with pytest.raises(ValueError, match="unknown configuration keys: depth, heads"):
        XCLIPConfig.from_dict({"heads": 3, "frames": 8, "depth": 2})
