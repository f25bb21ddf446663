"""The table of names, held against both libraries, and the sizes that shapes tell."""

from __future__ import annotations

import pytest
import torch
from checkpoint_zoo import TINY

from xclip_fast import VARIANTS, InputError, XCLIPConfig, create_model
from xclip_fast.checkpoints import huggingface
from xclip_fast.checkpoints.names import TABLE, added_to_clip, hf_names, listing, official_name
from xclip_fast.checkpoints.sizes import claims_of, infer_sizes, resolve, shapes_of
from xclip_fast.checkpoints.skeleton import skeleton
from xclip_fast.checkpoints.stored import from_hf


def meta_hf_model(config: XCLIPConfig):
    transformers = pytest.importorskip("transformers")
    settings, _ = huggingface.configs_of(config, "float32")
    with torch.device("meta"):
        return transformers.XCLIPModel(transformers.XCLIPConfig(**settings))


def test_patterns_occur_once():
    for column in zip(*TABLE, strict=True):
        assert len(set(column)) == len(column)


def test_every_name_goes_there_and_back():
    for official in shapes_of(skeleton(TINY).state_dict()):
        for place, theirs in enumerate(hf_names(official)):
            assert official_name(theirs) == (official, place)


@pytest.mark.parametrize(
    "name", ["", "visual.proj", "mit.resblocks.x.ln_1.weight", "text_projection.bias", "logit_scale\n"]
)
def test_foreign_names_have_no_official_one(name: str):
    assert official_name(name) is None


def test_official_names_are_checked():
    with pytest.raises(KeyError):
        hf_names("visual.transformer.resblocks.0.attn.in_proj")


@pytest.mark.parametrize("variant", VARIANTS)
def test_hugging_face_has_exactly_these_names_and_shapes_at_real_size(variant: str):
    config = VARIANTS[variant].with_frames(16)
    ours, theirs = shapes_of(skeleton(config).state_dict()), meta_hf_model(config).state_dict()
    assert {name for official in ours for name in hf_names(official)} == set(theirs)
    assert shapes_of(from_hf(theirs, "hf")) == ours


@pytest.mark.parametrize("variant", VARIANTS)
def test_shapes_tell_the_real_sizes(variant: str):
    config = VARIANTS[variant].with_frames(32)
    assert resolve(infer_sizes(shapes_of(skeleton(config).state_dict()), "it"), [], "it") == config


def test_shapes_of_clip_tell_its_sizes():
    shapes = {name: shape for name, shape in shapes_of(skeleton(TINY).state_dict()).items() if not added_to_clip(name)}
    sizes = infer_sizes(shapes, "it", clip_only=True)
    assert {"frames", "mit_layers", "prompt_layers"}.isdisjoint(sizes)
    assert all(getattr(TINY, field) == value for field, value in sizes.items())


def test_configuration_written_is_the_configuration_read():
    config = XCLIPConfig(vision_width=96, vision_heads=3, text_width=64, embed_dim=64, embed_heads=2, prompt_alpha=0.3)
    sizes = infer_sizes(shapes_of(skeleton(config).state_dict()), "it")
    assert resolve(sizes, claims_of(config.to_dict(), "it"), "it") == config


def test_only_what_x_clip_adds_is_added():
    added = {name for name in shapes_of(skeleton(TINY).state_dict()) if added_to_clip(name)}
    assert len(added) == 2 * 8 + (1 + 2 * 12) + 3 + (3 + 1 * 13)  # message, MIT, prompts_visual, prompts_generator
    assert not any(name.startswith(("transformer.", "visual.proj", "ln_")) for name in added)


def test_a_layer_number_cannot_ask_for_a_billion_layers():
    shapes = shapes_of(skeleton(TINY).state_dict())
    shapes["transformer.resblocks.999999999.ln_1.weight"] = (64,)
    assert infer_sizes(shapes, "it")["text_layers"] == TINY.text_layers + 1
    shapes |= {f"transformer.resblocks.{layer}.ln_1.weight": (64,) for layer in range(300)}
    with pytest.raises(InputError, match="text_layers 301"):
        infer_sizes(shapes, "it")


def test_listing_is_short_and_on_one_line():
    text = listing(["b\n\x1b[31m", "a" * 500, *map(str, range(99))], limit=101)
    assert "\n" not in text
    assert "\x1b" not in text
    assert "a" * 100 not in text
    assert listing("edcba") == "'a', 'b', 'c', 'd' and 1 more"


def test_a_skeleton_is_the_model_without_its_numbers():
    torch.manual_seed(3)
    model, before = skeleton(TINY), torch.get_rng_state()
    torch.manual_seed(3)
    assert torch.equal(before, torch.get_rng_state())
    assert shapes_of(model.state_dict()) == shapes_of(create_model(TINY).state_dict())
    assert all(tensor.is_meta for tensor in model.state_dict().values())
    assert skeleton(XCLIPConfig(vision_width=4096, vision_layers=200, embed_dim=4096, text_width=4096)).config
