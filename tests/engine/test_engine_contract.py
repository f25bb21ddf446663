"""What the engine takes, refuses, keeps and leaves alone."""

from __future__ import annotations

import copy
import gc
import io
import pickle
import threading
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from engine_cases import random_tokens, random_video, small_model
from torch import nn
from torch.nn.utils import parametrizations, prune

import xclip_fast
from xclip_fast import Engine, InputError
from xclip_fast.demo.models import build_model
from xclip_fast.reference import XCLIP


@pytest.fixture(scope="module")
def model() -> XCLIP:
    return small_model()


@pytest.fixture(scope="module")
def engine(model: XCLIP) -> Engine:
    return Engine(model)


def test_public_name() -> None:
    assert xclip_fast.Engine is Engine
    assert "Engine" in xclip_fast.__all__


def put_a_hook(model: XCLIP) -> None:
    model.mit.register_forward_hook(lambda module, given, output: 2 * output)


def put_an_adapter(model: XCLIP) -> None:
    mlp = model.visual.transformer.resblocks[0].mlp
    mlp.c_fc = nn.Sequential(mlp.c_fc)


def prune_a_weight(model: XCLIP) -> None:
    prune.l1_unstructured(model.prompts_generator.decoder[0].cross_attn.q_proj, "weight", 0.5)


def normalise_a_weight(model: XCLIP) -> None:
    parametrizations.weight_norm(model.transformer.resblocks[0].attn.out_proj)


def replace_a_forward(model: XCLIP) -> None:
    model.ln_final.forward = lambda x: x


def make_a_weight_sparse(model: XCLIP) -> None:
    layer = model.transformer.resblocks[0].mlp.c_fc
    layer.weight = nn.Parameter(layer.weight.detach().to_sparse())


@pytest.mark.parametrize(
    "put", [put_a_hook, put_an_adapter, prune_a_weight, normalise_a_weight, replace_a_forward, make_a_weight_sparse]
)
def test_what_is_put_on_a_module_is_refused_by_name(put: Callable[[XCLIP], None]) -> None:
    other = small_model()
    put(other)
    with pytest.raises(InputError, match=r"but found .* at \S+: merge adapters, .*remove hooks") as caught:
        Engine(other)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["no_cfa", "average"])
def test_models_without_a_part_are_refused(name: str) -> None:
    with pytest.raises(InputError, match="whole X-CLIP"):
        Engine(build_model(name, seed=0))
    with pytest.raises(InputError, match="of a Linear was asked for"):
        Engine(torch.nn.Linear(2, 2))


def test_defaults_are_the_models(model: XCLIP) -> None:
    assert Engine(model).dtype is torch.float32
    assert Engine(copy.deepcopy(model).bfloat16()).dtype is torch.bfloat16
    assert Engine(model).device == torch.device("cpu")


@pytest.mark.parametrize("dtype", [torch.int16, torch.complex64, torch.float8_e5m2, "bfloat16"], ids=str)
def test_unknown_dtypes_are_refused(model: XCLIP, dtype: torch.dtype) -> None:
    with pytest.raises(
        InputError, match=r"choose one of torch\.float32, torch\.bfloat16, .*, torch\.float8_e4m3fn"
    ) as refused:
        Engine(model, dtype)
    assert "\n" not in str(refused.value)


def test_float8_needs_hopper(model: XCLIP) -> None:
    with pytest.raises(InputError, match="Hopper"):
        Engine(model, torch.float8_e4m3fn, "cpu")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_cuda_needs_a_gpu(model: XCLIP) -> None:
    with pytest.raises(InputError, match=r"device 'cuda' was asked for: .*: use cpu"):
        Engine(model, device="cuda")


def test_unknown_devices_are_refused(model: XCLIP) -> None:
    for device in ("meta", "banana", "", "cpu:x"):
        with pytest.raises(InputError, match=r"unknown device .*: choose auto, cpu, cuda or cuda:N"):
            Engine(model, device=device)


@pytest.mark.parametrize("thing", [None, [1, 2], "video", torch.zeros(1, 4, 32, 32, 3).numpy()], ids=type)
def test_what_is_no_tensor_is_refused(model: XCLIP, engine: Engine, thing: Any) -> None:
    for taker in (model, engine):
        with pytest.raises(ValueError, match=f"video must be a tensor, found {type(thing).__name__}"):
            taker.encode_video(thing)
    with pytest.raises(ValueError, match="tokens must be a tensor"):
        model(random_video(), thing)


