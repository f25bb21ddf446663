"""How time is taken: calls in blocks of at most half a second, two contenders in turn, medians and their spread."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import NamedTuple, TypeVar

import numpy as np
import torch

from xclip_fast.bench.record import Timing

Sample = Callable[[], float]
Result = TypeVar("Result")

BLOCK = 0.5  # seconds of a block at most
GROUP = 1e-3  # seconds between two GPU events at least: shorter ones measure the events
CACHE = 256 << 20  # bytes written to make a cache cold
CLOCK_DRIFT = 0.03  # a block whose clock is further from the median is dropped
SPENT = 24.0  # seconds that all blocks of two contenders may take: six blocks where a call takes one
LEAST = 3  # blocks, however long one takes


class Reading(NamedTuple):
    """What a GPU says of itself at one moment; None for what cannot be read, and on a CPU."""

    clock_mhz: float | None = None
    power_w: float | None = None
    temperature_c: float | None = None


def sampler(run: Callable[[], object], device: str, block: float = BLOCK, *, graph: bool, cold: bool = False) -> Sample:
    """A function that runs a block of calls and returns the median seconds of one.

    Args:
        run: one call; it returns when the work is queued.
        device: "cpu" or a CUDA device.
        block: seconds of a block; at least one call is timed.
        graph: replay a CUDA graph of the call.
        cold: overwrite the caches before each call, outside of the time.

    Raises:
        RuntimeError: the call cannot be captured into a graph.
    """
    if not device.startswith("cuda"):
        return _cpu(run, block, cold)
    return _events(capture(run)[0].replay if graph else run, block, cold)


def _cpu(run: Callable[[], object], block: float, cold: bool) -> Sample:
    from torch.utils.benchmark import Timer

    timer = Timer("run()", globals={"run": run}, num_threads=torch.get_num_threads())
    flush = torch.empty(CACHE if cold else 0, dtype=torch.uint8)

    def once() -> float:
        flush.fill_(1)
        start = time.perf_counter()
        run()
        return time.perf_counter() - start

    def sample() -> float:
        end = time.perf_counter() + block
        found = [once()]
        # the timer runs a call more to learn how many to group: long ones need no group
        if found[0] < block / 10 and not cold:
            return timer.blocked_autorange(min_run_time=block).median
        while time.perf_counter() < end:
            found.append(once())
        return float(np.median(found))

    return sample


def wall(run: Callable[[], object], block: float = BLOCK, *, cold: bool = False) -> Sample:
    """Seconds of one call on a GPU as a user sees them: from the call to the end of its work."""
    flush = torch.empty(CACHE if cold else 0, dtype=torch.uint8, device="cuda")

    def sample() -> float:
        found: list[float] = []
        end = time.perf_counter() + block
        while not found or time.perf_counter() < end:
            flush.zero_()
            torch.cuda.synchronize()
            start = time.perf_counter()
            run()
            torch.cuda.synchronize()
            found.append(time.perf_counter() - start)
        return float(np.median(found))

    return sample


def capture(run: Callable[[], Result], warm_ups: int = 3) -> tuple[torch.cuda.CUDAGraph, Result]:
    """A CUDA graph of a call, and what the call returned: tensors that each replay fills."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(warm_ups):
            run()
    torch.cuda.current_stream().wait_stream(side)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = run()
    return graph, result


def _events(run: Callable[[], object], block: float, cold: bool) -> Sample:
    start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    flush = torch.empty(CACHE if cold else 0, dtype=torch.uint8, device="cuda")

    def group(calls: int) -> float:
        if cold:
            flush.zero_()
        start.record()
        for _ in range(calls):
            run()
        stop.record()
        stop.synchronize()
        return start.elapsed_time(stop) / 1e3 / calls

    def sample() -> float:
        first = group(1)
        # one call after each flush: a second one would find the cache warm
        calls = 1 if cold else max(1, int(GROUP / max(first, 1e-7)) + 1)
        found: list[float] = []
        end = time.perf_counter() + block
        while not found or time.perf_counter() < end:
            found.append(group(calls))
        return float(np.median(found))

    return sample


