"""What calls cost on the host before a GPU works: ``python -m benchmarks host``.

On the stand-in for CUDA nothing is computed, so a call lasts as long as Python, the dispatcher and the launches of it.
Small batches on a GPU are bound by just that. What is compared takes turns in one process, medians of the turns; it is
CPU time, of all threads of the process.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks.gpu import standin
from xclip_fast.errors import InputError
from xclip_fast.files import replacing

TURNS = 9
BLOCK = 0.04  # seconds of one turn
OP_BUDGET = 10.0  # microseconds that an op may add to its launches

Call = Callable[[], object]


def measure(out: Path | None, cases: Sequence[str] = ()) -> int:
    """Run the cases, all without names, in a process on the stand-in; print the tables, and write them as JSON.

    Raises:
        InputError: the stand-in cannot be built here, or a case is unknown.
    """
    if unknown := set(cases) - set(CASES):
        raise InputError(f"unknown case {', '.join(sorted(unknown))}: choose of {', '.join(CASES)}")
    try:
        environment = standin.environment(standin.build())
    except OSError as error:
        raise InputError(f"host time is measured on a stand-in for CUDA: {error}") from None
    command = [sys.executable, "-m", "benchmarks.host", *(cases or CASES)]
    done = subprocess.run(command, env=os.environ | environment | {"OMP_NUM_THREADS": "1"}, stdout=subprocess.PIPE)
    if done.returncode:
        raise InputError(f"the process on the stand-in ended with {done.returncode}")
    found = json.loads(done.stdout)
    print(_table(found["microseconds"]))
    if out is not None:
        with replacing(out) as unfinished:
            unfinished.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    return 0


def medians(calls: dict[str, Call], turns: int = TURNS, block: float = BLOCK) -> dict[str, float]:
    """Microseconds of each call; each turn times all of them, one block after another."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    counts = {}
    for name, call in calls.items():
        for _ in range(3):
            call()
        start = time.process_time()
        call()
        counts[name] = max(1, int(block / (time.process_time() - start)))
    for _ in range(turns):
        for name, call in calls.items():
            start = time.process_time()
            for _ in range(counts[name]):
                call()
            times[name].append((time.process_time() - start) / counts[name] * 1e6)
    return {name: statistics.median(found) for name, found in times.items()}


def _norm() -> dict[str, float]:
    """A layer norm of 64 rows beside PyTorch's, and one launch as Triton makes it and as ours."""
    import torch

    from xclip_fast.kernels.layer_norm import _layer_norm_fwd_kernel, layer_norm_fwd
    from xclip_fast.ops import layer_norm

    x, weight, bias = (
        torch.empty(*shape, dtype=torch.bfloat16, device="cuda") for shape in ((64, 768), (768,), (768,))
    )
    normed, _, mean, rstd = layer_norm_fwd(x, weight, bias, None, None, 1e-5)
    pointers = {"x_ptr": x, "residual_ptr": None, "constant_ptr": None, "weight_ptr": weight, "bias_ptr": bias}
    pointers |= {"normed_ptr": normed, "stream_ptr": normed, "mean_ptr": mean, "rstd_ptr": rstd}
    sizes = {"rows": 64, "x_stride": 768, "residual_stride": 0, "eps": 1e-5, "WIDTH": 768}
    sizes |= {"BLOCK_ROWS": 4, "BLOCK_WIDTH": 1024, "HAS_RESIDUAL": False, "HAS_CONSTANT": False, "num_warps": 4}
    leaves = [tensor.clone().requires_grad_() for tensor in (x, weight, bias)]
    grad = torch.empty_like(x)

    def theirs() -> Any:
        return torch.nn.functional.layer_norm(leaves[0], (768,), leaves[1], leaves[2])

    def without_gradient(call: Call) -> Call:
        return lambda: torch.no_grad()(call)()

    return medians(
        {
            "a launch by Triton": lambda: _layer_norm_fwd_kernel.run(grid=(16,), warmup=False, **pointers, **sizes),
            "a launch": lambda: _layer_norm_fwd_kernel[(16,)](**pointers, **sizes),
            "F.layer_norm, inference": without_gradient(theirs),
            "layer_norm, inference": without_gradient(lambda: layer_norm(*leaves)),
            "F.layer_norm, forward": theirs,
            "layer_norm, forward": lambda: layer_norm(*leaves),
            "F.layer_norm, forward + backward": lambda: torch.autograd.grad(theirs(), leaves, grad),
            "layer_norm, forward + backward": lambda: torch.autograd.grad(layer_norm(*leaves)[0], leaves, grad),
        }
    )


