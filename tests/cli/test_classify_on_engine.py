"""``xclip-fast classify`` on the engine, beside ``--reference``: the same labels, probabilities and lines."""

from __future__ import annotations

import json
import weakref
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from cli_support import TINY, Cli, write_video
from numerics import TOLERANCES, randomise_parameters

from xclip_fast import Engine, create_model, pipeline, reference
from xclip_fast.checkpoints import save_model
from xclip_fast.classes import CHUNK_BYTES
from xclip_fast.cli import classify as command
from xclip_fast.engine.heads import Heads
from xclip_fast.errors import InputError
from xclip_fast.text import get_tokenizer

LABELS = "riding a bike,cooking,sleeping,playing the violin"


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny checkpoint in which no parameter has a special value."""
    path = tmp_path_factory.mktemp("weights") / "random.safetensors"
    save_model(randomise_parameters(create_model(TINY, seed=0)), path)
    return path


@pytest.fixture(scope="module")
def videos(tmp_path_factory: pytest.TempPathFactory, bikes: Path, one_frame: Path) -> list[Path]:
    """Videos of differing lengths, sizes and shapes, odd ones too."""
    folder = tmp_path_factory.mktemp("videos")
    rng = np.random.default_rng(0)
    shapes = ((3, 50, 34), (9, 34, 98), (30, 128, 62))
    for number, (frames, height, width) in enumerate(shapes):
        pixels = rng.integers(256, size=(frames, height, width, 3), dtype=np.uint8)
        write_video(folder / f"{number}.mp4", pixels)
    return [bikes, *sorted(folder.iterdir()), one_frame]


def answer(cli: Cli, *arguments: object) -> tuple[int, dict[str, Any], str]:
    code, out, err = cli("classify", *arguments, "--labels", LABELS, "--json")
    return code, json.loads(out), err


def by_label(result: dict[str, Any]) -> torch.Tensor:
    """The probabilities of a file in the order of the labels."""
    found = sorted(result["predictions"], key=lambda prediction: prediction["index"])
    assert [prediction["label"] for prediction in found] == LABELS.split(",")
    return torch.tensor([prediction["probability"] for prediction in found])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("views", ["1", "2x3"])
def test_the_engine_answers_as_the_definition_does(
    dtype: torch.dtype, views: str, cli: Cli, weights: Path, videos: list[Path], bad_files: dict[str, Path]
) -> None:
    name = str(dtype).removeprefix("torch.")
    files = [*videos[:2], bad_files["truncated"], *videos[2:]]
    options = (*files, "--weights", weights, "--views", views, "--dtype", name)
    code, found, said = answer(cli, *options)
    expected_code, expected, expected_said = answer(cli, *options, "--reference")
    assert code == expected_code == 2
    # of half precision the engine may say that it multiplies in float32 here
    errors, expected_errors = (
        [line for line in text.splitlines() if "error:" in line] for text in (said, expected_said)
    )
    assert errors == expected_errors
    assert {key: value for key, value in found.items() if key != "results"} == {
        key: value for key, value in expected.items() if key != "results"
    }
    for one, other in zip(found["results"], expected["results"], strict=True):
        assert one.keys() == other.keys()
        if "error" in one:
            assert one == other
            continue
        tolerance = TOLERANCES[dtype].model
        torch.testing.assert_close(by_label(one), by_label(other), rtol=tolerance, atol=tolerance)
        if dtype is torch.float32:
            assert [x["label"] for x in one["predictions"]] == [x["label"] for x in other["predictions"]]
    assert sum("error" in one for one in found["results"]) == 1
    # the classes are far enough apart for a wrong answer to show
    assert max(by_label(one).max() - by_label(one).min() for one in found["results"] if "error" not in one) > 0.1


@pytest.mark.parametrize("asked", [False, True])
def test_reference_is_the_definition_and_no_engine(
    asked: bool, cli: Cli, weights: Path, bikes: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[type] = []
    make = pipeline.Classifier.__init__

    def noted(self: pipeline.Classifier, model: Any, *arguments: Any) -> None:
        seen.append(type(model))
        make(self, model, *arguments)

    monkeypatch.setattr(pipeline.Classifier, "__init__", noted)
    assert answer(cli, bikes, "--weights", weights, *(["--reference"] if asked else []))[0] == 0
    assert seen == [reference.XCLIP if asked else Engine]


def test_the_model_is_gone_once_the_engine_has_its_weights(
    cli: Cli, weights: Path, bikes: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    models: list[weakref.ref[Any]] = []
    opened, top = command.open_model, pipeline.Classifier.top

    def noted(*arguments: Any) -> Any:
        model = opened(*arguments)
        models.append(weakref.ref(model))
        return model

    def check(self: pipeline.Classifier, views: torch.Tensor, count: int) -> list[pipeline.Prediction]:
        assert [model() for model in models] == [None]
        return top(self, views, count)

    monkeypatch.setattr(command, "open_model", noted)
    monkeypatch.setattr(pipeline.Classifier, "top", check)
    assert answer(cli, bikes, "--weights", weights)[0] == 0


def test_class_sets_of_any_size_are_ranked_in_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    model = randomise_parameters(create_model(TINY, seed=0))
    labels, tokenizer = [f"label {number}" for number in range(300)], get_tokenizer(TINY)
    views = torch.randint(256, (5, 4, 32, 32, 3), dtype=torch.uint8)
    whole = pipeline.Classifier(model, labels, tokenizer).top(views, 300)
    classifier = pipeline.Classifier(Engine(model), labels, tokenizer)
    sizes = []
    chunked = Heads._prompts

    def noted(self: Any, texts: Any, key_value: torch.Tensor) -> torch.Tensor:
        sizes.append(len(texts.features))
        return chunked(self, texts, key_value)

    monkeypatch.setattr(Heads, "_prompts", noted)
    monkeypatch.setitem(CHUNK_BYTES, "cpu", 64 * 4 * 16 * 28)
    found = classifier.top(views, 300)
    assert len(sizes) > 40
    assert max(sizes) <= 28
    expected = {one.index: one.probability for one in whole}
    assert expected == pytest.approx({one.index: one.probability for one in found}, rel=1e-4)


@pytest.mark.parametrize("count", [1, 4, 5, 9])
def test_all_views_count_alike(count: int) -> None:
    model = randomise_parameters(create_model(TINY, seed=0))
    classifier = pipeline.Classifier(Engine(model), ["a", "b", "c"], get_tokenizer(TINY))
    views = torch.randint(256, (count, 4, 32, 32, 3), dtype=torch.uint8)
    one_by_one = torch.stack([classifier.probabilities(view[None]) for view in views])
    torch.testing.assert_close(classifier.probabilities(views), one_by_one.mean(dim=0), rtol=1e-5, atol=1e-6)


def test_one_video_on_the_engine_has_the_features_of_the_model() -> None:
    model = randomise_parameters(create_model(TINY, seed=0))
    views = torch.randint(256, (6, 4, 32, 32, 3), dtype=torch.uint8)
    found, expected = pipeline.embed(Engine(model), views), pipeline.embed(model, views)
    for one, other in zip(found, expected, strict=True):
        assert one.dtype == torch.float32
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


def test_answers_that_are_no_numbers_are_refused() -> None:
    model = randomise_parameters(create_model(TINY, seed=0))
    with torch.no_grad():
        model.logit_scale.fill_(1000)
    classifier = pipeline.Classifier(Engine(model), ["a", "b"], get_tokenizer(TINY))
    with pytest.raises(InputError, match="not numbers"):
        classifier.probabilities(torch.zeros(1, 4, 32, 32, 3, dtype=torch.uint8))
