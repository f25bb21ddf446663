"""Graphs of a video with a class set: when one is captured, what it keeps, and what the engine gives by them."""

from __future__ import annotations

import gc
import threading
import weakref
from functools import partial
from typing import Any

import pytest
import torch
from engine_cases import random_tokens, random_video, small_model
from torch import Tensor

from xclip_fast.engine import Engine, api
from xclip_fast.engine.graphs import MAX_PAIRS, GraphCache, Pass


def score(video: Tensor, *texts: Tensor) -> list[Tensor]:
    features, shift = texts
    return [video @ features.t() + shift]


class Recorded:
    """A stand-in for a captured graph, which reads the class set where it lies."""

    def __init__(self, log: list[str], run: Pass, video: Tensor) -> None:
        self.log, self.run, self.shape = log, run, video.shape
        self.log.append(f"capture {len(video)}")

    def __call__(self, video: Tensor) -> list[Tensor]:
        assert video.shape == self.shape
        self.log.append("replay")
        return self.run(video)


@pytest.fixture
def log() -> list[str]:
    return []


def cache(log: list[str], capacity: int = 3, plain: float = 2.0) -> GraphCache:
    """A cache that finds an odd batch to take a second padded and this long otherwise."""

    def uncaptured(video: Tensor, *texts: Tensor) -> list[Tensor]:
        log.append("uncaptured")
        return score(video, *texts)

    times = iter([1.0] * 5 + [plain] * 5)
    return GraphCache(score, partial(Recorded, log), lambda work: (work(), next(times))[1], capacity, uncaptured)


def class_set(classes: int = 5) -> tuple[Tensor, Tensor]:
    return torch.randn(classes, 3), torch.randn(classes)


def test_a_class_set_is_captured_when_it_comes_again(log: list[str]) -> None:
    graphs, texts = cache(log), class_set()
    for _ in range(3):
        video = torch.randn(2, 3)
        assert torch.equal(graphs(video, *texts)[0], score(video, *texts)[0])
    assert log == ["uncaptured", "capture 2", "replay", "replay"]
    # videos of another shape, and another set, begin anew; a batch of three would be padded to these four
    graphs(torch.randn(4, 3), *texts)
    graphs(torch.randn(2, 3), *class_set())
    assert log[4:] == ["uncaptured"] * 2
    graphs(torch.randn(3, 3), *texts)
    assert log[6:8] == ["capture 4", "replay"]


def test_sets_seen_once_push_nothing_out(log: list[str]) -> None:
    graphs, texts = cache(log, capacity=1), class_set()
    for _ in range(2):
        graphs(torch.randn(2, 3), *texts)
    log.clear()
    for _ in range(20):
        # the memory of one may be that of the one before
        graphs(torch.randn(2, 3), *class_set())
    graphs(torch.randn(2, 3), *texts)
    assert log == ["uncaptured"] * 20 + ["replay"]


def test_what_lies_where_a_set_lay_is_another_set(log: list[str]) -> None:
    graphs, memory = cache(log), class_set()
    for _ in range(3):
        graphs(torch.randn(2, 3), *(x.view(x.shape) for x in memory))
    assert log == ["uncaptured"] * 3


def test_a_set_is_read_where_it_lies(log: list[str]) -> None:
    graphs, texts, video = cache(log), class_set(), torch.randn(2, 3)
    for _ in range(2):
        graphs(video, *texts)
    texts[0].add_(1)
    assert torch.equal(graphs(video, *texts)[0], score(video, *texts)[0])
    # elsewhere it is not what the graph reads
    texts[0].data = torch.randn(5, 3)
    assert torch.equal(graphs(video, *texts)[0], score(video, *texts)[0])
    assert log[-2:] == ["replay", "uncaptured"]


def test_a_graph_keeps_its_set_until_it_goes(log: list[str]) -> None:
    graphs, texts = cache(log, capacity=1), class_set()
    for _ in range(2):
        graphs(torch.randn(2, 3), *texts)
    alive = [weakref.ref(x) for x in texts]
    del texts
    gc.collect()
    assert all(x() is not None for x in alive)
    others = class_set()
    for _ in range(2):
        graphs(torch.randn(2, 3), *others)
    gc.collect()
    assert all(x() is None for x in alive)


