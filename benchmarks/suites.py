"""The cases that are measured together: what ``python -m benchmarks run --suite`` knows."""

from __future__ import annotations

from xclip_fast.bench.cases import OPS
from xclip_fast.bench.operators import BACKENDS
from xclip_fast.bench.run import MODEL, Job, make_case
from xclip_fast.errors import InputError

SUITES = ("cpu", "ops", "tiny")
OP_BACKENDS = tuple(name for name in BACKENDS if name != "compile")

_FLOAT32 = ("hf-sdpa", "layers", "engine")
_BFLOAT16 = (*_FLOAT32, "engine-int8")
_ALL = ("hf-sdpa", "reference", "layers", "optimized", "engine")  # of one case, the smallest
_TRAINED = ("hf-sdpa", "layers")


def jobs(suite: str, input: str | None = None) -> list[Job]:
    """The cases of a suite; on two idle cores "cpu" takes half an hour with ``--full``.

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
    forward = []
    for variant in ("B/32", "B/16"):
        for batch in (1, 4):
            wide = _ALL if (variant, batch) == ("B/32", 1) else _FLOAT32
            forward += [
                _model(variant, batch, "float32", wide, input),
                _model(variant, batch, "bfloat16", _BFLOAT16, input),
            ]
    return [*forward, _training("B/32", 1)]


def _model(variant: str, batch: int, dtype: str, providers: tuple[str, ...], input: str | None = None) -> Job:
    return Job(make_case(MODEL, variant, batch=batch, dtype=dtype, input=input), providers)


def _training(variant: str, batch: int) -> Job:
    return Job(make_case(MODEL, variant, batch=batch, direction="train"), _TRAINED)


def _ops(variant: str, batch: int) -> list[Job]:
    return [Job(make_case(name, variant, batch=batch), OP_BACKENDS) for name in OPS]
