"""CUDA graphs: one for each batch bucket, frames, resolution and class set, in an LRU cache."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable
from functools import partial
from math import inf
from typing import Any, Protocol

import torch
from torch import Tensor

from xclip_fast.recent import Recent

MAX_GRAPHS = 8
MAX_PAIRS = 1 << 14  # of a video and a class in a graph: with more, buffers are large and launch overhead is small
_TRIALS = 5  # of each way of running an odd batch
_CAPTURE = threading.Lock()  # one capture at a time in a process: it begins by synchronising the device
# replays of all graphs on a device run one after another: what one thread captured shares its cuBLAS workspaces
_REPLAY = threading.Lock()
_replayed: dict[torch.device, torch.cuda.Event] = {}

Pass = Callable[..., list[Tensor]]


class Graph(Protocol):
    """A forward pass with buffers of its own."""

    def __call__(self, video: Tensor) -> list[Tensor]:
        """Results for a video of exactly the captured shape; they stay valid when the graph runs again."""


class CudaGraph:
    """A captured forward pass. One thread at a time queues one, and it waits for the one before: buffers are shared.

    Args:
        run: the forward pass, without a look at values.
        video: an example; its contents do not matter.
    """

    def __init__(self, run: Callable[[Tensor], list[Tensor]], video: Tensor) -> None:
        self.input = video.clone()
        # what the first run compiles and caches must not happen under capture
        stream = torch.cuda.Stream(video.device)
        stream.wait_stream(torch.cuda.current_stream(video.device))
        with torch.cuda.stream(stream):
            for _ in range(3):
                run(self.input)
        torch.cuda.current_stream(video.device).wait_stream(stream)
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph, stream=stream, capture_error_mode="thread_local"):
            self.output = run(self.input)
        with _REPLAY:
            replayed = _replayed.setdefault(video.device, torch.cuda.Event())
            # the copy of the example, which a replay on another stream writes over
            torch.cuda.current_stream(video.device).wait_event(replayed)
            replayed.record(torch.cuda.current_stream(video.device))

    def __call__(self, video: Tensor) -> list[Tensor]:
        with _REPLAY:
            stream, replayed = torch.cuda.current_stream(video.device), _replayed[video.device]
            # another stream may still replay this graph or another, or read its buffers
            stream.wait_event(replayed)
            self.input.copy_(video)
            self.graph.replay()
            results = [x.clone() for x in self.output]
            replayed.record(stream)
            return results


class GraphCache:
    """Runs a forward pass by graphs. Safe in several threads.

    A batch that is no power of two is padded to the next one or run without a graph, whichever was faster when the
    shape was first seen.

    A class set is captured as it lies in memory, and its graph keeps it alive. Most of those that are seen once never
    come back: a set has a graph from its second call on with a shape of videos, from a later one where more sets take
    turns than there is room for, and none with very many videos and classes or too little memory.

    Args:
        run: the forward pass on a video (B, ...) and the tensors (K, ...) of a class set, if it takes one; it gives
            tensors of B rows each.
        capture: makes a graph of a forward pass for a video.
        seconds: runs a function and says how long it took.
        capacity: graphs kept at most; each has buffers for a whole forward pass.
        uncaptured: gives what ``run`` does where a class set has no graph; by default it is ``run``.
    """

    def __init__(
        self,
        run: Pass,
        capture: Callable[[Pass, Tensor], Graph] = CudaGraph,
        seconds: Callable[[Callable[[], object]], float] | None = None,
        capacity: int = MAX_GRAPHS,
        uncaptured: Pass | None = None,
    ) -> None:
        self.run, self.capture, self.uncaptured = run, capture, uncaptured or run
        self.seconds = seconds or _cuda_seconds
        self._graphs: Recent[tuple[Any, ...], tuple[Graph, tuple[Tensor, ...]]] = Recent(capacity)
        self._capacity, self._captured = capacity, 0
        # class sets that were called without a graph, and how often
        self._seen: Recent[tuple[Any, ...], tuple[weakref.ref[Tensor], float]] = Recent(8 * capacity)
        self._padded: dict[tuple[Any, ...], bool] = {}

    def __call__(self, video: Tensor, *texts: Tensor) -> list[Tensor]:
        """What ``run`` gives for the video and the class set."""
        if not texts:
            return self._by_graphs(video)
        if not self._comes_back(video, texts):
            return self.uncaptured(video, *texts)
        try:
            return self._by_graphs(video, *texts)
        except torch.OutOfMemoryError:
            # a graph has buffers of its own for the whole pass, which there may be no room for
            self._seen.put(_key(video, texts), (weakref.ref(texts[0]), -inf))
            return self.uncaptured(video, *texts)

    def _by_graphs(self, video: Tensor, *texts: Tensor) -> list[Tensor]:
        batch = len(video)
        if bucket(batch) == batch:
            return self._graph(video, texts)(video)
        key = video.dtype, *video.shape, *(x.shape for x in texts)
        padded = self._padded.get(key)
        if padded is None:
            padded = self._padded.setdefault(key, self._faster_padded(video, texts))
        return self._run_padded(video, texts) if padded else self.uncaptured(video, *texts)

    def _comes_back(self, video: Tensor, texts: tuple[Tensor, ...]) -> bool:
        if bucket(len(video)) * len(texts[0]) > MAX_PAIRS:
            return False
        key = _key(video, texts)
        if self._graphs.get(key) is not None:
            return True
        before = self._seen.get(key)
        # where a set lies another may lie once it is gone
        calls = before[1] + 1 if before is not None and before[0]() is texts[0] else 1
        self._seen.put(key, (weakref.ref(texts[0]), calls))
        # sets that take turns push one another out: each capture beyond the room asks for one call more before the next
        return calls > max(1, self._captured - self._capacity + 1)

    def _run_padded(self, video: Tensor, texts: tuple[Tensor, ...]) -> list[Tensor]:
        # repeated videos, not zeros: no shape of numbers the model has not seen
        index = torch.arange(bucket(len(video)), device=video.device) % len(video)
        whole = video[index]
        return [x[: len(video)] for x in self._graph(whole, texts)(whole)]

    def _faster_padded(self, video: Tensor, texts: tuple[Tensor, ...]) -> bool:
        ways = partial(self._run_padded, video, texts), partial(self.uncaptured, video, *texts)
        for way in ways:
            way()
        padded, plain = (min(self.seconds(way) for _ in range(_TRIALS)) for way in ways)
        return padded < plain

    def _graph(self, video: Tensor, texts: tuple[Tensor, ...]) -> Graph:
        key = _key(video, texts)
        kept = self._graphs.get(key)
        if kept is None:
            with _CAPTURE:
                kept = self._graphs.get(key)
                if kept is None:
                    kept = self.capture(lambda video: self.run(video, *texts), video), texts
                    self._captured += 1
                    self._graphs.put(key, kept)
        return kept[0]


def _key(video: Tensor, texts: tuple[Tensor, ...]) -> tuple[Any, ...]:
    """Of a graph: the shape of the videos in their bucket, and where and how the class set lies in memory."""
    return (
        video.dtype,
        bucket(len(video)),
        *video.shape[1:],
        *((x.data_ptr(), x.dtype, x.shape, x.stride()) for x in texts),
    )


def bucket(batch: int) -> int:
    """The least power of two that holds a batch."""
    return 1 << (batch - 1).bit_length()


def _cuda_seconds(work: Callable[[], object]) -> float:
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record()
    work()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1e3
