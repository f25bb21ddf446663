"""PART=sweep: the committed candidates of each kernel at the shapes of production, checked and then timed in turn.

Beside them each op by every backend, so that a kernel that does not pay is known. ``benchmarks.gpu.tune`` makes the
tuning table of what is found here.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor, wait
from multiprocessing import get_context
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor

from benchmarks.gpu.journal import Journal, leave_if_lost
from benchmarks.gpu.quick import QuickDraw
from xclip_fast import tuning
from xclip_fast.bench.machine import Sensors
from xclip_fast.bench.parity import floating, run_op
from xclip_fast.bench.timing import alternate, noise_of, sampler, timing_of
from xclip_fast.numerics import poisoned_memory
from xclip_fast.ops import _backends, explain
from xclip_fast.ops.cases import IN_EXTENSION, OPS, Load, config_of, find_op
from xclip_fast.ops.inputs import Inputs
from xclip_fast.tuning import Tile, Tunable, override, shape_key, tunables

SHAPES = [("B/16", 8), ("L/14", 8), ("B/32", 1), ("B/32", 8), ("B/16", 1), ("L/14", 1), ("B/16", 32), ("L/14", 32)]
SHAPES += [("L/14-336", 1)]
FRAMES = {"L/14-336": 16}
BLOCKS, BLOCK = 5, 0.01
FIRST = ("linear_quick_gelu", "frame_attention", "layer_norm")  # where the time goes
COMPILERS = 12
COMPILING = 0.4  # of the time that is left
FIGURES = ("median_ms", "p10_ms", "p90_ms", "ratio", "ratio_p10", "ratio_p90", "noise", "verdict")


class Sweep:
    """One case: the tiles of a kernel, or the backends of an op, at the shape a model gives it."""

    def __init__(self, op: str, kernel: Tunable | None, variant: str, batch: int, dry: bool) -> None:
        self.op, self.kernel, self.variant, self.batch, self.dry = op, kernel, variant, batch, dry
        self.device = "cpu" if dry else "cuda"
        self.dtype = torch.float16 if dry else torch.bfloat16
        self.backward = kernel is not None and kernel.backward

    @property
    def name(self) -> str:
        """In the journal."""
        what = f"{self.op} backends" if self.kernel is None else self.kernel.name
        return f"{what} {self.variant} x{self.batch}"

    def load(self) -> Load:
        """The sizes."""
        return Load(config_of(self.variant, FRAMES.get(self.variant)), self.batch, 5 if self.dry else 400)

    def inputs(self) -> Inputs:
        """Of the op."""
        return OPS[self.op].arguments(QuickDraw(self.dtype, self.device), self.load())

    def candidates(self, shapes: list[tuple[Any, ...]]) -> list[Tile]:
        """What to try at the first of these shapes of launches."""
        assert self.kernel is not None
        return self.kernel.candidates(*shapes[0])[: 2 if self.dry else None] if shapes else []


def sweeps(dry: bool) -> dict[str, Sweep]:
    """Name to case; what production runs most comes first, the backends of an op after its tiles."""
    found = []
    for variant, batch in [("tiny", 1)] if dry else SHAPES:
        kernels = [one for one in tunables().values() if not dry or one.op == "clip_logits"]
        kernels.sort(key=lambda one: (one.backward, FIRST.index(one.op) if one.op in FIRST else len(FIRST)))
        # training is measured at batch 8
        found += [Sweep(one.op, one, variant, batch, dry) for one in kernels if batch <= 8 or not one.backward]
        found += [Sweep(op, None, variant, batch, dry) for op in (["clip_logits"] if dry else OPS)]
    return {sweep.name: sweep for sweep in found}


def main(journal: Journal, out: Path, dry: bool) -> bool:
    """Time what is left; true when every candidate that compiles is right."""
    found = sweeps(dry)
    if not dry:
        compile_ahead([found[name] for name in found if name not in journal.cases], journal.left * COMPILING)
    for name in journal.todo(found):
        journal.start(name)
        sweep = found[name]
        try:
            result = backends_of(sweep) if sweep.kernel is None else tiles_of(sweep)
        except Exception as error:
            # such as too little memory for this shape
            result = {"rows": [], "status": "failed", "reason": f"{type(error).__name__}: {error}"[:300]}
        journal.add(name, result)
        leave_if_lost()
        timed = [row for row in result["rows"] if "ratio" in row]
        best = max(timed, key=lambda row: float(row["ratio"]), default=None)
        print(f"  {name}: {best['what'] if best else 'nothing'} {best['ratio'] if best else ''}", flush=True)
        if not dry:
            torch.cuda.empty_cache()
    complete = journal.finish(found)
    rows = [row for case in journal.cases.values() for row in case.get("rows", [])]
    failed = any(case.get("status") == "failed" for case in journal.cases.values())
    return complete and not failed and not any(row["status"] == "wrong" for row in rows)


def compile_ahead(sweeps: list[Sweep], seconds: float) -> None:
    """Compile the candidates on all cores, into Triton's cache on disk; what fails here fails again where it counts."""
    start, chosen = time.monotonic(), [sweep for sweep in sweeps if sweep.kernel is not None]
    pool = ProcessPoolExecutor(COMPILERS, mp_context=get_context("spawn"))
    tasks = [pool.submit(_compile, sweep.name) for sweep in chosen]
    done, _ = wait(tasks, timeout=seconds)
    # what compiles now would disturb what is timed next
    pool.shutdown(wait=True, cancel_futures=True)
    print(f"  compiled ahead: {len(done)} of {len(tasks)} cases, {time.monotonic() - start:.0f} s", flush=True)


