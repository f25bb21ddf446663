"""A whole reproduction of a few steps: what is done is kept, what is missing is run, what is wrong is refused."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from xclip_fast.errors import InputError
from xclip_fast.reproduce import QUICK, reproduce, world
from xclip_fast.reproduce.job import batches, held_out, training_classes
from xclip_fast.reproduce.plan import FEW_SHOT, LADDER, ZERO_SHOT, Job, jobs
from xclip_fast.reproduce.run import PAGE, RESULTS

NEW = sum(one.unseen for one in world.CLASSES)
TINY = replace(QUICK, pretraining_steps=2, steps=2, few_shot_steps=2, shots=(2,), tested=24)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("reproduction")
    reproduce(out, TINY)
    return out


def stamps(out: Path) -> dict[str, int]:
    return {path.name: path.stat().st_mtime_ns for path in (out / "runs").iterdir()}


@pytest.mark.slow
def test_it_leaves_results_and_a_page(finished: Path) -> None:
    found = json.loads((finished / RESULTS).read_text(encoding="utf-8"))
    assert [run["job"]["kind"] for run in found["runs"]].count(LADDER) == 5
    assert len(found["runs"]) == len(jobs(TINY))
    assert found["recipe"]["steps"] == 2
    assert found["facts"]["torch"]
    assert all(0 <= run["top1"] <= 1 for run in found["runs"])
    assert str(finished) not in json.dumps(found)
    assert "The paper in miniature" in (finished / PAGE).read_text(encoding="utf-8")
    assert {path.suffix for path in (finished / "runs").iterdir()} == {".json", ".safetensors"}


@pytest.mark.slow
def test_only_what_is_missing_is_run_again_and_gives_the_same_figures(finished: Path) -> None:
    gone = finished / "runs" / "ladder-cfa-0.json"
    before, was = stamps(finished), json.loads(gone.read_text(encoding="utf-8"))
    gone.unlink()
    said: list[tuple[str, int, int]] = []
    reproduce(finished, TINY, lambda *words: said.append(words))
    after, now = stamps(finished), json.loads(gone.read_text(encoding="utf-8"))
    assert [name for name in before if before[name] != after[name]] == [gone.name]
    assert all(now[name] == was[name] for name in ("job", "top1", "words"))
    total = sum(job.steps for job in jobs(TINY))
    assert said[-1] == ("ladder-cfa-0", total, total)


@pytest.mark.slow
def test_runs_of_another_recipe_are_refused_before_any_work(finished: Path) -> None:
    before = stamps(finished)
    with pytest.raises(InputError, match="another recipe"):
        reproduce(finished, replace(TINY, steps=3))
    assert stamps(finished) == before


@pytest.mark.slow
def test_a_broken_run_is_named(finished: Path) -> None:
    path = finished / "runs" / "ladder-mean-0.json"
    whole = path.read_bytes()
    path.write_bytes(whole[:20])
    try:
        with pytest.raises(InputError, match=r"ladder-mean-0\.json"):
            reproduce(finished, TINY)
    finally:
        path.write_bytes(whole)


def test_a_folder_that_cannot_be_made_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="cannot make the folder"):
        reproduce(tmp_path / "file", TINY)
    (tmp_path / "out" / RESULTS).mkdir(parents=True)
    with pytest.raises(InputError, match="not a file"):
        reproduce(tmp_path / "out", TINY)


def _start(out: str) -> None:
    reproduce(Path(out), replace(TINY, steps=30))


@pytest.mark.slow
def test_a_killed_reproduction_goes_on(tmp_path: Path) -> None:
    process = multiprocessing.get_context("spawn").Process(target=_start, args=(str(tmp_path),))
    process.start()
    deadline = time.monotonic() + 300
    while len(list(tmp_path.glob("runs/ladder-*.json"))) < 2:
        assert process.is_alive()
        assert time.monotonic() < deadline
        time.sleep(0.05)
    assert process.pid is not None
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    kept = stamps(tmp_path)
    assert not (tmp_path / RESULTS).exists()
    found = reproduce(tmp_path, replace(TINY, steps=30))
    assert len(found["runs"]) == len(jobs(TINY))
    after = stamps(tmp_path)
    assert all(after[name] == kept[name] for name in kept if name.endswith(".json"))


def test_few_shots_are_nested_and_always_the_same() -> None:
    def shown(shots: int, seed: int = 0) -> set[bytes]:
        draw = batches(Job(FEW_SHOT, "full", seed, 10, shots=shots))
        return {clip.tobytes() for step in range(40) for clip in draw(step)[0]}

    two, four = shown(2), shown(4)
    assert len(two) == 2 * NEW
    assert len(four) == 4 * NEW
    assert two < four
    assert not two & shown(2, seed=1)


def test_every_clip_of_a_long_run_is_new_and_unseen_classes_stay_out() -> None:
    job = Job(ZERO_SHOT, "full", 0, 10)
    assert not any(world.CLASSES[one].unseen for one in training_classes(job))
    assert len(training_classes(job)) == len(world.CLASSES) - NEW
    draw = batches(job)
    (first, labels), (second, _) = draw(0), draw(1)
    assert set(labels.tolist()) <= set(range(len(world.CLASSES) - NEW))
    assert len({clip.tobytes() for clip in [*first, *second]}) == 2 * len(labels)


def test_models_of_one_seed_see_the_same_clips() -> None:
    one, other = (batches(Job(LADDER, model, 3, 10))(0) for model in ("mean", "full"))
    assert np.array_equal(one[0], other[0])
    assert np.array_equal(one[1], other[1])


def test_clips_to_test_on_are_of_all_classes_and_no_training_clip() -> None:
    clips, labels = held_out(48)
    assert (np.bincount(labels) == 2).all()
    assert np.array_equal(clips, held_out(48)[0])
    assert not np.array_equal(clips, held_out(48, world.VALIDATION)[0])
