"""The cases that are measured together: what ``python -m benchmarks run --suite`` knows."""

from __future__ import annotations

from dataclasses import replace

from xclip_fast.bench.models import Effort
from xclip_fast.bench.operators import BACKENDS
from xclip_fast.bench.run import MODEL, Job, effort_of, make_case
from xclip_fast.errors import InputError
from xclip_fast.ops.cases import OPS

SUITES = ("cpu", "ops", "rivals", "tiny")
OP_BACKENDS = tuple(name for name in BACKENDS if name != "compile")

_FLOAT32 = ("hf-sdpa", "layers", "engine")
_BFLOAT16 = (*_FLOAT32, "engine-int8")
_ALL = ("hf-sdpa", "reference", "layers", "optimized", "engine")  # of one case, the smallest
_TRAINED = ("hf-sdpa", "layers")
_RIVALS = {
    "float32": ("hf-sdpa", "layers", "optimized", "engine", "onnxruntime", "openvino"),
    "bfloat16": ("hf-sdpa", "layers", "engine", "engine-int8", "openvino-bf16", "openvino-int8", "onnxruntime-int8"),
}


def jobs(suite: str, input: str | None = None) -> list[Job]:
    """The cases of a suite; on two idle cores "cpu" takes half an hour with ``--full``, "rivals" longer.

    Args:
        suite: of ``SUITES``.
        input: what the models are given that are measured for their own sake, in their forward passes.

    Raises:
        InputError: there is no such suite or input.
    """
    if suite not in SUITES:
        raise InputError(f"unknown suite {suite!r}: choose one of {', '.join(SUITES)}")
    if suite == "ops":
        # the definition's time, for the share of each op
        return [_model("B/32", 1, "float32", ("reference",)), *_ops("B/32", 1)]
    if suite == "tiny":
        forward = [_model("tiny", 2, "float32", _ALL, input), _model("tiny", 2, "bfloat16", _BFLOAT16, input)]
        return [*forward, _training("tiny", 2), *_ops("tiny", 2)]
    shapes = [(variant, batch) for variant in ("B/32", "B/16") for batch in (1, 4)]
    if suite == "rivals":
        forward = [
            _model(variant, batch, dtype, providers, input)
            for variant, batch in shapes
            for dtype, providers in _RIVALS.items()
        ]
        # it tunes GEMMs for minutes, so at one shape
        smallest = forward[0]
        forward[0] = replace(smallest, providers=(*smallest.providers, "torch-compile-max"))
        return [*forward, _training("B/32", 1)]
    forward = []
    for variant, batch in shapes:
        wide = _ALL if (variant, batch) == ("B/32", 1) else _FLOAT32
        forward += [
            _model(variant, batch, "float32", wide, input),
            _model(variant, batch, "bfloat16", _BFLOAT16, input),
        ]
    return [*forward, _training("B/32", 1)]


def effort(suite: str | None, full: bool, cache: str) -> Effort:
    """How long to measure a suite, or one case: many rivals have fewer blocks each, two of them where calls are long.

    Raises:
        InputError: there is no such cache.
    """
    found = effort_of(full, cache)
    return replace(found, spent=8.0, least=2) if suite == "rivals" else found


def _model(variant: str, batch: int, dtype: str, providers: tuple[str, ...], input: str | None = None) -> Job:
    return Job(make_case(MODEL, variant, batch=batch, dtype=dtype, input=input), providers)


def _training(variant: str, batch: int) -> Job:
    return Job(make_case(MODEL, variant, batch=batch, direction="train"), _TRAINED)


def _ops(variant: str, batch: int) -> list[Job]:
    return [Job(make_case(name, variant, batch=batch), OP_BACKENDS) for name in OPS]
