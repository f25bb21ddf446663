"""What each product of the blocks errs in low precision, and which of them stay in a higher one."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from math import isnan
from typing import Any

import torch
from torch import Tensor

from xclip_fast.engine.cpu import Block, CpuTower, pack_block, step
from xclip_fast.engine.packing import CPU_REWRITES, PRODUCTS, Packing, place_of
from xclip_fast.engine.products import Product
from xclip_fast.numerics import exact_float32
from xclip_fast.ops._quantize_rows import activate

# relative errors of one product on its own inputs; rounding alone gives a third of them or less
BUDGETS = {"bfloat16": 0.01, "float16": 0.002, "int8": 0.05, "float8_e4m3fn": 0.1}


@dataclass(frozen=True)
class ProductError:
    """One product of a block in low precision against float32, on the same inputs.

    place: such as ``blocks.3.fc``.
    asked, used: the precision asked for and the one in use.
    error: relative, of the precision asked for; infinite where it gave what is not a number.
    budget: the largest error allowed.
    """

    place: str
    asked: str
    used: str
    error: float
    budget: float

    @property
    def fell_back(self) -> bool:
        """Whether the product broke its budget, or is kept in a higher precision anyway."""
        return self.used != self.asked

    def __str__(self) -> str:
        note = f"  in {self.used} instead" if self.fell_back else ""
        return f"{self.place:24}{self.asked:15}{self.error:10.2e}{self.budget:10.0e}{note}"


class _Recorder:
    """A product that remembers its rows and what it made of them."""

    def __init__(self, product: Any) -> None:
        self.name, self.product = product.name, product
        self.seen: list[tuple[Tensor, Tensor]] = []

    def __call__(self, x: Tensor) -> Tensor:
        result = self.product(x)
        # whoever gets the result may write over it
        self.seen.append((x, result.clone()))
        return result

    def activated(self, x: Tensor) -> Tensor:
        return activate(self(x), self.product.activation)

    def add(self, stream: Tensor, x: Tensor) -> Tensor:
        return stream + self(x)


@exact_float32()
def check_products(model: Any, packing: Packing, clips: Tensor) -> tuple[list[ProductError], list[Block] | None]:
    """The error of each product on what it meets when the model sees the clips, and the blocks as the CPU runs them.

    In float32 there is nothing to check, and no block is packed.

    Products that break their budget, and for float8 those of the first and the last block, are entered in
    ``packing.kept``; for int8 ``packing.smoothing`` is filled.
    """
    asked = packing.narrow or str(packing.stored or packing.dtype).removeprefix("torch.")
    if asked not in BUDGETS:
        return [], None
    errors, packed = [], []
    higher = packing.dtype if packing.narrow else torch.float32
    # both forms of the tower have the same products; this one runs on any device
    form = replace(packing, rewrites=packing.rewrites & CPU_REWRITES)
    resblocks = list(model.visual.transformer.resblocks)
    for index, block in _recorded(model, form, clips):
        resblock = resblocks[index]
        places = {name: place_of(index, name) for name in PRODUCTS}
        if packing.narrow == "int8":
            behind = {
                "qkv": (resblock.ln_1, resblock.attn.in_proj_weight),
                "fc": (resblock.ln_2, resblock.mlp.c_fc.weight),
            }
            for name, (norm, weight) in behind.items():
                weight, _ = form.behind(norm, weight, weight.new_zeros(len(weight)))
                packing.smoothing[places[name]] = _smoothing([rows for rows, _ in getattr(block, name).seen], weight)
        low = pack_block(resblock, index, model.config, form)
        found = {}
        for name, place in places.items():
            share = packing.smoothing.get(place)
            found[name] = _largest_error(getattr(block, name), getattr(low, name), packing.dtype, share)
        broken = {name for name, error in found.items() if not error <= BUDGETS[asked]}
        if not packing.narrow and broken & {"fc", "projection"}:
            # what the one gives may be beyond the other's range
            broken |= {"fc", "projection"}
        at_the_ends = packing.narrow == "float8_e4m3fn" and index in (0, len(resblocks) - 1)
        for name, place in places.items():
            used = asked
            if at_the_ends or name in broken:
                packing.kept[place] = higher
                used = str(higher).removeprefix("torch.")
            errors.append(ProductError(place, asked, used, found[name], BUDGETS[asked]))
        if packing.device.type == "cpu":
            packed.append(pack_block(resblock, index, model.config, packing) if broken else low)
    return errors, packed or None


def _recorded(model: Any, form: Packing, clips: Tensor) -> Iterator[tuple[int, Block]]:
    """Each block in float32, its products having seen the clips."""
    exact = replace(form, dtype=torch.float32, narrow=None, stored=None, kept={}, smoothing={})
    chunks = CpuTower(model.visual, model.config, exact, blocks=[]).embed(clips)
    for index, resblock in enumerate(model.visual.transformer.resblocks):
        block = pack_block(resblock, index, model.config, exact)
        for name in PRODUCTS:
            setattr(block, name, _Recorder(getattr(block, name)))
        chunks = step(block, chunks, clips.shape[1])
        yield index, block


def _smoothing(seen: list[Tensor], weight: Tensor) -> Tensor:
    """Powers of two (K,) that part the range of each channel evenly between the rows seen and the weight (N, K)."""
    rows = torch.stack([rows.abs().amax(dim=0) for rows in seen]).amax(dim=0).double().cpu()
    ratio = rows / weight.abs().amax(dim=0)
    share = torch.exp2((ratio.log2() / 2).round())
    return torch.where(ratio.isfinite() & (ratio > 0), share, 1.0)


def _largest_error(recorder: _Recorder, low: Product, dtype: torch.dtype, share: Tensor | None) -> float:
    errors = []
    for rows, truth in recorder.seen:
        given = rows if share is None else rows / share.to(rows)
        found = low(given.to(dtype)).float()
        errors.append((found - truth).norm() / truth.norm().clamp_min(torch.finfo(torch.float32).tiny))
    error = torch.stack(errors).max().item()
    return float("inf") if isnan(error) else error
