"""CUDA graphs: one a batch bucket, frames and resolution, the least recently used out first. Never run on a GPU."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import Tensor

from xclip_fast.recent import Recent

MAX_GRAPHS = 8
_TRIALS = 5  # of each way of running an odd batch


class Graph(Protocol):
    """A forward pass with buffers of its own."""

    def __call__(self, video: Tensor) -> list[Tensor]:
        """Results for a video of exactly the captured shape; they stay valid when the graph runs again."""


class CudaGraph:
    """A captured forward pass. One thread at a time runs it: its buffers are shared.

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
        self.done = torch.cuda.Event()
        self.done.record(torch.cuda.current_stream(video.device))
        self.lock = threading.Lock()

    def __call__(self, video: Tensor) -> list[Tensor]:
        with self.lock:
            stream = torch.cuda.current_stream(video.device)
            # a caller on another stream may still be reading the buffers
            stream.wait_event(self.done)
            self.input.copy_(video)
            self.graph.replay()
            results = [x.clone() for x in self.output]
            self.done.record(stream)
            return results


class GraphCache:
    """Runs a forward pass by graphs. Safe in several threads.

    A batch that is no power of two is padded to the next one or run without a graph, whichever was faster when the
    shape was first seen.

    Args:
        run: the forward pass on a video (B, ...), giving tensors of B rows each.
        capture: makes a graph of ``run`` for a video.
        seconds: runs a function and says how long it took.
        capacity: graphs kept at most; each has buffers for a whole forward pass.
    """

    def __init__(
        self,
        run: Callable[[Tensor], list[Tensor]],
        capture: Callable[[Callable[[Tensor], list[Tensor]], Tensor], Graph] = CudaGraph,
        seconds: Callable[[Callable[[], object]], float] | None = None,
        capacity: int = MAX_GRAPHS,
    ) -> None:
        self.run, self.capture = run, capture
        self.seconds = seconds or _cuda_seconds
        self._graphs: Recent[tuple[Any, ...], Graph] = Recent(capacity)
        self._padded: dict[tuple[Any, ...], bool] = {}
        self._lock = threading.Lock()

    def __call__(self, video: Tensor) -> list[Tensor]:
        """What ``run`` gives for the video."""
        batch = len(video)
        if bucket(batch) == batch:
            return self._graph(video)(video)
        key = video.dtype, *video.shape
        with self._lock:
            padded = self._padded.get(key)
        if padded is None:
            padded = self._faster_padded(video)
            with self._lock:
                padded = self._padded.setdefault(key, padded)
        return self._run_padded(video) if padded else self.run(video)

    def _run_padded(self, video: Tensor) -> list[Tensor]:
        # repeated videos, not zeros: no shape of numbers the model has not seen
        index = torch.arange(bucket(len(video)), device=video.device) % len(video)
        whole = video[index]
        return [x[: len(video)] for x in self._graph(whole)(whole)]

    def _faster_padded(self, video: Tensor) -> bool:
        ways: tuple[Callable[[Tensor], object], ...] = self._run_padded, self.run
        for way in ways:
            way(video)
        padded, plain = (min(self.seconds(lambda way=way: way(video)) for _ in range(_TRIALS)) for way in ways)  # type: ignore[misc]
        return padded < plain

    def _graph(self, video: Tensor) -> Graph:
        key = video.dtype, *video.shape
        with self._lock:
            # capture is rare and must not meet another capture: it stays under the lock
            graph = self._graphs.get(key)
            if graph is None:
                graph = self.capture(self.run, video)
                self._graphs.put(key, graph)
            return graph


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
