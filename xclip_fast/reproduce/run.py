"""All runs of a recipe, two at a time, each kept in a file when it is done: a stopped reproduction goes on."""

from __future__ import annotations

import json
import multiprocessing
import os
import queue
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

from xclip_fast.errors import InputError
from xclip_fast.files import check_writable, read_json, replacing
from xclip_fast.reproduce.job import leaves_weights, run_job, single_threaded, weights_path
from xclip_fast.reproduce.models import config
from xclip_fast.reproduce.plan import FULL, SCRATCH, Job, Recipe, stages
from xclip_fast.reproduce.results import FORMAT, summarise

PROCESSES = 2
RESULTS, PAGE = "reproduction.json", "reproduction.html"
_EVERY_STEPS = 10  # steps between two words of a run

Progress = Callable[[str, int, int], None]


def reproduce(out: Path, recipe: Recipe = FULL, progress: Progress | None = None) -> dict[str, Any]:
    """Run the paper in miniature and write what was found, as JSON and as a page.

    Each run of the recipe is kept in ``out/runs`` when it is done, and not run again: a reproduction that was stopped
    goes on where it was. The seeds are fixed, so on one machine with one version of PyTorch the figures are too.

    Args:
        out: folder for the runs, ``reproduction.json`` and ``reproduction.html``; made where it is missing.
        recipe: how much is run.
        progress: called with what is being done, the steps done, and the steps in all.

    Returns:
        what ``reproduction.json`` holds.

    Raises:
        InputError: the folder can't be written or holds runs of another recipe, or matplotlib or jinja2 is missing.
    """
    from xclip_fast.bench.machine import facts
    from xclip_fast.reproduce.page import check_page, write_page

    check_page()
    folder = _folder(out)
    machine = {**facts("cpu"), "threads": 1, "processes": PROCESSES}
    runs = _run_all(folder, recipe, progress or (lambda stage, done, total: None))
    found = {
        "format": FORMAT,
        "facts": machine,
        "recipe": recipe.to_dict(),
        "model": config().to_dict(),
        "runs": runs,
        "summary": summarise(runs).to_dict(),
    }
    # a round trip: what is returned is what the file holds, keys included
    text = json.dumps(found, indent=1, allow_nan=False)
    with replacing(out / RESULTS) as temporary:
        temporary.write_text(text + "\n", encoding="utf-8")
    write_page(json.loads(text), out / PAGE)
    return json.loads(text)


def _folder(out: Path) -> Path:
    folder = out / "runs"
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"cannot make the folder {str(folder)!r}: {error.strerror}: choose another one") from error
    for path in (out / RESULTS, out / PAGE):
        check_writable(path)
    return folder


def _run_all(folder: Path, recipe: Recipe, progress: Progress) -> list[dict[str, Any]]:
    parts = stages(recipe)
    everything = [job for part in parts for job in part]
    # all files are read before any work starts
    kept = {job: _kept(folder, job, recipe) for job in everything}
    for number, part in enumerate(parts):
        if any(kept[job] is None and leaves_weights(job) for job in part):
            # later stages start from weights that will be made anew
            kept |= {job: None for later in parts[number + 1 :] for job in later if job.start != SCRATCH}
    total = sum(job.steps for job in everything)
    steps = {job.name: job.steps if kept[job] else 0 for job in everything}
    missing = [job for job in everything if kept[job] is None]

    def said(name: str, done: int) -> None:
        steps[name] = done
        progress(name, sum(steps.values()), total)

    if missing:
        with _workers(min(PROCESSES, len(missing))) as (pool, words):
            for part in parts:
                todo = [job for job in part if kept[job] is None]
                for job, figures in _done(pool, words, folder, recipe, todo, said):
                    kept[job] = figures
    return [run for job in everything if (run := kept[job]) is not None]


def _kept(folder: Path, job: Job, recipe: Recipe) -> dict[str, Any] | None:
    path = folder / f"{job.name}.json"
    if not path.exists() or (leaves_weights(job) and not weights_path(job, folder).is_file()):
        return None
    found = read_json(path)
    if found.get("job") != asdict(job) or found.get("tested") != recipe.tested:
        raise InputError(f"{str(path)!r} is a run of another recipe: choose another folder, or remove that one")
    return found


def _done(
    pool: ProcessPoolExecutor,
    words: Any,
    folder: Path,
    recipe: Recipe,
    todo: Sequence[Job],
    said: Callable[[str, int], None],
) -> Iterator[tuple[Job, dict[str, Any]]]:
    """Run jobs and keep each in its file; yields each when it is done."""
    waiting: dict[Future[dict[str, Any]], Job] = {
        pool.submit(_in_worker, job, folder, recipe.tested): job for job in todo
    }
    try:
        while waiting:
            ended, _ = wait(waiting, timeout=0.2, return_when=FIRST_COMPLETED)
            _listen(words, said)
            for future in ended:
                job = waiting.pop(future)
                figures = {"job": asdict(job), "tested": recipe.tested, **future.result()}
                with replacing(folder / f"{job.name}.json") as temporary:
                    temporary.write_text(json.dumps(figures, indent=1, allow_nan=False) + "\n", encoding="utf-8")
                said(job.name, job.steps)
                yield job, figures
    except BrokenProcessPool as error:
        raise InputError(
            "a process of the reproduction was killed, for lack of memory perhaps: start again, what is done is kept"
        ) from error


def _listen(words: Any, said: Callable[[str, int], None]) -> None:
    while True:
        try:
            said(*words.get_nowait())
        except queue.Empty:
            return


@contextmanager
def _workers(count: int) -> Iterator[tuple[ProcessPoolExecutor, Any]]:
    # a process of its own start: a fork of one in which PyTorch has threads may hang
    context = multiprocessing.get_context("spawn")
    words = context.Queue()
    pool = ProcessPoolExecutor(count, mp_context=context, initializer=_begin, initargs=(words,))
    try:
        yield pool, words
    except BaseException:
        # runs under way are not kept, so there is nothing to wait for
        for process in list((pool._processes or {}).values()):
            process.terminate()
        raise
    finally:
        pool.shutdown(cancel_futures=True)
        words.close()


_words: Any = None


def _begin(words: Any) -> None:
    global _words
    _words = words
    single_threaded()
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    """Without its parent a process would work for nobody, and then wait for ever."""
    if parent := multiprocessing.parent_process():
        parent.join()
        os._exit(1)


def _in_worker(job: Job, folder: Path, tested: int) -> dict[str, Any]:
    def progress(step: int) -> None:
        if step % _EVERY_STEPS == 0:
            _words.put((job.name, step))

    start = time.perf_counter()
    figures = run_job(job, folder, tested, progress)
    return {**figures, "seconds": round(time.perf_counter() - start, 1)}
