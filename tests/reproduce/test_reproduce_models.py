"""What a model lacks it does not see; what it has in common with another starts equal."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from xclip_fast.reproduce import world
from xclip_fast.reproduce.models import MODELS, build_model, clip_weights, config, tokenize

TEXTS = [one.text for one in world.CLASSES]
CLIPS = torch.from_numpy(world.make_clips(np.arange(6), np.random.default_rng(0)))


def test_each_word_is_one_token_and_no_two_are_equal() -> None:
    rows = tokenize(list(world.WORDS))
    assert rows.shape == (len(world.WORDS), 3)
    assert len(set(rows[:, 1].tolist())) == len(world.WORDS)
    assert tokenize(TEXTS).shape == (len(TEXTS), 7)


@torch.no_grad()
def test_a_text_has_the_same_feature_alone_and_beside_a_longer_one() -> None:
    model = build_model("mean", seed=0)
    alone, among = model.encode_text(tokenize(["stripes"]))[0], model.encode_text(tokenize(["stripes", TEXTS[0]]))[0]
    assert torch.allclose(alone, among, atol=1e-5)


@pytest.mark.parametrize("name", MODELS)
@torch.no_grad()
def test_only_mit_sees_the_order_of_frames(name: str) -> None:
    model = build_model(name, seed=0).eval()
    tokens = tokenize(TEXTS)
    forwards, backwards = model(CLIPS, tokens), model(CLIPS.flip(1), tokens)
    same = torch.allclose(forwards, backwards, atol=1e-4)
    assert same == (not MODELS[name].mit)


@pytest.mark.parametrize("name", MODELS)
@torch.no_grad()
def test_only_messages_tell_a_frame_of_the_others(name: str) -> None:
    model = build_model(name, seed=0).eval()
    alone = model.visual(model.normalise(CLIPS[:, 1:2]))[0][:, 0]
    among = model.visual(model.normalise(CLIPS))[0][:, 1]
    assert torch.allclose(alone, among, atol=1e-5) == (not MODELS[name].cfa)


@pytest.mark.parametrize("name", MODELS)
@torch.no_grad()
def test_only_prompts_adapt_the_texts(name: str) -> None:
    model = build_model(name, seed=0).eval()
    texts = model.encode_text(tokenize(TEXTS))
    adapted = model.prompts_generator(texts.expand(len(CLIPS), -1, -1), model.encode_video(CLIPS).patches)
    assert torch.equal(adapted[0], texts) == (not MODELS[name].prompts)


def test_all_models_start_from_the_same_clip_and_the_same_random_numbers() -> None:
    clip = clip_weights(build_model("mean", seed=5))
    models = {name: build_model(name, seed=1, clip=clip).state_dict() for name in MODELS}
    for state in models.values():
        for name, value in state.items():
            wanted = clip[name] if name in clip else models["full"][name]
            assert torch.equal(value, wanted), name
    assert not torch.equal(clip["visual.proj"], build_model("full", seed=1).state_dict()["visual.proj"])
    assert config().embed_dim < len(world.SHAPES) * len(world.COLOURS)


def test_weights_of_something_else_are_refused() -> None:
    clip = clip_weights(build_model("mean", seed=5))
    del clip["visual.proj"]
    with pytest.raises(ValueError, match=r"visual\.proj"):
        build_model("full", seed=0, clip=clip)