def test_a_set_seen_once_is_not_kept(log: list[str]) -> None:
    graphs, texts = cache(log), class_set()
    graphs(torch.randn(2, 3), *texts)
    alive = weakref.ref(texts[0])
    del texts
    gc.collect()
    assert alive() is None


@pytest.mark.parametrize("plain", [0.5, 2.0], ids=["plain is faster", "padded is faster"])
def test_odd_batches(log: list[str], plain: float) -> None:
    graphs, texts = cache(log, plain=plain), class_set()
    for _ in range(4):
        video = torch.randn(3, 3)
        found = graphs(video, *texts)[0]
        torch.testing.assert_close(found, score(video, *texts)[0])
    assert log.count("capture 4") == 1
    assert log[-2:] == (["uncaptured"] * 2 if plain < 1 else ["replay"] * 2)


def test_very_many_pairs_are_not_captured(log: list[str]) -> None:
    graphs, texts = cache(log), class_set(MAX_PAIRS // 2 + 1)
    for _ in range(3):
        graphs(torch.randn(2, 3), *texts)
    assert log == ["uncaptured"] * 3


def test_threads_capture_a_set_once(log: list[str]) -> None:
    graphs, texts = cache(log), class_set()
    graphs(torch.randn(2, 3), *texts)
    videos = [torch.randn(2, 3) for _ in range(6)]
    found: dict[int, Tensor] = {}
    threads = [
        threading.Thread(target=lambda i=i: found.update({i: graphs(videos[i], *texts)[0]})) for i in range(len(videos))
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert log.count("capture 2") == 1
    assert all(torch.equal(found[i], score(videos[i], *texts)[0]) for i in range(len(videos)))


@pytest.fixture
def engine(log: list[str], monkeypatch: pytest.MonkeyPatch) -> Engine:
    """An engine on the CPU that runs as one on a GPU does, its graphs recorded."""
    monkeypatch.setattr(
        api, "GraphCache", partial(GraphCache, capture=partial(Recorded, log), seconds=lambda work: 1.0)
    )
    engine = Engine(small_model())
    engine._graphs = engine._by_graphs()
    return engine


@pytest.mark.parametrize("kind", ["tokens", "set", "features"])
@pytest.mark.parametrize("batch", [1, 3])
def test_scores_are_those_of_plain_calls(engine: Engine, log: list[str], batch: int, kind: str) -> None:
    classes: Any = random_tokens()
    if kind != "tokens":
        classes = engine.encode_texts(classes)
    if kind == "features":
        classes = engine.texts_of(classes.features)
    for call in (engine, engine.classify):
        for _ in range(3):
            video = random_video(batch)
            found = call(video, classes)
            texts = engine.encode_texts(classes) if kind == "tokens" else classes
            graphs, engine._graphs = engine._graphs, None
            wanted = engine.logits(engine.encode_video(video), texts)
            engine._graphs = graphs
            wanted = wanted.softmax(dim=-1) if call == engine.classify else wanted
            assert found.dtype is torch.float32
            torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-6)


def test_scores_are_one_graph_with_nothing_behind_it(
    engine: Engine, log: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    texts = engine.encode_texts(random_tokens())
    for call in (engine, engine.classify):
        for _ in range(2):
            call(random_video(2), texts)
    # the first call goes by the graph of the features, which both share
    assert log == ["capture 2", "replay", "capture 2", "replay", "replay", "capture 2", "replay"]
    outside: list[str] = []
    monkeypatch.setattr(engine._heads, "logits", lambda *_: pytest.fail("outside of the graph"))
    for name in ("_logits", "_probabilities"):
        monkeypatch.setattr(engine._graphs[name], "run", lambda *_, name=name: outside.append(name) or [torch.ones(2)])
        # a recorded graph asks the cache what to run
    assert torch.equal(engine(random_video(2), texts), torch.ones(2))
    assert torch.equal(engine.classify(random_video(2), texts), torch.ones(2))
    assert outside == ["_logits", "_probabilities"]


def test_autocast_does_not_reach_the_graphs(engine: Engine) -> None:
    texts, video = engine.encode_texts(random_tokens()), random_video(2)
    wanted = engine(video, texts)
    with torch.autocast("cpu", torch.bfloat16):
        found = [engine(video, texts) for _ in range(2)]
    assert all(torch.equal(each, wanted) for each in found)
