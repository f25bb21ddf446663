"""Class texts of an engine: encoded once, kept in memory and on disk, never another engine's, in bounded memory."""

from __future__ import annotations

import copy
import logging
import os
import pickle
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from buffers import Largest
from engine_cases import random_tokens, random_video, small_model
from torch import Tensor

from xclip_fast import Engine, InputError
from xclip_fast.engine import texts
from xclip_fast.engine.packing import CPU_REWRITES, Packing
from xclip_fast.reference import XCLIP
from xclip_fast.reference.model import VideoFeatures
from xclip_fast.text import TextCache

TOKENS = random_tokens()


@pytest.fixture
def encoded(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, ...]]:
    """The shapes of the tokens that text towers are given."""
    shapes: list[tuple[int, ...]] = []
    encode = texts.TextTower.encode_text

    def counted(self: texts.TextTower, tokens: Tensor) -> Tensor:
        shapes.append(tuple(tokens.shape))
        return encode(self, tokens)

    monkeypatch.setattr(texts.TextTower, "encode_text", counted)
    return shapes


def test_class_sets_are_encoded_once(encoded: list[tuple[int, ...]]) -> None:
    engine = Engine(small_model())
    one, other = random_tokens(5), random_tokens(4)
    first = engine.encode_texts(one)
    assert engine.encode_texts(one.int()) is first
    assert len(encoded) == 1
    engine.encode_texts(other)
    assert len(encoded) == 2
    # any token counts, of the first class and of the last
    for more, place in enumerate([(0, 0), (-1, 0), (-1, 7)]):
        changed = one.clone()
        changed[place] = 5 if changed[place] != 5 else 6
        engine.encode_texts(changed)
        assert len(encoded) == 3 + more


def test_kept_class_sets_are_bounded() -> None:
    asked = []

    def encode(tokens: Tensor) -> Tensor:
        asked.append(int(tokens[0, 0]))
        return torch.zeros(5)

    kept = texts.KeptTexts(encode, lambda features: texts.EncodedTexts(features, features.clone(), ""), max_bytes=100)
    first, second, third = (torch.full((1, 2), i) for i in range(3))
    for tokens in (first, second, first, third, first, second):
        kept.get(tokens)
    # the third pushed the second out, used longest ago
    assert asked == [0, 1, 2, 1]


def test_class_sets_of_another_engine_are_refused(tmp_path: Path) -> None:
    model, video = small_model(), random_video()
    engine = Engine(model, text_cache=tmp_path)
    features = engine.encode_video(video)
    # nothing that can be seen of them tells them apart, not even of the same model and folder
    for other in (Engine(model, text_cache=tmp_path), Engine(small_model(), torch.float32)):
        for foreign in (other.encode_texts(TOKENS), other.texts_of(model.encode_text(TOKENS))):
            with pytest.raises(InputError, match="another engine made it: make it with encode_texts") as refused:
                engine.logits(features, foreign)
            assert "\n" not in str(refused.value)
            with pytest.raises(InputError, match="another engine made it"):
                engine.classify(video, foreign)


def test_class_sets_of_its_own_are_taken_for_ever(tmp_path: Path) -> None:
    model, video = small_model(), random_video()
    Engine(model, text_cache=tmp_path).encode_texts(TOKENS)
    engine = Engine(model, text_cache=tmp_path)
    made = engine.encode_texts(TOKENS)
    wanted = engine.classify(video, made)
    # what is pushed out of memory is prepared again
    engine._texts = texts.KeptTexts(engine._texts.encode, engine._texts.prepare)
    with ThreadPoolExecutor(1) as pool:
        elsewhere = pool.submit(engine.encode_texts, TOKENS).result()
        assert torch.equal(pool.submit(engine.classify, video, made).result(), wanted)
    for same in (elsewhere, copy.copy(made), copy.deepcopy(made), pickle.loads(pickle.dumps(made))):
        assert torch.equal(engine.classify(video, same), wanted)
    known = engine.texts_of(made.features)
    torch.testing.assert_close(engine.classify(video, known), wanted)
    some = made._replace(features=made.features[:2], query=made.query[:2])
    torch.testing.assert_close(engine.classify(video, some).argmax(-1), wanted[:, :2].argmax(-1))


