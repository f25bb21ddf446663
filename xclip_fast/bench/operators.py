"""One op measured at the shape a model gives it: each backend checked against float64, then timed."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from xclip_fast.bench.machine import Sensors
from xclip_fast.bench.models import Effort, beyond
from xclip_fast.bench.parity import compare, floating, run_op, same_bits
from xclip_fast.bench.record import FAILED, TIMED, UNAVAILABLE, WRONG, Amdahl, Case, Check, Roof, Row, finite
from xclip_fast.bench.timing import alternate, noise_of, sampler, timing_of
from xclip_fast.errors import InputError
from xclip_fast.numerics import exact_float32
from xclip_fast.ops import explain
from xclip_fast.ops.cases import OPS, Load, config_of, find_op
from xclip_fast.ops.inputs import Draw, Inputs

_log = logging.getLogger("xclip_fast")

BASELINE = "reference"
BACKENDS = (BASELINE, "torch", "triton", "extension", "compile")


def inputs_of(case: Case, device: str | None = None) -> Inputs:
    """The arguments that the model of a case gives the op."""
    load = Load(config_of(case.variant, case.frames), case.batch, case.classes)
    return OPS[case.name].arguments(Draw(getattr(torch, case.dtype), device or case.device), load)


def measure_op(
    case: Case,
    backends: Sequence[str],
    effort: Effort,
    ceilings: dict[str, float],
    *,
    model_ms: float | None = None,
) -> Iterator[Row]:
    """A row for each backend of an op; float32 is float32, without TF32, as in ``models.measure_model``.

    Args:
        case: ``name`` is that of the op.
        backends: of ``BACKENDS``; "compile" is torch.compile of the definition.
        effort: how long to measure; the peak memory of an op is not.
        ceilings: of this machine and run.
        model_ms: what the whole model takes by the definition here, for the op's share of it.

    Raises:
        InputError: an unknown op or backend.
    """
    for name in backends:
        if name not in BACKENDS:
            raise InputError(f"unknown provider {name!r} of an op: choose one of {', '.join(BACKENDS)}")
    try:
        op = find_op(case.name)
    except ImportError as error:
        yield from (Row(case, name, UNAVAILABLE, str(error)) for name in backends)
        return
    if case.direction == "train" and not OPS[case.name].trained:
        yield from (Row(case, name, UNAVAILABLE, "it is for inference: no backward pass") for name in backends)
        return
    with exact_float32():
        yield from _measured(case, op, backends, effort, ceilings, model_ms)


def _measured(
    case: Case,
    op: Callable[..., object],
    backends: Sequence[str],
    effort: Effort,
    ceilings: dict[str, float],
    model_ms: float | None,
) -> Iterator[Row]:
    arguments = inputs_of(case)
    train = case.direction == "train"
    sensors = Sensors(case.device)
    options = {"graph": case.device != "cpu" and not train, "cold": effort.cold}
    base = sampler(_step(op, arguments, BASELINE, train), case.device, effort.block, **options)
    base()
    itself = alternate(base, base, effort.blocks, sensors)
    noise = noise_of(itself)
    method = "wall" if case.device == "cpu" else "events" if train else "graph"
    for name in backends:
        try:
            if reason := _refusal(case, name, arguments):
                yield Row(case, name, UNAVAILABLE, reason)
                continue
            check = _gate(case, op, arguments, name)
            if not check.passed:
                yield Row(case, name, WRONG, beyond(check), check)
                continue
            blocks = itself
            if name != BASELINE:
                other = sampler(_step(op, arguments, name, train), case.device, effort.block, **options)
                other()
                blocks = alternate(base, other, effort.blocks, sensors)
            timing = timing_of(blocks, BASELINE, noise, method=method, cache=effort.cache)
            roof = _roof(case, arguments, timing.median_ms, ceilings)
            yield Row(
                case, name, TIMED, None, check, timing, roof, _amdahl(case, timing.median_ms, timing.ratio, model_ms)
            )
        except Exception as error:
            # the other backends still have their turn
            _log.debug("%s %s failed", case.name, name, exc_info=True)
            yield Row(case, name, FAILED, f"{type(error).__name__}: {error}"[:300])


def timed_call(case: Case, name: str) -> Callable[[], object]:
    """One call of an op on a backend, as it is timed: random arguments of the case's shape, made before."""
    return _step(find_op(case.name), inputs_of(case), name, case.direction == "train")


