"""Every launch of one launcher, with nothing compared: ``python -m benchmarks.gpu.launches LAUNCHER``, for sanitizers.

Awkward small shapes in two dtypes, then those of the models, whose tiles are larger; with ``--small`` after the name
the small ones in bfloat16 alone.
"""

from __future__ import annotations

import sys

import torch
from torch import Tensor

from benchmarks.compile_gate import calls
from benchmarks.compile_gate import cases as production
from benchmarks.gpu import standin
from benchmarks.gpu.prepare import ROOT
from benchmarks.gpu.quick import QuickDraw
from xclip_fast.ops import patch_embed
from xclip_fast.ops.inputs import Factory
from xclip_fast.ops.inputs import patch_embed as patch_inputs

# tokens of every model; enough rows for the large tiles; long clips
SHAPES = ("B/32 8f x1", "B/16 8f x8", "L/14 8f x1", "L/14-336 8f x1", "B/32 32f x1")

# of the extension, frames, their side, patch and token width: reads of 8 bytes at once, of 2, of one
EXTENSION = "extension"
PATCHES = ((2, 64, 32, 64), (3, 48, 16, 72), (2, 42, 14, 72), (2, 35, 7, 40))


def launchers() -> list[str]:
    """All that there are."""
    return sorted({case.call.func.__name__ for case in production.cases()})  # type: ignore[attr-defined]


def maker(dtype: torch.dtype, device: str) -> Factory:
    """Random tensors."""

    def make(*shape: int, dtype: torch.dtype | None = dtype) -> Tensor:
        dtype = dtype or default
        if not dtype.is_floating_point:
            return torch.randint(0, 256, shape, dtype=dtype, device=device)
        return torch.randn(shape, dtype=dtype, device=device)

    default = dtype
    return Factory(make, device)


def launch(launcher: str, device: str, *, small: bool = False) -> int:
    """Make the launches, and return how many calls it were; of the models' shapes none on a CPU, which is too slow."""
    if launcher == EXTENSION:
        for size in PATCHES:
            patch_embed(**patch_inputs(QuickDraw(torch.bfloat16, device), *size), backend=EXTENSION)
        torch.cuda.synchronize()
        return len(PATCHES)
    sys.path.insert(0, str(ROOT / "tests" / "kernels"))
    from launcher_cases import CASES

    found = 0
    dtypes = (torch.bfloat16,) if small else (torch.bfloat16, torch.float32)
    for dtype in (torch.float16,) if device == "cpu" else dtypes:
        for name, call in CASES.items():
            if name.split()[0] == launcher:
                call(maker(dtype, device))
                found += 1
    if device != "cpu" and not small:
        for case in production.cases(maker(torch.bfloat16, device)):
            # the name goes on with what is special
            if case.call.func is getattr(calls, launcher) and case.shape.startswith(SHAPES):  # type: ignore[attr-defined]
                case.call()
                found += 1
    if device == "cuda":
        torch.cuda.synchronize()
    return found


if __name__ == "__main__":
    if standin.in_force():
        standin.enter()
    where = "cuda" if torch.cuda.is_available() else "cpu"
    print(f"{launch(sys.argv[1], where, small='--small' in sys.argv)} calls of {sys.argv[1]}", flush=True)
