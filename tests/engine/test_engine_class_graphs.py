"""Graphs of a video with a class set: when one is captured, what it keeps, and what the engine gives by them."""

from __future__ import annotations

import gc
import threading
import weakref
from collections.abc import Callable
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


@pytest.mark.parametrize("sets", [3, 4, 6, 20])
def test_sets_that_take_turns_are_not_captured_at_every_call(sets: int, log: list[str]) -> None:
    graphs, all_of_them = cache(log, capacity=3), [class_set() for _ in range(sets)]
    calls = 50 * sets
    for call in range(calls):
        video, texts = torch.randn(2, 3), all_of_them[call % sets]
        assert torch.equal(graphs(video, *texts)[0], score(video, *texts)[0])
    captures = log.count("capture 2")
    # those that fit in are captured once; of more the captures become rare
    assert captures == 3 if sets == 3 else 3 <= captures <= 0.2 * calls
    rest = len(log)
    for call in range(4 * sets):
        graphs(torch.randn(2, 3), *all_of_them[call % sets])
    assert log[rest:].count("capture 2") <= sets


def test_a_set_that_the_memory_is_too_small_for_is_computed_without_a_graph(log: list[str]) -> None:
    def full(run: Pass, video: Tensor) -> Any:
        log.append("full")
        raise torch.OutOfMemoryError("CUDA out of memory")

    graphs, texts = cache(log), class_set()
    graphs.capture = full
    for _ in range(5):
        video = torch.randn(2, 3)
        assert torch.equal(graphs(video, *texts)[0], score(video, *texts)[0])
    # it is tried once
    assert log == ["uncaptured", "full"] + ["uncaptured"] * 4
    # without a class set there is no other way
    with pytest.raises(torch.OutOfMemoryError):
        GraphCache(lambda video: [video], full)(torch.randn(2, 3))


def test_the_pairs_of_a_graph_are_those_of_its_bucket(log: list[str]) -> None:
    graphs, texts = cache(log), class_set(MAX_PAIRS // 4)
    for batch in (4, 5):
        for _ in range(3):
            graphs(torch.randn(batch, 3), *texts)
    assert "capture 4" in log
    assert "capture 8" not in log
    # three videos are few enough, the four they would be padded to are not
    log.clear()
    graphs, texts = cache(log), class_set(MAX_PAIRS // 4 + 1)
    for _ in range(3):
        graphs(torch.randn(3, 3), *texts)
    assert log == ["uncaptured"] * 3


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


def test_what_is_read_otherwise_where_a_set_lies_is_another_set(log: list[str]) -> None:
    graphs, features, shift = cache(log, capacity=8), torch.randn(3, 3), torch.randn(3)
    video = torch.randn(2, 3)
    sets = (features, shift), (features.t(), shift), (features[:2], shift[:2]), (features, shift.as_strided((3,), (0,)))
    for texts in sets:
        for _ in range(3):
            assert torch.equal(graphs(video, *texts)[0], score(video, *texts)[0])
    assert log.count("capture 2") == len(sets)


def test_the_way_of_an_odd_batch_is_that_of_its_class_set_and_dtype() -> None:
    timed: list[tuple[int, torch.dtype]] = []

    def seconds(work: Callable[[], object]) -> float:
        timed.append((classes, dtype))
        work()
        return 1.0

    graphs = GraphCache(score, lambda run, video: run, seconds)
    for classes, dtype in [(5, torch.float32), (7, torch.float32), (5, torch.float64), (5, torch.float32)]:
        texts = tuple(x.to(dtype) for x in class_set(classes))
        for _ in range(3):
            graphs(torch.randn(3, 3, dtype=dtype), *texts)
    # each is timed when it is first seen, and once
    assert list(dict.fromkeys(timed)) == [(5, torch.float32), (7, torch.float32), (5, torch.float64)]
    assert len(timed) == 3 * 10


def test_a_graph_keeps_its_set_until_it_goes() -> None:
    # a captured graph knows addresses alone
    graphs, texts = GraphCache(score, lambda run, video: lambda video: [video], capacity=1), class_set()
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


def test_scores_are_one_graph_with_nothing_after_it(
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
