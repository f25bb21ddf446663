"""``--window figures``: whole models beside compiled ones, training, then the kernels' own figures."""

from __future__ import annotations

import os
from collections.abc import Callable
from functools import partial
from typing import Any

from torch._inductor import config
from torch._inductor.async_compile import shutdown_compile_workers

from benchmarks.gpu import contest, eager, questions
from benchmarks.gpu.contest import case_of, name_of
from benchmarks.gpu.lane import FAILED, IMPORTS, Desk, Found, Task
from benchmarks.gpu.questions import Bench, Rows
from xclip_fast.bench.machine import ceilings, facts
from xclip_fast.bench.record import Case

OURS = ("hf-sdpa", "engine", "engine-float8")
# GEMMs by cuBLAS, everything else tuned: minutes less of compiling than with GEMMs in Triton
COMPILED = "hf-compile-max-cublas"
# a lane compiles one model: the compiler starts anew for the next
TRAINED = {"train": (("hf-sdpa", "layers"), COMPILED), "train layers": (("hf-sdpa",), "layers-compile")}
STRONGEST = "hf-compile-max-flash"
AS_USED = ("B/16 x8", "B/32 x1", "tiny x1")  # timed as a user sees it too, and from bytes
MACHINE, CEILINGS = "machine", "ceilings"
ASKED: tuple[tuple[Callable[..., Rows], str, int], ...] = (
    *((ask, variant, 8) for ask in (questions.fc1, questions.ifa) for variant in ("B/16", "L/14")),
    *((questions.patch, variant, 8) for variant in ("B/16", "B/32", "L/14")),
    *((ask, variant, 8) for ask in (questions.products, questions.norm) for variant in ("B/16", "L/14")),
    (questions.side, "B/16", 8),
    (questions.sdpa, "B/16", 8),
)


def tasks(lane: str, desk: Desk) -> dict[str, Task]:
    """The cases of a lane."""
    if lane == "kernels":
        return _kernel_tasks(desk)
    if lane == "eager":
        return eager.tasks(desk)
    kind, _, sizes = lane.rpartition(": ")
    variant, _, batch = sizes.partition(" x")
    used = sizes in AS_USED
    if kind == "max-autotune":
        return _strongest_tasks(desk, case_of(variant, int(batch)))
    if kind:
        return _training_tasks(desk, kind, case_of(variant, int(batch), direction="train"))
    methods = ("graph", "wall") if used else ("graph",)
    cases = [case_of(variant, int(batch), input) for input in (("normalised", "uint8") if used else ("normalised",))]
    found = {f"build {name_of(case)}": Task(90, partial(_build, desk, case, OURS)) for case in cases}
    found[f"compile {name_of(cases[0])}"] = Task(150, partial(_build, desk, cases[0], (COMPILED,)))
    found |= {name_of(case): Task(90, partial(contest.measure, desk, case, OURS, methods)) for case in cases}
    return found


def _strongest_tasks(desk: Desk, case: Case) -> dict[str, Task]:
    name = f"{name_of(case)} {STRONGEST}"
    return {
        f"build {name}": Task(90, partial(_build, desk, case, OURS)),
        # nobody measures before it has ended
        f"compile {name}": Task(180, partial(_compile_strongest, desk, case)),
        name: Task(90, partial(contest.measure, desk, case, OURS, ("graph", "wall"))),
    }


def _training_tasks(desk: Desk, kind: str, case: Case) -> dict[str, Task]:
    ours, compiled = TRAINED[kind]
    name = f"{name_of(case)} {compiled}"
    return {
        f"build {name}": Task(90, partial(_build, desk, case, ours)),
        f"compile {name}": Task(220, partial(_build, desk, case, (compiled,))),
        f"memory {name}": Task(60, partial(contest.memory, desk, case, ours)),
        name: Task(90, partial(contest.measure, desk, case, ours, ("graph", "wall"))),
    }


def _build(desk: Desk, case: Case, providers: tuple[str, ...]) -> Found:
    # nobody measures between what a lane builds and what it compiles: the lanes measure one after another, at the end
    desk.turns.stay()
    found = contest.build(desk, case, providers)
    if case.direction == "train":
        # the step that is timed asks for no gradient of the frames, as the check does: compilers compile it anew
        contest.warm(desk, case, providers)
    return found


def _compile_strongest(desk: Desk, case: Case) -> Found:
    """Every GEMM template tried; what other lanes tuned is not taken over."""
    workers = max(2, (os.cpu_count() or 1) // 2)
    os.environ |= {
        "TORCHINDUCTOR_CACHE_DIR": str(desk.folder / "strongest"),
        "TORCHINDUCTOR_COMPILE_THREADS": str(workers),
    }
    shutdown_compile_workers()
    config.compile_threads = workers
    return _build(desk, case, (STRONGEST,))


def _kernel_tasks(desk: Desk) -> dict[str, Task]:
    bench = Bench(dry=False, brief=not desk.judged)
    found = {MACHINE: Task(30, partial(_machine, desk)), CEILINGS: Task(60, partial(_ceilings, desk))}
    asked = [(ask, "tiny", 1) for ask in questions.QUESTIONS] if desk.tiny else ASKED
    for ask, variant, batch in asked:
        found[f"{ask.__name__} {variant} x{batch}"] = Task(60, partial(_ask, desk, bench, ask, variant, batch))
    return found


def _machine(desk: Desk) -> Found:
    return {"status": desk.verdict(True), MACHINE: facts("cuda") | {"commit": desk.commit}}


def _ceilings(desk: Desk) -> Found:
    # whole models are built first: who waits to be alone keeps others from beginning
    desk.wait_while(lambda name: name.startswith((IMPORTS, "build", "compile", "memory")))
    with desk.turns.alone():
        rates = desk.keep(CEILINGS, lambda: ceilings("cuda", ("bfloat16",), 0.2) if desk.judged else {})
    return {"status": desk.verdict(True), "rates": rates}


def _ask(desk: Desk, bench: Bench, ask: Callable[..., Rows], variant: str, batch: int) -> Found:
    with desk.turns.alone():
        of_copy = [desk.keep(CEILINGS, dict).get("copy_gbs")] if ask is questions.ifa else []
        rows: list[dict[str, Any]] = ask(bench, variant, batch, *of_copy)
    failed = [row for row in rows if row["status"] == "failed"]
    return {"status": FAILED if failed else desk.verdict(True), "rows": rows}
