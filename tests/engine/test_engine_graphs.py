"""The cache of CUDA graphs: buckets, eviction, odd batches, threads; the graphs themselves need a GPU."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from xclip_fast.engine.graphs import GraphCache, bucket


def run(video: Tensor) -> list[Tensor]:
    return [video.sum(dim=1), 2 * video]


class Recorded:
    """A stand-in for a captured graph."""

    captured: list[tuple[int, ...]] = []  # noqa: RUF012

    def __init__(self, run: Callable[[Tensor], list[Tensor]], video: Tensor) -> None:
        self.shape, self.run = video.shape, run
        self.captured.append(tuple(video.shape))

    def __call__(self, video: Tensor) -> list[Tensor]:
        assert video.shape == self.shape
        return self.run(video)


@pytest.fixture(autouse=True)
def nothing_captured() -> None:
    Recorded.captured.clear()


def cache(padded: float = 1.0, plain: float = 2.0, capacity: int = 3) -> GraphCache:
    """A cache that finds an odd batch to take these seconds padded and without a graph."""
    times = iter([padded] * 5 + [plain] * 5)
    return GraphCache(run, Recorded, lambda work: next(times), capacity)


def test_buckets() -> None:
    assert [bucket(batch) for batch in (1, 2, 3, 4, 5, 8, 9, 33)] == [1, 2, 4, 4, 8, 8, 16, 64]


@pytest.mark.parametrize("batch", [1, 2, 3, 4, 5, 7])
@pytest.mark.parametrize("plain", [0.5, 2.0], ids=["plain is faster", "padded is faster"])
def test_results_are_those_of_the_batch(batch: int, plain: float) -> None:
    graphs, video = cache(plain=plain), torch.randn(batch, 3)
    for _ in range(3):
        for found, wanted in zip(graphs(video), run(video), strict=True):
            assert torch.equal(found, wanted)


def test_a_shape_is_captured_once() -> None:
    graphs = cache()
    for _ in range(3):
        graphs(torch.randn(4, 3))
    graphs(torch.randn(2, 3))
    graphs(torch.randn(4, 5))
    assert Recorded.captured == [(4, 3), (2, 3), (4, 5)]


def test_dtypes_have_graphs_of_their_own() -> None:
    graphs = cache()
    graphs(torch.ones(2, 3))
    graphs(torch.ones(2, 3, dtype=torch.uint8))
    assert len(Recorded.captured) == 2


@pytest.mark.parametrize(("plain", "through_graph"), [(0.5, False), (2.0, True)])
def test_odd_batches_go_the_faster_way(plain: float, through_graph: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    graphs = cache(plain=plain)
    graphs(torch.randn(3, 3))
    assert Recorded.captured == [(4, 3)]
    calls = []
    monkeypatch.setattr(graphs, "run", lambda video: calls.append(len(video)) or run(video))
    # the choice stands: the clock has nothing more to give
    graphs(torch.randn(3, 3))
    assert calls == ([] if through_graph else [3])


def test_the_least_recently_used_goes_first() -> None:
    graphs = cache(capacity=2)
    for width in (1, 2, 1, 3, 1, 2):
        graphs(torch.randn(2, width))
    assert [shape[1] for shape in Recorded.captured] == [1, 2, 3, 2]


def test_threads_capture_a_shape_once() -> None:
    class Slow(Recorded):
        def __init__(self, run: Callable[[Tensor], list[Tensor]], video: Tensor) -> None:
            time.sleep(0.02)
            super().__init__(run, video)

    graphs = GraphCache(run, Slow, lambda work: 1.0)
    videos = [torch.full((2, 3), float(i)) for i in range(6)]
    found: dict[int, Tensor] = {}
    threads = [threading.Thread(target=lambda i=i: found.update({i: graphs(videos[i])[1]})) for i in range(len(videos))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert Recorded.captured == [(2, 3)]
    assert all(torch.equal(found[i], 2 * videos[i]) for i in range(len(videos)))
