"""The plan: every video once an epoch, the same batches for any number of processes, from any step on."""

from __future__ import annotations

import pytest

from xclip_fast import InputError
from xclip_fast.train.plan import Plan


def flat(plan: Plan, step: int) -> list[tuple[int, int]]:
    """(place, index) of a step in the order of rounds and processes."""
    shares = [plan.shares(step, process) for process in range(plan.processes)]
    assert len({len(rounds) for rounds in shares}) == 1
    return [(draw.place, draw.index) for rounds in zip(*shares, strict=True) for share in rounds for draw in share]


@pytest.mark.parametrize("videos", [1, 7, 8, 9, 23, 24])
@pytest.mark.parametrize(("processes", "rounds"), [(1, 1), (2, 1), (1, 4), (2, 2), (4, 2)])
def test_every_video_once_an_epoch_whoever_computes(videos: int, processes: int, rounds: int) -> None:
    plan = Plan(videos, batch=8, epochs=3, seed=1, processes=processes, rounds=rounds)
    alone = Plan(videos, batch=8, epochs=3, seed=1)
    assert plan.steps == 3 * -(-videos // 8)
    for epoch in range(3):
        seen = []
        for number in range(plan.steps_per_epoch):
            step = epoch * plan.steps_per_epoch + number
            found = flat(plan, step)
            assert found == flat(alone, step)
            assert len(found) == plan.size(step)
            assert {draw.epoch for share in plan.shares(step, 0) for draw in share} <= {epoch}
            seen += [index for _, index in found]
        assert sorted(seen) == list(range(videos))


def test_orders_differ_by_epoch_and_seed() -> None:
    orders = {
        tuple(index for step in range(4) for _, index in flat(Plan(32, 8, 2, seed), 4 * epoch + step))
        for seed in (0, 1)
        for epoch in (0, 1)
    }
    assert len(orders) == 4


def test_groups_go_on_from_any_step() -> None:
    plan = Plan(10, batch=4, epochs=2, seed=0, processes=2)
    everything = list(plan.groups(0, 1))
    for step in range(plan.steps + 1):
        before = sum(len(plan.shares(done, 1)) for done in range(step))
        assert list(plan.groups(step, 1)) == everything[before:]


def test_batches_that_cannot_be_shared_are_refused() -> None:
    with pytest.raises(InputError, match=r"batch_size 6 was asked for on 2 processes in 2 rounds.*multiple of 4"):
        Plan(10, batch=6, epochs=1, seed=0, processes=2, rounds=2)