def _refusal(case: Case, name: str, arguments: Inputs) -> str | None:
    if name in (BASELINE, "torch", "compile"):
        return None
    if name == "triton" and case.device == "cpu":
        return "the interpreter is no measure of a kernel"
    return explain(case.name, **arguments).get(name, "it does not serve this op")


def _step(op: Callable[..., object], arguments: Inputs, name: str, train: bool) -> Callable[[], object]:
    if name == "compile":
        torch.compiler.reset()
        call = torch.compile(lambda **inputs: op(**inputs, backend=BASELINE))
    else:

        def call(**inputs: object) -> object:
            return op(**inputs, backend=name)

    if not train:

        def forward() -> object:
            with torch.inference_mode():
                return call(**arguments)

        return forward
    leaves = {key: arguments[key].detach().requires_grad_() for key in floating(arguments)}
    inputs = arguments | leaves

    def train_step() -> object:
        result = call(**inputs)
        outputs = [result] if isinstance(result, Tensor) else [out for out in result if out.requires_grad]  # type: ignore[attr-defined]
        return torch.autograd.grad(outputs, list(leaves.values()), [torch.ones_like(out) for out in outputs])

    return train_step


def _gate(case: Case, op: Callable[..., object], arguments: Inputs, name: str) -> Check:
    def call(backend: str, **inputs: object) -> object:
        if backend == "compile":
            return torch.compile(lambda **given: op(**given, backend=BASELINE))(**inputs)
        return op(**inputs, backend=backend)

    ceiling = OPS[case.name].ceiling(getattr(torch, case.dtype))
    train = case.direction == "train"
    rows = list(compare(call, arguments, name, gradients=train, ceiling=ceiling))
    repeats = same_bits(*(run_op(call, arguments, floating(arguments), name, train) for _ in range(2)))
    # the kernels are held to torch's own error, other orders of torch's operators to what the dtype may err
    allowed = {row.name: row.allowance if name in ("triton", "extension") else ceiling for row in rows}
    if name == BASELINE:
        allowed = {row.name: max(ceiling, row.torch_error) for row in rows}
    worst = max(rows, key=lambda row: row.error / allowed[row.name] if row.error == row.error else float("inf"))
    passed = all(row.error <= allowed[row.name] for row in rows)
    return Check(
        "the definition in float64", finite(worst.error), worst.torch_error, allowed[worst.name], passed, repeats
    )


def _roof(case: Case, arguments: Inputs, median_ms: float, ceilings: dict[str, float]) -> Roof | None:
    """FLOPs counted on meta tensors; every argument read once, every result written once."""
    rate = ceilings.get(f"{case.dtype}_tflops")
    if rate is None or case.direction == "train":
        return None
    meta = inputs_of(case, "meta")
    op = find_op(case.name)
    with FlopCounterMode(display=False) as counter:
        result = op(**meta, backend="torch")
    outputs = [result] if isinstance(result, Tensor) else list(result)
    given = tree_leaves([*arguments.values(), *outputs])
    moved = sum(x.numel() * x.element_size() for x in given if isinstance(x, Tensor))
    flops = int(counter.get_total_flops())
    floor = max(flops / (rate * 1e12), moved / (ceilings["copy_gbs"] * 1e9)) * 1e3
    return Roof(flops, moved, floor, floor / median_ms)


def _amdahl(case: Case, median_ms: float, ratio: float, model_ms: float | None) -> Amdahl | None:
    if model_ms is None or case.direction == "train":
        return None
    calls = OPS[case.name].times(config_of(case.variant, case.frames))
    share = min(1.0, ratio * median_ms * calls / model_ms)
    left = 1 - share
    return Amdahl(share, 1 / (left + share / ratio), 1 / max(left, 1e-9))
