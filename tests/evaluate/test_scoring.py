"""Scores of files: those of each file alone, one decoding for all views, the same bits however many share the work."""

from __future__ import annotations

import hashlib
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from xclip_fast import InputError
from xclip_fast.demo.clips import CLASSES
from xclip_fast.demo.models import load_trained
from xclip_fast.evaluate import Processes, score_files
from xclip_fast.pipeline import Classifier, classify_files
from xclip_fast.text import get_tokenizer
from xclip_fast.video import load, load_video

FULL = {"clips": 4, "crops": 3, "preset": "hf"}


def paths(clips: Path) -> list[str]:
    return [str(clips / f"{label}_0.mp4") for label in range(5)]


def test_probabilities_are_those_of_each_file_alone(clips: Path, engine: Any) -> None:
    config = engine.config
    classifier = Classifier(engine, CLASSES, get_tokenizer(config))
    files = [*paths(clips), "none.mp4"]
    found = list(classify_files(engine, files, list(CLASSES), batch_size=7, workers=0, **FULL))
    assert [one.path for one in found] == files
    for one in found[:-1]:
        alone = classifier.probabilities(load_video(one.path, frames=config.frames, size=config.image_size, **FULL))
        torch.testing.assert_close(one.scores, alone, rtol=1e-4, atol=1e-5)
        assert one.scores.sum().item() == pytest.approx(1, abs=1e-5)
    assert found[-1].scores is None
    assert "none.mp4" in str(found[-1].error)


def test_probabilities_are_averaged_not_logits(clips: Path, engine: Any) -> None:
    # the official code adds up the softmax of each view
    views = load_video(paths(clips)[0], frames=8, size=64, preset="hf", clips=3)
    texts = engine.encode_texts(list(CLASSES))
    truth = engine.classify(views, texts).mean(dim=0)
    [found] = classify_files(engine, paths(clips)[:1], texts, clips=3, preset="hf", workers=0)
    torch.testing.assert_close(found.scores, truth, rtol=1e-4, atol=1e-6)
    [logits] = classify_files(engine, paths(clips)[:1], texts, logits=True, clips=3, preset="hf", workers=0)
    torch.testing.assert_close(logits.scores, engine(views, texts).mean(dim=0), rtol=1e-4, atol=1e-4)
    assert (logits.scores.softmax(dim=0) - truth).abs().max() > 1e-4


def test_a_model_without_an_engine_gives_the_same(clips: Path, engine: Any) -> None:
    model = load_trained("xclip")
    with torch.inference_mode():
        text = model.encode_text(get_tokenizer(model.config)(list(CLASSES), model.config.context_length))
    for logits in (False, True):
        options = {"logits": logits, "preset": "hf", "workers": 0}
        found = classify_files(model, paths(clips), text, **options)
        truth = classify_files(engine, paths(clips), list(CLASSES), **options)
        for one, other in zip(found, truth, strict=True):
            torch.testing.assert_close(one.scores, other.scores, rtol=1e-3, atol=1e-4)