def test_int8_needs_gemms_of_bytes(model: XCLIP, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("xclip_fast.engine.precision.int8_linear", lambda: None)
    with pytest.raises(InputError, match="use bfloat16"):
        Engine(model, torch.int8)


@pytest.mark.parametrize(
    "video",
    [
        torch.zeros(4, 32, 32, 3, dtype=torch.uint8),
        torch.zeros(1, 4, 32, 32, 4, dtype=torch.uint8),
        torch.zeros(1, 4, 3, 32, 32, dtype=torch.int32),
        torch.zeros(0, 4, 3, 32, 32),
        torch.zeros(1, 0, 32, 32, 3, dtype=torch.uint8),
        torch.zeros(1, 4, 33, 32, 3, dtype=torch.uint8),
        torch.zeros(1, 4, 3, 32, 31),
    ],
    ids=lambda video: f"{video.dtype} {tuple(video.shape)}",
)
def test_wrong_videos_are_refused(engine: Engine, video: torch.Tensor) -> None:
    for method in (engine.encode_video, engine.embed_video):
        with pytest.raises(ValueError, match="found"):
            method(video)
    with pytest.raises(ValueError, match="found"):
        Engine(small_model(), torch.float32, clips=video)


@pytest.mark.parametrize(
    "tokens",
    [
        torch.zeros(3, dtype=torch.int64),
        torch.zeros(2, 21, dtype=torch.int64),
        torch.zeros(2, 3),
        torch.full((2, 3), 64),
    ],
    ids=lambda tokens: f"{tokens.dtype} {tuple(tokens.shape)}",
)
def test_wrong_tokens_are_refused(engine: Engine, tokens: torch.Tensor) -> None:
    with pytest.raises(ValueError, match="found"):
        engine.encode_texts(tokens)


def test_no_classes_give_no_columns(engine: Engine) -> None:
    assert engine(random_video(), torch.zeros(0, 7, dtype=torch.int64)).shape == (2, 0)


def test_labels_need_a_tokenizer(engine: Engine) -> None:
    with pytest.raises(InputError, match="no tokenizer has 64 tokens"):
        engine.encode_texts(["a cat", "a dog"])


def test_classify_labels() -> None:
    model = small_model(vocab_size=514)
    engine, video = Engine(model), random_video()
    tokens = xclip_fast.text.get_tokenizer(514)(["a cat", "a dog"], 20)
    wanted = model(video, tokens).softmax(dim=-1)
    for classes in (["a cat", "a dog"], tokens, engine.encode_texts(["a cat", "a dog"])):
        found = engine.classify(video, classes)
        assert found.dtype is torch.float32
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-6)
    with pytest.raises(InputError):
        engine.classify(video, ["a cat", "a cat"])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_model_stays_as_it_is_and_is_not_kept(dtype: torch.dtype) -> None:
    model = small_model().train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    engine = Engine(model, dtype)
    video, tokens = random_video(), random_tokens()
    first = engine(video, tokens)
    assert model.training
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    for parameter in model.parameters():
        parameter.data.zero_()
    assert torch.equal(engine(video, tokens), first)
    gone = weakref.ref(model)
    del model, parameter
    gc.collect()
    assert gone() is None
    assert torch.equal(engine(video, tokens), first)


@pytest.mark.parametrize(
    "send",
    [pickle.dumps, copy.copy, copy.deepcopy, lambda engine: torch.save({"engine": engine}, io.BytesIO())],
    ids=["pickle", "copy", "deepcopy", "save"],
)
def test_it_is_neither_sent_nor_copied(engine: Engine, send: Callable[[Engine], object]) -> None:
    with pytest.raises(TypeError, match="packed for this process, and is neither pickled nor copied") as refused:
        send(engine)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_inputs_stay_as_they_are(model: XCLIP, dtype: torch.dtype) -> None:
    engine = Engine(model, dtype)
    for video in (random_video(), torch.randn(2, 4, 3, 32, 32).to(dtype)):
        before = video.clone()
        engine.encode_video(video)
        assert torch.equal(video, before)
    kept = engine.encode_texts(random_tokens())
    before = kept.features.clone(), kept.query.clone()
    engine.classify(random_video(), kept)
    assert torch.equal(kept.features, before[0])
    assert torch.equal(kept.query, before[1])


def test_strided_videos(engine: Engine) -> None:
    wide = torch.randint(256, (2, 8, 40, 64, 3), dtype=torch.uint8)
    crop = wide[:, ::2, 3:35, ::2]
    assert torch.equal(engine.embed_video(crop), engine.embed_video(crop.contiguous()))
    normalised = torch.randn(2, 3, 8, 64, 40).transpose(1, 2)[:, ::2, :, ::2, 5:37]
    assert torch.equal(engine.embed_video(normalised), engine.embed_video(normalised.contiguous()))


def test_autocast_changes_nothing(engine: Engine) -> None:
    video, tokens = random_video(), random_tokens()
    wanted = engine(video, tokens)
    with torch.autocast("cpu", torch.bfloat16):
        found = Engine(small_model(), torch.float32)(video, tokens)
    assert torch.equal(found, wanted)


def test_bad_numbers_stay_in_their_video(model: XCLIP) -> None:
    for dtype in (torch.float32, torch.bfloat16):
        engine = Engine(model, dtype)
        video = torch.randn(3, 4, 3, 32, 32)
        wanted = engine.encode_video(video)
        video[1, 2, 0, 5, 5] = float("nan")
        found = engine.encode_video(video)
        for part in (0, 1):
            assert torch.equal(found[part][::2], wanted[part][::2])
            assert not found[part][1].isfinite().all()


def test_several_threads_get_the_same_answers(model: XCLIP) -> None:
    engine = Engine(model, torch.bfloat16)
    videos, tokens = [random_video(batch) for batch in (1, 2, 3, 1)], random_tokens()
    wanted = [engine(video, tokens) for video in videos]
    fresh = Engine(model, torch.bfloat16)
    found: dict[int, torch.Tensor] = {}

    def work(index: int) -> None:
        for _ in range(3):
            found[index] = fresh(videos[index], tokens)

    threads = [threading.Thread(target=work, args=(index,)) for index in range(len(videos))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(torch.equal(found[index], wanted[index]) for index in range(len(videos)))


def test_text_features_that_are_known(model: XCLIP, engine: Engine) -> None:
    video, tokens = random_video(), random_tokens()
    known = engine.texts_of(model.encode_text(tokens))
    torch.testing.assert_close(engine.logits(engine.encode_video(video), known), engine(video, tokens))
    with pytest.raises(ValueError, match=r"\(K, 128\)"):
        engine.texts_of(torch.zeros(3, 64))
