"""Every op checked where it is installed: what ``xclip-fast verify`` runs.

The rule is ``xclip_fast.numerics.allowance``. Kernels are held to twice plain torch's error and a rounding; the "torch"
backend, which is PyTorch's own operators in another order, to what its dtype may err at most.
"""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace

from xclip_fast.errors import InputError

DTYPES = ("float32", "float16", "bfloat16")
BACKENDS = ("triton", "torch", "extension")
PASSED, FAILED, SKIPPED = "passed", "failed", "skipped"
_RESULT = '{"op"'  # how the line of a result begins
DEADLINE = 300.0  # seconds for all cases of one op


@dataclass(frozen=True)
class Result:
    """One case of one op on one backend.

    Attributes:
        op, case, backend, device, dtype, seed: what was run; the same ones give the same numbers again.
        status: "passed", "failed" or "skipped".
        worst: the output or gradient closest to its allowance, or beyond it.
        error, torch_error, allowance: relative, of that one; None where nothing was compared, or a result was not
            finite.
        seconds: how long it took.
        reason: why it was skipped or failed.
    """

    op: str
    case: str
    backend: str
    device: str
    dtype: str
    seed: int
    status: str
    worst: str | None = None
    error: float | None = None
    torch_error: float | None = None
    allowance: float | None = None
    seconds: float = 0.0
    reason: str | None = None


def verify(
    ops: Sequence[str] = (),
    device: str = "cpu",
    dtypes: Sequence[str] = DTYPES,
    backends: Sequence[str] = BACKENDS,
    seed: int = 0,
    gradients: bool = True,
    deadline: float = DEADLINE,
) -> Iterator[Result]:
    """Check every case of the ops, forward and backward; a crash is a failed case, and the next op follows.

    Each op is checked in a process of its own: on the CPU Triton's interpreter stands in for a GPU, which has to be
    said before torch is imported, and kernels that crash end that process alone.

    Args:
        ops: names in ``cases.OPS``; all of them without.
        device: "cpu" or a CUDA device.
        dtypes: of ``DTYPES``.
        backends: of ``BACKENDS``.
        seed: of the random inputs.
        gradients: check the backward pass too.
        deadline: seconds for the process of one op.

    Raises:
        InputError: a name is unknown.
    """
    from xclip_fast.ops.cases import IN_EXTENSION, OPS

    for asked, known, what in ((ops, OPS, "op"), (dtypes, DTYPES, "dtype"), (backends, BACKENDS, "backend")):
        for name in asked:
            if name not in known:
                raise InputError(f"unknown {what} {name!r}: choose one of {', '.join(known)}")
    for op in ops or OPS:
        cases = [
            Result(op, case, backend, device, dtype, seed, FAILED)
            for case in OPS[op].small
            for backend in backends
            if backend != "extension" or op in IN_EXTENSION
            for dtype in dtypes
        ]
        if cases:
            yield from _in_child(cases, gradients, deadline)


def _in_child(cases: list[Result], gradients: bool, deadline: float) -> Iterator[Result]:
    spec = json.dumps({"cases": [asdict(case) for case in cases], "gradients": gradients})
    environment = dict(os.environ)
    if cases[0].device == "cpu":
        environment["TRITON_INTERPRET"] = "1"
    else:
        environment.pop("TRITON_INTERPRET", None)
    command = [sys.executable, "-m", "xclip_fast.bench.verify"]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    child = subprocess.Popen(command, text=True, errors="replace", env=environment, **pipes)  # type: ignore[call-overload]
    try:
        output, log = child.communicate(spec, timeout=deadline)
        end = f"the process ended with code {child.returncode}"
    except subprocess.TimeoutExpired:
        child.kill()
        output, log = child.communicate()
        end = f"no answer within {deadline:g} s"
    finally:
        child.kill()
    # what a crash says may stand between the lines
    lines = output.splitlines()
    found = [Result(**json.loads(line)) for line in lines if line.startswith(_RESULT)]
    yield from found
    if child.returncode:
        said = [line for line in (*lines, *log.splitlines()) if line.strip() and not line.startswith(_RESULT)]
        reason = "; ".join([end, *said[-8:]])[:800]
        missing = cases[len(found) :] or [replace(cases[-1], case="whole process")]
        yield from (replace(case, reason=reason) for case in missing)


def check(case: Result, gradients: bool) -> Result:
    """Run one case here; whatever it raises is its result."""
    import torch

    from xclip_fast.bench.parity import compare
    from xclip_fast.ops import explain
    from xclip_fast.ops.cases import OPS, find_op
    from xclip_fast.ops.inputs import Draw

    start = time.perf_counter()
    op = OPS[case.op]
    dtype = getattr(torch, case.dtype)
    ceiling = op.ceiling(dtype)
    try:
        function = find_op(case.op)
        arguments = op.example(Draw(dtype, case.device, case.seed), case.case)
        if refusal := explain(case.op, **arguments).get(case.backend):
            return replace(case, status=SKIPPED, reason=refusal)
        rows = list(compare(function, arguments, case.backend, gradients=gradients and op.trained, ceiling=ceiling))
    except ImportError as error:
        return replace(case, status=SKIPPED, reason=str(error))
    except Exception as error:
        # a verification goes on whatever one op does
        reason = f"{type(error).__name__}: {error}"[:400]
        return replace(case, seconds=time.perf_counter() - start, reason=reason)
    allowed = {row.name: ceiling if case.backend == "torch" else row.allowance for row in rows}
    worst = max(rows, key=lambda row: row.error / allowed[row.name] if row.error == row.error else math.inf)
    failed = [row.name for row in rows if not row.error <= allowed[row.name]]
    return replace(
        case,
        status=FAILED if failed else PASSED,
        worst=worst.name,
        error=worst.error if math.isfinite(worst.error) else None,
        torch_error=worst.torch_error if math.isfinite(worst.torch_error) else None,
        allowance=allowed[worst.name],
        seconds=time.perf_counter() - start,
        reason=f"beyond the allowance: {', '.join(failed)}" if failed else None,
    )


def answer() -> None:
    """Entry point of the child process: reads cases as JSON, prints a line of JSON for each."""
    spec = json.load(sys.stdin)
    for case in spec["cases"]:
        print(json.dumps(asdict(check(Result(**case), spec["gradients"]))), flush=True)


if __name__ == "__main__":
    answer()