def _ops() -> dict[str, float]:
    """Every op at its shape in B/32 at batch 1, in inference; and how many launches it makes."""
    import torch

    from xclip_fast.bench.operators import inputs_of
    from xclip_fast.ops.cases import OPS, find_op

    calls: dict[str, Call] = {}
    for name in OPS:
        arguments = inputs_of(_case(name))
        calls[name] = partial(find_op(name), **arguments, backend="triton")
    with torch.inference_mode():
        found = medians(calls)
        for name, call in calls.items():
            before = standin.counts()
            call()
            after = standin.counts()
            kinds = ("triton_launches", "other_launches", "gemms")
            found[f"{name}: launches"] = sum(after[kind] - before[kind] for kind in kinds)
    return found


def _case(name: str, direction: str = "forward") -> Any:
    from xclip_fast.bench.run import MODEL, make_case

    what = "normalised" if name == MODEL else None
    return make_case(name, "B/32", None, 1, "bfloat16", direction=direction, device="cuda", input=what)


def _block() -> dict[str, float]:
    """One cross-frame block of B/16, forward and backward."""
    import torch

    from xclip_fast.config import VARIANTS
    from xclip_fast.layers import CrossFrameBlock
    from xclip_fast.reference import CrossFrameBlock as Plain

    config = VARIANTS["B/16"]
    tokens = torch.empty(1, config.frames, config.patches + 1, config.vision_width, device="cuda", dtype=torch.bfloat16)
    tokens.requires_grad_()
    calls: dict[str, Call] = {}
    for what, kind in (("the reference", Plain), ("ours", CrossFrameBlock)):
        with torch.device("cuda"):
            block = kind(config.vision_width, config.vision_heads).to(torch.bfloat16)
        calls[what] = lambda block=block: block(tokens).sum().backward()
    return medians(calls)


def _model(direction: str) -> dict[str, float]:
    from xclip_fast.bench.providers import PROVIDERS
    from xclip_fast.bench.setting import inputs_of, prepared, setting_of, step

    case = _case("model", direction)
    setting = setting_of(case)
    inputs = inputs_of(setting)
    calls = {}
    for name in ("hf-sdpa", "optimized", "layers"):
        calls[name] = step(prepared(PROVIDERS[name].build(setting), case), inputs, direction == "train")
    return medians(calls, turns=7, block=0.3)


CASES: dict[str, Callable[[], dict[str, float]]] = {
    "norm": _norm,
    "ops": _ops,
    "block": _block,
    "forward": lambda: _model("forward"),
    "train": lambda: _model("train"),
}


def _table(found: dict[str, Any]) -> str:
    lines = []
    for case, times in found.items():
        lines.append(f"\n{case}, us of host time")
        lines += [f"  {what:36} {value:10.1f}" for what, value in times.items()]
    return "\n".join(lines)


if __name__ == "__main__":
    import torch

    from xclip_fast.bench.machine import facts

    standin.enter()
    torch.set_num_threads(1)
    microseconds = {name: CASES[name]() for name in sys.argv[1:]}
    json.dump({"machine": facts("cpu"), "microseconds": microseconds}, sys.stdout)
    sys.stdout.flush()
    # threads of PyTorch's may abort a process that puts itself away
    os._exit(0)
    os._exit(0)  # the threads of autograd do not end on the stand-in