def _compile(name: str) -> None:
    sweep = sweeps(False)[name]
    assert sweep.kernel is not None
    call = _call(sweep, sweep.inputs())
    for tile in sweep.candidates(launched(sweep.kernel, call)):
        try:
            with override(sweep.kernel.name, **sweep.kernel.sizes_of(tile)):
                call()
        except Exception:
            continue
    torch.cuda.synchronize()


def tiles_of(sweep: Sweep) -> dict[str, Any]:
    """Rows of candidates; ``ratio`` is the default's time over theirs. ``shapes`` are the arguments of the function."""
    kernel, arguments = sweep.kernel, sweep.inputs()
    assert kernel is not None
    op, wanted = find_op(sweep.op), floating(arguments) if sweep.backward else []
    truth = run_op(op, arguments, wanted, "torch", sweep.backward)
    limit = 2 * OPS[sweep.op].ceiling(sweep.dtype)
    call = _call(sweep, arguments)
    shapes = launched(kernel, call)
    if not shapes:
        return {"rows": [], "shapes": [], "reason": "this launch does not happen at this shape"}
    with override(kernel.name):
        base = _sampler(sweep, call)
    sensors, blocks = Sensors(sweep.device), 1 if sweep.dry else BLOCKS
    noise = noise_of(alternate(base, base, blocks, sensors))
    usual = {kernel.default(*shape) for shape in shapes}
    rows = []
    for tile in sweep.candidates(shapes):
        sizes = kernel.sizes_of(tile)
        row: dict[str, Any] = {"what": said(tile), "tile": sizes, "default": usual == {tile}}
        rows.append(row)
        with override(kernel.name, **sizes):
            try:
                with poisoned_memory():
                    result = run_op(op, arguments, wanted, "triton", sweep.backward)
                row["error"] = max(_distance(result[name], exact) for name, exact in truth.items())
                row["status"] = "right" if row["error"] <= limit else "wrong"
                if row["status"] == "wrong":
                    row["error"] = str(row["error"])
                    continue
                sample = _sampler(sweep, call)
                # a captured graph keeps its tiles; a plain call would take those of the moment
                timed = alternate(base, sample, blocks, sensors)
            except Exception as error:
                # too much shared memory, or a shape the compiler refuses
                row |= {"status": "refused", "reason": f"{type(error).__name__}: {error}"[:200]}
                continue
        row |= _figures(timing_of(timed, "default", noise, method="graph"))
    whose = {"function": kernel.name, "of": sweep.op, "backward": sweep.backward}
    return whose | {"rows": rows, "shapes": [shape_key(shape) for shape in shapes]}


