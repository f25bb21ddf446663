"""Memory of a case: an estimate before the run, and the peak of one provider in a process of its own."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

from xclip_fast.bench.cases import config_of
from xclip_fast.bench.machine import available_memory
from xclip_fast.bench.record import Case
from xclip_fast.flops import parameters

DEADLINE = 300.0


def estimate(case: Case) -> int:
    """Bytes that a run takes at once, roughly: weights of truth, baseline and contender, and their activations."""
    import torch

    config = config_of(case.variant, case.frames)
    size = getattr(torch, case.dtype).itemsize
    rows = case.frames * (config.patches + 1)
    # the stream, its norm, query, key and value, the hidden layer twice: numbers a row
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


def lacking_memory(case: Case) -> str | None:
    """Why a case does not fit into the memory that is free, or nothing."""
    needed, free = estimate(case), available_memory(case.device)
    if needed <= free:
        return None
    return (
        f"{case.variant}, {case.frames} frames, batch {case.batch}, {case.dtype} needs about {needed / 2**30:.1f} GiB, "
        f"{free / 2**30:.1f} GiB are free: ask for a smaller batch"
    )


def peak_memory(case: Case, provider: str) -> float | None:
    """Peak of one step in MB: of the GPU's memory, or of the whole process on a CPU; nothing where it failed."""
    spec = json.dumps({"case": asdict(case), "provider": provider})
    command = [sys.executable, "-m", "xclip_fast.bench.memory", spec]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=DEADLINE)
        return float(json.loads(done.stdout.splitlines()[-1])["peak_mb"])
    except (subprocess.TimeoutExpired, IndexError, ValueError, KeyError, TypeError):
        return None


def _peak_of_process() -> float:
    try:
        # what getrusage says includes the process that started this one
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM:")) * 1024
    except (OSError, StopIteration):
        import resource

        # macOS counts in bytes
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def answer(spec: str) -> None:
    """Be the child."""
    import torch

    from xclip_fast.bench.models import inputs_of, prepared, step
    from xclip_fast.bench.providers import PROVIDERS, setting_of

    asked = json.loads(spec)
    case = Case(**asked["case"])
    setting = setting_of(case)
    classify = prepared(PROVIDERS[asked["provider"]].build(setting), case)
    run = step(classify, inputs_of(setting), case.direction == "train")
    if case.device == "cpu":
        run()
        peak = _peak_of_process()
    else:
        run()
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        run()
        torch.cuda.synchronize()
        peak = torch.cuda.max_memory_allocated()
    print(json.dumps({"peak_mb": round(peak / 1e6, 1)}))


if __name__ == "__main__":
    answer(sys.argv[1])