def test_a_class_set_is_its_own_whatever_becomes_of_the_features() -> None:
    engine, video = Engine(small_model()), random_video()
    features = torch.randn(5, engine.config.embed_dim)
    made = engine.texts_of(features)
    wanted = engine(video, made)
    features.div_(features.norm(dim=-1, keepdim=True))
    assert torch.equal(engine(video, made), wanted)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("given", [torch.bfloat16, torch.float32, torch.float64], ids=str)
def test_logits_take_features_of_any_dtype(dtype: torch.dtype, given: torch.dtype) -> None:
    engine, video = Engine(small_model(), dtype), random_video()
    made = engine.encode_texts(TOKENS)
    features = engine.encode_video(video)
    found = engine.logits(VideoFeatures(*(x.to(given) for x in features)), made)
    torch.testing.assert_close(found.double(), engine.logits(features, made).double(), rtol=0.05, atol=0.05)


def test_a_later_engine_finds_the_same_bits(tmp_path: Path, encoded: list[tuple[int, ...]]) -> None:
    folder, video = tmp_path / "new" / "folder", random_video()
    first = Engine(small_model(), text_cache=folder).classify(video, TOKENS)
    assert encoded
    encoded.clear()
    engine = Engine(small_model(), text_cache=str(folder))
    assert torch.equal(engine.classify(video, TOKENS), first)
    # the file is kept in memory from then on
    os.unlink(next(folder.iterdir()))
    assert torch.equal(engine(video, TOKENS).softmax(-1), first)
    assert not encoded


def test_it_is_off_unless_asked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Engine(small_model()).encode_texts(TOKENS)
    assert not os.listdir(tmp_path)


def by_weight(model: XCLIP) -> dict[str, Any]:
    model.ln_final.bias.data[3] += 1e-3
    return {}


def by_unused_embedding(model: XCLIP) -> dict[str, Any]:
    # an engine does not keep its model: it hashes all rows
    model.token_embedding.weight.data[62] += 1
    return {}


def by_heads(model: XCLIP) -> dict[str, Any]:
    weights = model.state_dict()
    model.__init__(type(model.config).from_dict(model.config.to_dict() | {"text_heads": 4}))  # type: ignore[misc]
    model.load_state_dict(weights)
    return {}


def by_precision(model: XCLIP) -> dict[str, Any]:
    return {"dtype": torch.bfloat16}


def by_rewrites(model: XCLIP) -> dict[str, Any]:
    return {"_rewrites": frozenset()}


@pytest.mark.parametrize("change", [by_weight, by_unused_embedding, by_heads, by_precision, by_rewrites])
def test_another_engine_has_its_own_file(
    change: Callable[[XCLIP], dict[str, Any]], tmp_path: Path, encoded: list[tuple[int, ...]]
) -> None:
    Engine(small_model(), text_cache=tmp_path).encode_texts(TOKENS)
    model = small_model()
    options = change(model)
    for known in (False, True):
        encoded.clear()
        found = Engine(model, text_cache=tmp_path, **options).encode_texts(TOKENS)
        assert bool(encoded) is not known
        assert torch.equal(found.features, Engine(model, **options).encode_texts(TOKENS).features)
    assert len(os.listdir(tmp_path)) == 2


def test_all_that_texts_depend_on_names_them() -> None:
    model, plain = small_model(), Packing(torch.device("cpu"), torch.float32, CPU_REWRITES)
    other = small_model(activation="gelu")
    other.load_state_dict(model.state_dict())
    kinds = [
        (model, plain),
        (other, plain),
        (model, replace(plain, device=torch.device("cuda"))),
        (model, replace(plain, dtype=torch.bfloat16)),
        (model, replace(plain, stored=torch.bfloat16)),
        (model, replace(plain, stored=torch.float16)),
        (model, replace(plain, rewrites=CPU_REWRITES - {"norms"})),
    ]
    assert len({texts.encoder_digest(*kind) for kind in kinds}) == len(kinds)
    assert texts.encoder_digest(small_model(), plain) == texts.encoder_digest(model, plain)