def said(tile: Tile) -> str:
    """A tile in a line of a table."""
    sides = ", ".join(f"{side} {field}" for field, side in zip(tile._fields, tile[:3], strict=False) if side)
    return f"{sides}, {tile.num_warps} warps, {tile.num_stages} stages"


def launched(kernel: Tunable, call: Callable[[], object]) -> list[tuple[Any, ...]]:
    """The arguments that a kernel's function of tiles is given in a call."""
    shapes: dict[str, tuple[Any, ...]] = {}
    default = kernel.default

    def record(*shape: Any) -> Tile:
        shapes[shape_key(shape)] = shape
        return default(*shape)

    # overridden by nothing, the launcher asks the default at every launch
    with override(kernel.name), patch.object(kernel, "default", record):
        call()
    return list(shapes.values())


def backends_of(sweep: Sweep) -> dict[str, Any]:
    """Rows of backends; ``ratio`` is the kernel's time over theirs. ``call`` is the call as a tuning table names it."""
    arguments = sweep.inputs()
    calls: list[str] = []

    def record(op: str, tensors: Any) -> None:
        if op == sweep.op:
            calls.append(tuning.call_key(tensors))

    with patch.object(_backends, "tuned_backend", record), torch.no_grad():
        _automatic(sweep, arguments)
    base = _sampler(sweep, _call(sweep, arguments))
    sensors, blocks = Sensors(sweep.device), 1 if sweep.dry else BLOCKS
    noise = noise_of(alternate(base, base, blocks, sensors))
    rows = []
    names = ["torch", "reference"] + ["extension"] * (sweep.op in IN_EXTENSION)
    for name in names:
        row: dict[str, Any] = {"what": name}
        rows.append(row)
        refusal = explain(sweep.op, **arguments).get(name)
        if refusal is not None:
            row |= {"status": "refused", "reason": refusal}
            continue
        try:
            timed = alternate(base, _sampler(sweep, _call(sweep, arguments, name)), blocks, sensors)
        except Exception as error:
            row |= {"status": "refused", "reason": f"{type(error).__name__}: {error}"[:200]}
            continue
        row |= {"status": "right"} | _figures(timing_of(timed, "triton", noise, method="graph"))
    return {"rows": rows, "op": sweep.op, "call": calls[0] if calls else None}


def _automatic(sweep: Sweep, arguments: Inputs) -> None:
    # on a CPU the table is not asked: the call is made as if it were on a GPU
    if not sweep.dry:
        find_op(sweep.op)(**arguments)


def _figures(timing: Any) -> dict[str, Any]:
    return {name: getattr(timing, name) for name in FIGURES}


def _distance(result: Tensor, truth: Tensor) -> float:
    """Relative error on the device; not a number where an element was left unwritten."""
    difference, truth = result.float() - truth.float(), truth.float()
    scale = truth.norm().clamp(min=1e-30)
    return max((difference.norm() / scale).item(), (difference.abs().max() / truth.abs().max().clamp(min=1e-30)).item())


def _sampler(sweep: Sweep, call: Callable[[], object]) -> Callable[[], float]:
    call()
    return sampler(call, sweep.device, 0.001 if sweep.dry else BLOCK, graph=not sweep.dry)


def _call(sweep: Sweep, arguments: Inputs, backend: str = "triton") -> Callable[[], object]:
    op = find_op(sweep.op)
    if not sweep.backward:

        def forward() -> object:
            with torch.inference_mode():
                return op(**arguments, backend=backend)

        return forward
    leaves = {name: arguments[name].detach().requires_grad_() for name in floating(arguments)}

    def both() -> object:
        result = op(**(arguments | leaves), backend=backend)
        outputs = [result] if isinstance(result, Tensor) else [out for out in result if out.requires_grad]
        return torch.autograd.grad(outputs, list(leaves.values()), [torch.ones_like(out) for out in outputs])

    return both
