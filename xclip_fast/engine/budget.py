"""Calibration: the error of each large GEMM in low precision, SmoothQuant, and fallback to a higher precision."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from math import isnan
from typing import Any

import torch
from torch import Tensor

from xclip_fast.engine.cpu import Block, CpuTower, pack_block, step
from xclip_fast.engine.linears import Linear
from xclip_fast.engine.packing import CPU_REWRITES, GEMMS, Packing, place_of
from xclip_fast.numerics import exact_float32
from xclip_fast.ops._quantize_rows import activate

# relative errors of one GEMM on its own inputs; rounding alone gives a third of them or less
BUDGETS = {"bfloat16": 0.01, "float16": 0.002, "int8": 0.05, "float8_e4m3fn": 0.1}


@dataclass(frozen=True)
class GemmError:
    """One GEMM of a block in low precision against float32, on the same inputs.

    place: such as ``blocks.3.fc``.
    asked, used: the precision asked for and the one in use.
    error: relative, of the precision asked for; infinite where a result was NaN.
    budget: the largest error allowed.
    """

    place: str
    asked: str
    used: str
    error: float
    budget: float

    @property
    def fell_back(self) -> bool:
        """Whether the GEMM runs in a higher precision: over its budget, or in float8's first or last block."""
        return self.used != self.asked

    def __str__(self) -> str:
        note = f"  in {self.used} instead" if self.fell_back else ""
        return f"{self.place:24}{self.asked:15}{self.error:10.2e}{self.budget:10.0e}{note}"


class _Recorder:
    """A linear layer that records its inputs and results."""

    def __init__(self, linear: Any) -> None:
        self.name, self.linear = linear.name, linear
        self.seen: list[tuple[Tensor, Tensor]] = []

    def __call__(self, x: Tensor) -> Tensor:
        result = self.linear(x)
        # the caller may modify the result in place
        self.seen.append((x, result.clone()))
        return result

    def activated(self, x: Tensor) -> Tensor:
        return activate(self(x), self.linear.activation)

    def add(self, stream: Tensor, x: Tensor) -> Tensor:
        return stream + self(x)


@exact_float32()
def check_gemms(model: Any, packing: Packing, clips: Tensor) -> tuple[list[GemmError], list[Block] | None]:
    """The error of each GEMM on its inputs while the model sees the clips, and the blocks as packed for the CPU.

    In float32 there is nothing to check, and no block is packed.

    GEMMs over their budget, and for float8 those of the first and the last block, are entered in ``packing.fallback``;
    for int8 ``packing.smoothing`` is filled.
    """
    asked = packing.narrow or str(packing.stored or packing.dtype).removeprefix("torch.")
    if asked not in BUDGETS:
        return [], None
    errors, packed = [], []
    higher = packing.dtype if packing.narrow else torch.float32
    # both forms of the tower have the same GEMMs; this one runs on any device
    form = replace(packing, rewrites=packing.rewrites & CPU_REWRITES)
    resblocks = list(model.visual.transformer.resblocks)
    for index, block in _recorded(model, form, clips):
        resblock = resblocks[index]
        places = {name: place_of(index, name) for name in GEMMS}
        if packing.narrow == "int8":
            after_norms = {
                "qkv": (resblock.ln_1, resblock.attn.in_proj_weight),
                "fc": (resblock.ln_2, resblock.mlp.c_fc.weight),
            }
            for name, (norm, weight) in after_norms.items():
                weight, _ = form.after_norm(norm, weight, weight.new_zeros(len(weight)))
                packing.smoothing[places[name]] = _smoothing([rows for rows, _ in getattr(block, name).seen], weight)
        low = pack_block(resblock, index, model.config, form)
        found = {}
        for name, place in places.items():
            share = packing.smoothing.get(place)
            found[name] = _largest_error(getattr(block, name), getattr(low, name), packing.dtype, share)
        over = {name for name, error in found.items() if not error <= BUDGETS[asked]}
        if not packing.narrow and over & {"fc", "projection"}:
            # results of the one may overflow the other's range
            over |= {"fc", "projection"}
        at_the_ends = packing.narrow == "float8_e4m3fn" and index in (0, len(resblocks) - 1)
        for name, place in places.items():
            used = asked
            if at_the_ends or name in over:
                packing.fallback[place] = higher
                used = str(higher).removeprefix("torch.")
            errors.append(GemmError(place, asked, used, found[name], BUDGETS[asked]))
        if packing.device.type == "cpu":
            packed.append(pack_block(resblock, index, model.config, packing) if over else low)
    return errors, packed or None


def _recorded(model: Any, form: Packing, clips: Tensor) -> Iterator[tuple[int, Block]]:
    """Each block in float32, its GEMMs having recorded the clips."""
    exact = replace(form, dtype=torch.float32, narrow=None, stored=None, fallback={}, smoothing={})
    chunks = CpuTower(model.visual, model.config, exact, blocks=[]).embed(clips)
    for index, resblock in enumerate(model.visual.transformer.resblocks):
        block = pack_block(resblock, index, model.config, exact)
        for name in GEMMS:
            setattr(block, name, _Recorder(getattr(block, name)))
        chunks = step(block, chunks, clips.shape[1])
        yield index, block


def _smoothing(seen: list[Tensor], weight: Tensor) -> Tensor:
    """Powers of two (K,) that split the range of each channel evenly between recorded rows and the weight (N, K)."""
    rows = torch.stack([rows.abs().amax(dim=0) for rows in seen]).amax(dim=0).double().cpu()
    ratio = rows / weight.abs().amax(dim=0)
    share = torch.exp2((ratio.log2() / 2).round())
    return torch.where(ratio.isfinite() & (ratio > 0), share, 1.0)


def _largest_error(recorder: _Recorder, low: Linear, dtype: torch.dtype, share: Tensor | None) -> float:
    errors = []
    for rows, truth in recorder.seen:
        given = rows if share is None else rows / share.to(rows)
        found = low(given.to(dtype)).float()
        errors.append((found - truth).norm() / truth.norm().clamp_min(torch.finfo(torch.float32).tiny))
    error = torch.stack(errors).max().item()
    return float("inf") if isnan(error) else error
