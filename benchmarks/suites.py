"""The cases that are measured together: what ``python -m benchmarks run --suite`` knows."""

from __future__ import annotations

from xclip_fast.bench.cases import OPS
from xclip_fast.bench.operators import BACKENDS
from xclip_fast.bench.run import MODEL, Job, make_case

PROVIDERS = ("hf-sdpa", "reference", "layers", "optimized", "engine", "engine-int8")  # what runs without a GPU
OP_BACKENDS = tuple(name for name in BACKENDS if name != "compile")


def jobs(suite: str) -> list[Job]:
    """The cases of a suite; on two idle cores "cpu" takes half an hour with ``--full``, "ops" two minutes."""
    if suite == "tiny":
        return [_model("tiny", 2, "float32"), *_ops("tiny", 2, "float32")]
    if suite == "ops":
        return [Job(make_case(MODEL, "B/32", dtype="float32"), ("reference",)), *_ops("B/32", 1, "float32")]
    variant = "B/32" if suite == "cpu" else "B/16"
    found = [_model(variant, batch, dtype) for batch in (1, 4) for dtype in _DTYPES]
    return [*found, _model(variant, 1, "float32", direction="train"), *_ops(variant, 1, "float32")]


SUITES = ("cpu", "cpu-b16", "ops", "tiny")
_DTYPES = ("float32", "bfloat16")


def _model(variant: str, batch: int, dtype: str, direction: str = "forward") -> Job:
    names = PROVIDERS
    if direction == "train":
        names = tuple(name for name in names if not name.startswith("engine"))
    return Job(make_case(MODEL, variant, batch=batch, dtype=dtype, direction=direction), names)


def _ops(variant: str, batch: int, dtype: str) -> list[Job]:
    return [Job(make_case(name, variant, batch=batch, dtype=dtype), OP_BACKENDS) for name in OPS]
