"""Memory of a case: an estimate before the run, and the peak of one provider in a process of its own."""

from __future__ import annotations

import gc
import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING

from xclip_fast.bench.machine import available_memory
from xclip_fast.bench.record import Case
from xclip_fast.flops import parameters
from xclip_fast.ops.cases import config_of

if TYPE_CHECKING:
    from torch import Tensor, nn

DEADLINE = 300.0


def estimate(case: Case) -> int:
    """Bytes that a run takes at once, roughly: weights of truth, baseline and contender, and their activations."""
    import torch

    config = config_of(case.variant, case.frames)
    size = getattr(torch, case.dtype).itemsize
    rows = case.frames * (config.patches + 1)
    # values a row: residual stream, its norm, query, key, value, and the hidden layer before and after the activation
    live = config.vision_width * 6 + 2 * config.vision_mlp_width
    scores = case.frames * config.vision_heads * (config.patches + 2) ** 2 * 3
    kept = config.vision_layers if case.direction == "train" else 1
    exact = (rows * live + scores) * 8 * kept
    activations = case.batch * (rows * live + scores) * size * kept
    frames = case.batch * case.frames * 3 * config.image_size**2 * (size + 8)
    prompts = case.batch * case.classes * config.embed_dim * 8 * size
    grads = 2 if case.direction == "train" else 1
    weights = parameters(config) * (4 + 8 * grads + 3 * size * grads)
    return int(weights + max(exact, activations) + frames + prompts)


def memory_refusal(case: Case) -> str | None:
    """Why a case does not fit into the free memory. Returns the reason, or None."""
    needed, free = estimate(case), available_memory(case.device)
    if needed <= free:
        return None
    return (
        f"{case.variant}, {case.frames} frames, batch {case.batch}, {case.dtype} needs about {needed / 2**30:.1f} GiB, "
        f"{free / 2**30:.1f} GiB are free: ask for a smaller batch"
    )


def peak_memory(case: Case, provider: str, folder: Path) -> float | None:
    """Peak memory of a provider in a case, in MB: its weights, and all that a step allocates.

    In a process of its own. On a GPU it is what torch has allocated. On a CPU it is the memory of the process above
    what it was once the same provider had computed the tiny model: neither imported libraries count, nor the threads
    and kernels that a first call makes. What building takes before the first step does not count either.

    Args:
        case, provider: what is computed by whom.
        folder: of the case's ``Setting``, with files that the provider has made already.

    Returns:
        None where it failed, and on a CPU without Linux.
    """
    spec = json.dumps({"case": asdict(case), "provider": provider, "folder": str(folder)})
    command = [sys.executable, "-m", "xclip_fast.bench.memory", spec]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=DEADLINE)
        return float(json.loads(done.stdout.splitlines()[-1])["peak_mb"])
    except (subprocess.TimeoutExpired, IndexError, ValueError, KeyError, TypeError):
        return None


def saved_bytes(run: Callable[[], object], module: nn.Module) -> int:
    """Bytes of the distinct memory that a forward pass keeps for the backward pass, weights left out.

    Args:
        run: the forward pass.
        module: whose weights are left out.
    """
    import torch

    weights = {parameter.untyped_storage()._cdata for parameter in module.parameters()}
    kept: dict[int, int] = {}
    # what is freed meanwhile could lend its memory to another tensor, which would be taken for it
    alive: list[object] = []

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in weights:
            kept[storage._cdata] = storage.nbytes()
        alive.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        alive.append(run())
    return sum(kept.values())


class _Process:
    """The memory of this process, as Linux counts it."""

    def __init__(self) -> None:
        import ctypes

        self.library = ctypes.CDLL(None)

    def settle(self) -> int:
        """Give back what is free, forget the peak so far, and return the bytes that are left."""
        gc.collect()
        if hasattr(self.library, "malloc_trim"):
            self.library.malloc_trim(0)
        # the peak starts anew: man 5 proc
        Path("/proc/self/clear_refs").write_text("5")
        return self._read("VmRSS")

    def peak(self) -> int:
        """The most bytes since it settled."""
        return self._read("VmHWM")

    def _read(self, name: str) -> int:
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) for line in lines if line.startswith(f"{name}:")) * 1024


def answer(spec: str) -> None:
    """Entry point of the child process: reads a case as JSON, prints its peak memory as JSON."""
    asked = json.loads(spec)
    case, provider, folder = Case(**asked["case"]), asked["provider"], Path(asked["folder"])
    if case.device == "cpu":
        process = _Process()
        _warm_up(case, provider, folder)
        before = process.settle()
        run = _ready(case, provider, folder)
        process.settle()
        run()
        run()
        peak = process.peak() - before
    else:
        import torch

        run = _ready(case, provider, folder)
        run()
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        run()
        torch.cuda.synchronize()
        peak = torch.cuda.max_memory_allocated()
    print(json.dumps({"peak_mb": round(peak / 1e6, 1)}))


def _warm_up(case: Case, provider: str, folder: Path) -> None:
    """A first step on the tiny model: imports, threads and kernels that count as nobody's peak."""
    from xclip_fast.bench.setting import UnavailableError

    small = folder / "tiny"
    small.mkdir(exist_ok=True)
    try:
        _ready(replace(case, variant="tiny", frames=config_of("tiny").frames), provider, small)()
    except UnavailableError:
        # it has no model of that size, but imports its libraries to build one that it has
        _ready(case, provider, folder)


def _ready(case: Case, provider: str, folder: Path) -> Callable[[], object]:
    """One step of a provider; weights that it has copied are freed first."""
    from xclip_fast.bench.providers import PROVIDERS
    from xclip_fast.bench.setting import forget, inputs_of, prepared, setting_of, step

    setting = setting_of(case, folder)
    classify = prepared(PROVIDERS[provider].build(setting), case)
    inputs = inputs_of(setting)
    del setting
    forget()
    return step(classify, inputs, case.direction == "train")


if __name__ == "__main__":
    answer(sys.argv[1])
