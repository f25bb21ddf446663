"""Which videos each step takes, by arithmetic alone: the same for any number of processes, and from any step on."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from xclip_fast.data import Draw
from xclip_fast.errors import InputError

_STREAM = 1


@dataclass(frozen=True)
class Plan:
    """The order of the videos over all epochs, and how a batch is shared.

    A batch is cut into shares of one size, the first for the first process, and so on through the processes and then
    through the rounds of accumulation. The last batch of an epoch holds what is left, so that no video is lost; its
    last shares may be short or empty.

    Attributes:
        videos: in the data set.
        batch: videos in a step, over all processes and rounds.
        epochs, seed: of the run; a seed and an epoch make the order.
        processes: that train together.
        rounds: shares that a process takes in a step, one after the other: gradient accumulation.

    Example:
        >>> from xclip_fast.train.plan import Plan
        >>> plan = Plan(videos=10, batch=4, epochs=2, seed=0, processes=2, rounds=1)
        >>> plan.steps, [len(share) for share in plan.shares(step=2, process=0)]
        (6, [2])
    """

    videos: int
    batch: int
    epochs: int
    seed: int
    processes: int = 1
    rounds: int = 1

    def __post_init__(self) -> None:
        if self.batch % (self.processes * self.rounds):
            raise InputError(
                f"batch_size {self.batch} was asked for on {self.processes} processes in {self.rounds} rounds of "
                f"accumulation: make it a multiple of {self.processes * self.rounds}"
            )

    @property
    def steps_per_epoch(self) -> int:
        """Steps in an epoch, the last one on what is left."""
        return -(-self.videos // self.batch)

    @property
    def steps(self) -> int:
        """Steps in the run."""
        return self.epochs * self.steps_per_epoch

    def size(self, step: int) -> int:
        """Videos in a step, over all processes and rounds."""
        first = step % self.steps_per_epoch * self.batch
        return min(self.batch, self.videos - first)

    def shares(self, step: int, process: int) -> list[list[Draw]]:
        """What a process takes in a step, a list for each round; all processes have the same number of rounds."""
        epoch, number = divmod(step, self.steps_per_epoch)
        order = _order(self.videos, self.seed, epoch)
        places = range(number * self.batch, number * self.batch + self.size(step))
        share = self.batch // (self.processes * self.rounds)
        rounds = -(-len(places) // (share * self.processes))
        return [
            [Draw(epoch, place, int(order[place])) for place in places[first : first + share]]
            for first in range(process * share, rounds * share * self.processes, share * self.processes)
        ]

    def groups(self, first_step: int, process: int) -> Iterator[list[Draw]]:
        """The shares of a process from a step to the end of the run."""
        for step in range(first_step, self.steps):
            yield from self.shares(step, process)


@lru_cache(maxsize=2)
def _order(videos: int, seed: int, epoch: int) -> NDArray[np.int64]:
    return np.random.default_rng([_STREAM, seed, epoch]).permutation(videos)