@dataclass
class Blocks:
    """Blocks of first, second, second, first: the times of both, and the ratio of each block."""

    first: list[float] = field(default_factory=list)
    second: list[float] = field(default_factory=list)
    ratios: list[float] = field(default_factory=list)
    readings: list[tuple[Reading, Reading]] = field(default_factory=list)

    @property
    def kept(self) -> list[int]:
        """The blocks whose clock, the mean of before and after, is that of the run: at least one."""
        clocks = [
            (before.clock_mhz + after.clock_mhz) / 2
            for before, after in self.readings
            if before.clock_mhz is not None and after.clock_mhz is not None
        ]
        if not clocks or len(clocks) != len(self.ratios):
            return list(range(len(self.ratios)))
        # one that was read, not between two: it is kept itself
        usual = sorted(clocks)[len(clocks) // 2]
        return [index for index, clock in enumerate(clocks) if abs(clock / usual - 1) <= CLOCK_DRIFT]

    def range_of(self, quantity: str) -> tuple[float, float] | None:
        """Lowest and highest of a quantity of ``Reading`` over all blocks; None where nothing was read."""
        found = [getattr(reading, quantity) for pair in self.readings for reading in pair]
        found = [value for value in found if value is not None]
        return (min(found), max(found)) if found else None


def blocks_of(most: int, seconds: float, spent: float = SPENT, least: int = LEAST) -> int:
    """How many blocks to measure: at most ``most``, what fits into ``spent`` seconds, but ``least`` of them anyway.

    Args:
        most: where calls are short.
        seconds: of one block.
    """
    return max(min(most, least), min(most, int(spent / max(seconds, 1e-9))))


def alternate(
    first: Sample,
    second: Sample,
    blocks: int,
    sensors: Callable[[], Reading],
    spent: float = SPENT,
    least: int = LEAST,
) -> Blocks:
    """Take turns: first, second, second, first, so that a drift of the machine falls on both.

    Args:
        blocks: at most; ``blocks_of`` the time of the first one are measured, with ``spent`` and ``least``.
        sensors: asked before and after each block.
    """
    found = Blocks()
    while len(found.ratios) < blocks:
        start, reading = time.perf_counter(), sensors()
        before, one, two, after = first(), second(), second(), first()
        found.readings.append((reading, sensors()))
        found.first += [before, after]
        found.second += [one, two]
        found.ratios.append((before + after) / (one + two))
        if len(found.ratios) == 1:
            blocks = blocks_of(blocks, time.perf_counter() - start, spent, least)
    return found


def noise_of(blocks: Blocks) -> float:
    """How far the ratio of a contender against itself strays from 1."""
    return float(np.percentile(np.abs(np.array(blocks.ratios) - 1), 90))


def timing_of(blocks: Blocks, baseline: str, noise: float, *, method: str, cache: str = "warm") -> Timing:
    """The figures of the second contender; a gain that does not leave the noise is no difference."""
    kept = blocks.kept
    times = np.array([blocks.second[2 * index + half] for index in kept for half in (0, 1)]) * 1e3
    ratios = np.array([blocks.ratios[index] for index in kept])
    low, high = (float(np.percentile(ratios, part)) for part in (10, 90))
    median = float(np.median(times))
    return Timing(
        method=method,
        cache=cache,
        median_ms=median,
        p10_ms=float(np.percentile(times, 10)),
        p90_ms=float(np.percentile(times, 90)),
        mad_ms=float(np.median(np.abs(times - median))),
        baseline=baseline,
        ratio=float(np.median(ratios)),
        ratio_p10=low,
        ratio_p90=high,
        noise=noise,
        verdict="faster" if low > 1 + noise else "slower" if high < 1 - noise else "no difference",
        blocks=len(kept),
        dropped=len(blocks.ratios) - len(kept),
        clock_mhz=blocks.range_of("clock_mhz"),
        power_w=blocks.range_of("power_w"),
        temperature_c=blocks.range_of("temperature_c"),
    )