def test_all_views_come_from_one_decoding(clips: Path, engine: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    chosen: list[str] = []
    select = load.select_backend

    def counted(name: str, source: Any) -> Any:
        chosen.append(source.name)
        return select(name, source)

    monkeypatch.setattr(load, "select_backend", counted)
    found = list(classify_files(engine, paths(clips), list(CLASSES), workers=0, **FULL))
    assert [one.error for one in found] == [None] * 5
    assert len(chosen) == 5


class Threads(Processes):
    """Processes that are threads: what they give meets at a barrier."""

    def __init__(self, rank: int, count: int, barrier: threading.Barrier, table: list[bytes]) -> None:
        super().__init__(rank, count)
        object.__setattr__(self, "barrier", barrier)
        object.__setattr__(self, "table", table)

    def gather(self, data: bytes) -> list[bytes]:
        self.table[self.rank] = data  # type: ignore[attr-defined]
        self.barrier.wait()  # type: ignore[attr-defined]
        found = list(self.table)  # type: ignore[attr-defined]
        self.barrier.wait()  # type: ignore[attr-defined]
        return found


def shared(engine: Any, files: list[str], count: int, **options: Any) -> list[Any]:
    """What each of several threads finds."""
    barrier, table = threading.Barrier(count, timeout=60), [b""] * count
    found: list[Any] = [None] * count

    def work(rank: int) -> None:
        among = Threads(rank, count, barrier, table)
        found[rank] = score_files(engine, files, list(CLASSES), among=among, preset="hf", workers=0, **options)

    threads = [threading.Thread(target=work, args=(rank,)) for rank in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return found


@pytest.mark.parametrize(
    ("count", "views", "batch_size"), [(2, {"clips": 1}, 2), (3, {"clips": 3}, 4), (9, {"clips": 1}, 3)]
)
def test_several_find_the_bits_of_one(
    count: int, views: dict[str, int], batch_size: int, clips: Path, engine: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = [str(clips / f"{place % 8}_{place // 8}.mp4") for place in range(11)]
    files[3] = str(clips / "none.mp4")
    batches: list[bytes] = []
    classify = engine.classify

    def seen(batch: torch.Tensor, texts: Any) -> torch.Tensor:
        batches.append(hashlib.sha256(batch.numpy().tobytes()).digest())
        return classify(batch, texts)

    monkeypatch.setattr(engine, "classify", seen)
    alone = score_files(engine, files, list(CLASSES), preset="hf", workers=0, batch_size=batch_size, **views)
    assert alone.places.tolist() == [0, 1, 2, *range(4, 11)]
    assert list(alone.failed) == [3]
    by_one = sorted(batches)
    batches.clear()
    for found in shared(engine, files, count, batch_size=batch_size, **views):
        assert np.array_equal(found.scores, alone.scores)
        assert np.array_equal(found.places, alone.places)
        assert found.failed == alone.failed
    # a model so small rounds alike whatever shares a batch: a larger one does not
    assert sorted(batches) == by_one


def test_rows_are_those_of_their_files(clips: Path, engine: Any) -> None:
    files = paths(clips)
    found = score_files(engine, files, list(CLASSES), preset="hf", workers=0, batch_size=2)
    turned = score_files(engine, files[::-1], list(CLASSES), preset="hf", workers=0, batch_size=2)
    assert np.allclose(found.scores, turned.scores[::-1], atol=1e-5)
    assert found.scores.argmax(axis=1).tolist() == [0, 1, 2, 3, 4]


def test_each_file_is_reported_once(clips: Path, engine: Any) -> None:
    told: list[tuple[str, str | None]] = []
    score_files(
        engine, ["none.mp4", *paths(clips)], list(CLASSES), preset="hf", workers=0, report=lambda *one: told.append(one)
    )
    assert [path for path, _ in told] == ["none.mp4", *paths(clips)]
    assert [error is None for _, error in told] == [False] + [True] * 5


def test_nothing_that_can_be_used_is_one_line(engine: Any) -> None:
    with pytest.raises(InputError, match=r"none of the 2 videos could be used, the first: a\.mp4"):
        score_files(engine, ["a.mp4", "b.mp4"], list(CLASSES), workers=0)


def test_bad_numbers_are_refused_before_any_work(engine: Any) -> None:
    for options in ({"batch_size": 0}, {"crops": 2}, {"workers": -1}, {"timeout": 0}):
        with pytest.raises(ValueError, match=r"."):
            score_files(engine, ["a.mp4"], list(CLASSES), **options)
    with pytest.raises(ValueError, match="list of files"):
        classify_files(engine, "a.mp4", list(CLASSES))


def test_a_model_that_gives_no_numbers_is_an_error_of_the_file(clips: Path) -> None:
    broken = load_trained("xclip")
    with torch.no_grad():
        broken.visual.proj.fill_(float("nan"))
    text = torch.ones(len(CLASSES), 64)
    found = list(classify_files(broken, paths(clips)[:2], text, preset="hf", workers=0))
    assert all("not numbers" in str(one.error) and one.scores is None for one in found)