def test_other_tokens_have_their_own_file(tmp_path: Path) -> None:
    engine = Engine(small_model(), text_cache=tmp_path)
    for tokens in (TOKENS, TOKENS.flip(0), TOKENS[:2], TOKENS.int()):
        engine.encode_texts(tokens)
    assert len(os.listdir(tmp_path)) == 3


def test_what_no_text_depends_on_may_change(tmp_path: Path, encoded: list[tuple[int, ...]]) -> None:
    Engine(small_model(), text_cache=tmp_path).encode_texts(TOKENS)
    model = small_model()
    for parameter in (*model.visual.parameters(), *model.mit.parameters(), *model.prompts_generator.parameters()):
        parameter.data.add_(0.01)
    encoded.clear()
    found = Engine(model, text_cache=tmp_path).encode_texts(TOKENS)
    assert not encoded
    # only the features lie there: what the prompts ask with them is this model's
    torch.testing.assert_close(found[:2], Engine(model).encode_texts(TOKENS)[:2])


def test_engines_and_models_share_a_folder(tmp_path: Path) -> None:
    model = small_model()
    TextCache(folder=tmp_path).encode(model, TOKENS)
    Engine(model, text_cache=tmp_path).encode_texts(TOKENS)
    assert len(os.listdir(tmp_path)) == 2


@pytest.mark.parametrize("keep", [0, -3])
def test_a_damaged_file_is_made_again(keep: int, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    first = Engine(small_model(), text_cache=tmp_path).encode_texts(TOKENS)
    (file,) = tmp_path.iterdir()
    whole = file.read_bytes()
    file.write_bytes(whole[:keep])
    with caplog.at_level(logging.WARNING, "xclip_fast"):
        again = Engine(small_model(), text_cache=tmp_path).encode_texts(TOKENS)
    assert "damaged" in caplog.text
    assert torch.equal(again.features, first.features)
    assert file.read_bytes() == whole
    assert os.listdir(tmp_path) == [file.name]


def test_a_folder_that_cannot_be_is_refused_before_any_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setattr("xclip_fast.engine.api.check_gemms", lambda *_: pytest.fail("it was packed"))
    with pytest.raises(InputError, match="give another folder"):
        Engine(small_model(), text_cache=tmp_path / "file")


SCRIPT = """
import sys
from engine_cases import small_model
import torch
from xclip_fast import Engine
from xclip_fast.engine import texts

torch.set_num_threads(1)
torch.manual_seed(0)
model = small_model()
torch.manual_seed(1)
tokens = torch.randint(1, 63, (4, 9))
texts.TextTower.encode_text = None if sys.argv[2] == "read" else texts.TextTower.encode_text
features = Engine(model, text_cache=sys.argv[1]).encode_texts(tokens).features
print(features.view(torch.uint8).numpy().tobytes().hex())
"""


@pytest.mark.slow
def test_another_process_reads_what_one_wrote(tmp_path: Path) -> None:
    found = os.pathsep.join([*map(str, Path(__file__).parents[:2]), os.environ.get("PYTHONPATH", "")])
    said = [
        subprocess.run(
            [sys.executable, "-c", SCRIPT, str(tmp_path), what],
            capture_output=True,
            text=True,
            check=True,
            env=os.environ | {"PYTHONPATH": found},
        ).stdout
        for what in ("write", "read")
    ]
    assert said[0] == said[1] != ""
    assert len(os.listdir(tmp_path)) == 1


@pytest.mark.parametrize("on_disk", [False, True])
@pytest.mark.slow
def test_a_hundred_thousand_classes_make_nothing_larger_than_their_features(on_disk: bool, tmp_path: Path) -> None:
    model, classes = small_model(text_layers=1), 100_000
    tokens = torch.randint(1, 62, (classes, 4))
    tokens[:, -1] = 63
    folder = tmp_path if on_disk else None
    engine = Engine(model, text_cache=folder)
    with Largest(tokens) as seen:
        found = engine.encode_texts(tokens)
    assert found.features.shape == (classes, 128)
    # the tower of all classes at once would hold 400,000 rows of 256 numbers
    assert seen.largest == found.features.nbytes
    if on_disk:
        engine = Engine(model, text_cache=folder)
        with Largest(tokens) as seen:
            again = engine.encode_texts(tokens)
        assert torch.equal(again.features, found.features)
        assert seen.largest == found.features.nbytes
