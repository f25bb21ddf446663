"""A whole run: ceilings of the machine, then every model and op asked for, row by row."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from xclip_fast.bench.machine import ceilings, facts
from xclip_fast.bench.memory import memory_refusal
from xclip_fast.bench.models import Effort, measure_model
from xclip_fast.bench.operators import BACKENDS, measure_op
from xclip_fast.bench.providers import check_names
from xclip_fast.bench.record import FAILED, Case, Row, Run
from xclip_fast.bench.setting import INPUTS
from xclip_fast.devices import find_device
from xclip_fast.errors import InputError
from xclip_fast.ops.cases import OPS, config_of

MODEL = "model"
DTYPES = ("float32", "bfloat16", "float16")
DIRECTIONS = ("forward", "train")
CACHES = ("warm", "cold")

QUICK = Effort(blocks=3, block=0.05, memory=False)
FULL = Effort(blocks=10, block=0.5, memory=True)


@dataclass(frozen=True)
class Job:
    """One case and who computes it."""

    case: Case
    providers: tuple[str, ...]


def make_case(
    name: str,
    variant: str,
    frames: int | None = None,
    batch: int = 1,
    dtype: str = "float32",
    direction: str = "forward",
    device: str = "cpu",
    classes: int = 5,
    input: str | None = None,
) -> Case:
    """A case whose parts are known and can be computed here.

    Args:
        name: "model", or an op.
        variant, frames: as in ``cases.config_of``.
        input: what a model is given, of ``INPUTS``, normalised without; an op has its own.

    Raises:
        InputError: a part is unknown or does not go with another, or the device is not there.
    """
    if name != MODEL and name not in OPS:
        raise InputError(f"unknown case {name!r}: choose one of {MODEL}, {', '.join(OPS)}")
    if dtype not in DTYPES:
        raise InputError(f"unknown dtype {dtype!r}: choose one of {', '.join(DTYPES)}")
    if direction not in DIRECTIONS:
        raise InputError(f"unknown mode {direction!r}: choose one of {', '.join(DIRECTIONS)}")
    if input is not None and input not in INPUTS:
        raise InputError(f"unknown input {input!r}: choose one of {', '.join(INPUTS)}")
    if input is not None and name != MODEL:
        raise InputError(f"an input was asked for, and {name} has its own: ask for a model or for no input")
    if input == "uint8" and direction == "train":
        raise InputError("training from uint8 frames was asked for: bytes have no gradient to check, use normalised")
    config = config_of(variant, frames)
    kind = (input or INPUTS[0]) if name == MODEL else "uint8" if name == "patch_embed" else "activations"
    return Case(name, variant, config.frames, batch, classes, dtype, direction, kind, str(find_device(device)))


def effort_of(full: bool, cache: str) -> Effort:
    """Long blocks and peak memory, or short blocks, with warm or cold caches.

    Raises:
        InputError: there is no such cache.
    """
    if cache not in CACHES:
        raise InputError(f"unknown cache {cache!r}: choose one of {', '.join(CACHES)}")
    return replace(FULL if full else QUICK, cold=cache == "cold")


def run(
    jobs: Sequence[Job],
    effort: Effort,
    show: Callable[[Row], None],
    path: Path | None = None,
    before: Run | None = None,
) -> Run:
    """Measure all jobs on their one device.

    A job that cannot run at all, for want of memory say, is a row with the reason, and the next one follows. The fact
    "seconds" says how long it all took.

    Args:
        jobs: what to measure.
        effort: how long.
        show: is given each row as soon as it is known.
        path: the results so far are written there after each row, so that a run that is cut off leaves them.
        before: an earlier part of the same run; its rows come first, but for those that are measured again.

    Raises:
        InputError: a provider or backend is unknown, no job fits into the memory, or the earlier part is of another
            machine or version; nothing is measured then.
    """
    for job in jobs:
        _check_providers(job)
    refusals = [reason for job in jobs if (reason := memory_refusal(job.case))]
    if len(refusals) == len(jobs):
        raise InputError(refusals[0])
    device = jobs[0].case.device
    dtypes = tuple(dict.fromkeys(job.case.dtype for job in jobs))
    origin = facts(device)
    start = time.monotonic()
    if before is not None:
        _check_part(before.facts, origin)
        start -= before.facts["seconds"]
    rates = ceilings(device, dtypes, seconds=min(0.5, 3 * effort.block))
    found = Run(origin, rates)
    if before is not None:
        again = {(job.case, name) for job in jobs for name in job.providers}
        found = Run(origin, before.ceilings | rates)
        found.rows += [row for row in before.rows if (row.case, row.provider) not in again]
    whole: dict[Case, float] = {}
    for job in jobs:
        for row in _measured(job, effort, rates, whole):
            found.rows.append(row)
            found.facts["seconds"] = round(time.monotonic() - start, 1)
            if path is not None:
                found.save(path)
            show(row)
    return found


def _check_part(before: dict[str, Any], now: dict[str, Any]) -> None:
    named = (before.keys() | now.keys()) - {"utc", "seconds"}
    for name in sorted(named):
        if before.get(name) != now.get(name):
            raise InputError(f"these are no parts of one run: {name} was {before.get(name)}, and is {now.get(name)}")


def _measured(job: Job, effort: Effort, rates: dict[str, float], whole: dict[Case, float]) -> Iterator[Row]:
    """The rows of one job, or the reason why it has none."""
    try:
        yield from _measure(job, effort, rates, whole)
    except InputError as error:
        yield from (Row(job.case, provider, FAILED, str(error)) for provider in job.providers)


def _check_providers(job: Job) -> None:
    if job.case.name == MODEL:
        check_names(list(job.providers))
        return
    for name in job.providers:
        if name not in BACKENDS:
            raise InputError(f"unknown provider {name!r} of an op: choose one of {', '.join(BACKENDS)}")


def _measure(job: Job, effort: Effort, rates: dict[str, float], whole: dict[Case, float]) -> Iterator[Row]:
    """The rows of one job; ``whole`` remembers what the definition takes for a whole model."""
    if job.case.name != MODEL:
        model = replace(job.case, name=MODEL, input="normalised")
        return measure_op(job.case, job.providers, effort, rates, model_ms=whole.get(model))
    rows = measure_model(job.case, job.providers, effort, rates)
    return _remembered(rows, whole)


def _remembered(rows: Iterator[Row], whole: dict[Case, float]) -> Iterator[Row]:
    for row in rows:
        if row.provider == "reference" and row.timing is not None:
            whole[row.case] = row.timing.median_ms
        yield row
