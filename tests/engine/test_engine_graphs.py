"""The cache of CUDA graphs: buckets, eviction, odd batches, threads; the graphs themselves need a GPU."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor

from xclip_fast.engine import cuda, graphs
from xclip_fast.engine.graphs import CudaGraph, GraphCache, bucket


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
    monkeypatch.setattr(graphs, "uncaptured", lambda video: calls.append(len(video)) or run(video))
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


class Cuda:
    """A stand-in for ``torch.cuda`` that notes what is asked of it, by stream."""

    def __init__(self) -> None:
        self.log: list[str] = []
        self.now = "main"
        self.capturing = False

    def make_stream(self, device: Any = None, priority: int = 0, name: str = "side") -> Any:
        fake = type("Stream", (), {})()
        fake.name = name
        fake.wait_stream = lambda other: self.log.append(f"{name} waits for {other.name}")
        fake.wait_event = lambda event: self.log.append(f"{name} waits for an event")
        return fake

    def current_stream(self, device: Any = None) -> Any:
        return self.make_stream(name=self.now)

    @contextmanager
    def stream(self, stream: Any) -> Iterator[None]:
        self.now, before = stream.name, self.now
        try:
            yield
        finally:
            self.now = before

    @contextmanager
    def graph(self, graph: Any, stream: Any, capture_error_mode: str) -> Iterator[None]:
        assert capture_error_mode == "thread_local"
        self.log.append(f"capture on {stream.name}")
        yield

    def event(self) -> Any:
        fake = type("Event", (), {})()
        fake.record = lambda stream: self.log.append(f"{stream.name} records an event")
        return fake


@pytest.fixture
def fake_cuda(monkeypatch: pytest.MonkeyPatch) -> Cuda:
    fake = Cuda()
    for name, stand_in in {
        "Stream": fake.make_stream,
        "current_stream": fake.current_stream,
        "stream": fake.stream,
        "graph": fake.graph,
        "Event": fake.event,
        "CUDAGraph": lambda: type("Graph", (), {})(),
        "is_current_stream_capturing": lambda: fake.capturing,
    }.items():
        monkeypatch.setattr(torch.cuda, name, stand_in)
    monkeypatch.setattr(graphs, "_replayed", {})
    return fake


def test_another_graph_waits_for_the_one_before(fake_cuda: Cuda) -> None:
    example = torch.ones(2, 3)
    one, two = (CudaGraph(lambda video: [video], example) for _ in range(2))
    for graph in (one, two):
        graph.graph.replay = lambda: None  # type: ignore[attr-defined]
    fake_cuda.log.clear()
    one(example)
    two(example)
    assert fake_cuda.log == ["main waits for an event", "main records an event"] * 2
    assert len(graphs._replayed) == 1


def test_a_graph_fills_its_input_and_hands_out_copies(fake_cuda: Cuda) -> None:
    runs = []

    def work(video: Tensor) -> list[Tensor]:
        runs.append(fake_cuda.now)
        return [2 * video]

    example = torch.ones(2, 3)
    graph: Any = CudaGraph(work, example)
    assert runs == ["side"] * 3 + ["main"]
    assert graph.input.data_ptr() != example.data_ptr()
    # a replay computes into the captured tensors
    graph.graph.replay = lambda: graph.output[0].copy_(2 * graph.input)
    fake_cuda.log.clear()
    first = graph(torch.full((2, 3), 5.0))
    second = graph(torch.full((2, 3), 7.0))
    assert torch.equal(first[0], torch.full((2, 3), 10.0))
    assert torch.equal(second[0], torch.full((2, 3), 14.0))
    assert fake_cuda.log == ["main waits for an event", "main records an event"] * 2
    assert torch.equal(example, torch.ones(2, 3))


@pytest.mark.parametrize("capturing", [False, True])
def test_side_work_starts_and_ends_in_order(fake_cuda: Cuda, capturing: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    fake_cuda.capturing = capturing
    kept = []
    monkeypatch.setattr(torch.Tensor, "record_stream", lambda self, stream: kept.append(stream.name))
    side, ran = cuda.SideStream(torch.device("cuda")), []
    with side.beside(lambda: ran.append(fake_cuda.now) or torch.ones(1)) as joined:
        assert ran == ["side"]
        assert fake_cuda.now == "main"
        assert torch.equal(joined(), torch.ones(1))
    assert fake_cuda.log == ["side waits for main", "main waits for side"]
    assert kept == ([] if capturing else ["main"])


@pytest.mark.parametrize("where", ["side", "main"])
def test_an_exception_joins_what_is_apart(fake_cuda: Cuda, where: str) -> None:
    def fail() -> torch.Tensor:
        raise torch.OutOfMemoryError("no room")

    side = cuda.SideStream(torch.device("cuda"))
    with pytest.raises(torch.OutOfMemoryError), side.beside(fail if where == "side" else lambda: torch.ones(1)):
        fail()
    assert fake_cuda.now == "main"
    assert fake_cuda.log == ["side waits for main", "main waits for side"]


def test_each_thread_has_a_side_stream(fake_cuda: Cuda, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.Tensor, "record_stream", lambda self, stream: None)
    side, streams = cuda.SideStream(torch.device("cuda")), []

    def work() -> None:
        for _ in range(2):
            with side.beside(lambda: torch.ones(1)) as joined:
                joined()
        streams.append(side.local.stream)

    threads = [threading.Thread(target=work) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(streams) == 2
    assert streams[0] is not streams[1]
