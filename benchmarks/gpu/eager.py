"""Calls in eager mode as users make them: our layers by kernels and by plain modules, and Hugging Face's model.

Small batches wait for the host, and cost the least as plain modules; from which size on they do not is
``HOST_BOUND`` of ``xclip_fast.ops._backends``, which such rows decide.
"""

from __future__ import annotations

import gc
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any
from unittest.mock import patch

import torch

from benchmarks.gpu.contest import case_of
from benchmarks.gpu.lane import Desk, Found, Task
from xclip_fast import ops
from xclip_fast.bench.providers import PROVIDERS
from xclip_fast.bench.setting import inputs_of, prepared, setting_of, step
from xclip_fast.bench.timing import wall
from xclip_fast.ops import _backends

# variant, batches of forward passes, batches of training steps
PLAN = (("B/32", (8, 32, 64), (32, 64)), ("B/16", (1, 8, 16), (8, 16)), ("L/14", (4, 8), (4,)))
TINY = (("tiny", (1,), (1,)),)
HOW = {"kernels": "layers", "modules": "layers", "hf": "hf-sdpa"}
BLOCK = 0.15  # seconds of calls for each
LIMITS = ("HOST_BOUND", "HOST_BOUND_WITH_GRADIENT")


def tasks(desk: Desk) -> dict[str, Task]:
    """Models are built first, one variant after another, and measured when nobody builds any more."""
    plan = TINY if desk.tiny else PLAN
    found = {f"build eager {variant}": Task(60, partial(_build, desk, variant)) for variant, _, _ in plan}
    for variant, forward, train in plan:
        found[f"eager {variant}"] = Task(60, partial(_measure, desk, variant, forward, train))
    return found


def _build(desk: Desk, variant: str) -> Found:
    desk.turns.stay()
    with desk.turns.together():
        for provider in dict.fromkeys(HOW.values()):
            _built(desk, variant, provider)
    return {"status": desk.verdict(True)}


def _built(desk: Desk, variant: str, provider: str) -> Any:
    return desk.keep(f"{variant} {provider}", lambda: PROVIDERS[provider].build(setting_of(case_of(variant, 1))))


def _measure(desk: Desk, variant: str, forward: tuple[int, ...], train: tuple[int, ...]) -> Found:
    rows = []
    with desk.turns.alone():
        for direction, batches in (("forward", forward), ("train", train)):
            for batch in batches:
                case = case_of(variant, batch, direction=direction)
                inputs = inputs_of(setting_of(case))
                row: dict[str, Any] = {"variant": variant, "batch": batch, "direction": direction}
                for how, provider in HOW.items():
                    classify = prepared(_built(desk, variant, provider), case)
                    with _by(how):
                        run = step(classify, inputs, direction == "train")
                        run()
                        row[how] = round(wall(run, BLOCK if desk.judged else 0.001)() * 1e3, 3)
                    classify.zero_grad(set_to_none=True)
                rows.append(row)
                gc.collect()
                torch.cuda.empty_cache()
    return {"status": desk.verdict(True), "rows": rows}


def _by(how: str) -> AbstractContextManager[object]:
    if how == "kernels":
        return ops.backend("triton")
    return patch.multiple(_backends, **dict.fromkeys(LIMITS, 1 << 62)) if how == "modules" else nullcontext()
