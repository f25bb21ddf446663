"""CLIP's pre-norm block as products: what the text tower and the end of MIT have in common."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, TypeVar

from xclip_fast.engine.cpu import Norm
from xclip_fast.engine.packing import Packing, exact
from xclip_fast.engine.products import Product

Made = TypeVar("Made", bound="PackedBlock")


@dataclass
class PackedBlock:
    """Norms and products of one ``reference.transformer.Block``; each user runs them in its own way."""

    norm_1: Norm
    qkv: Product
    out: Product
    norm_2: Norm
    fc: Product
    projection: Product
    heads: int

    @classmethod
    def pack(cls: type[Made], block: Any, activation: str, packing: Packing) -> Made:
        """The block is read, never kept."""
        attention = block.attn
        fc, projection, activation = packing.perceptron(block.mlp.c_fc, block.mlp.c_proj, block.ln_2, activation)
        return cls(
            norm_1=Norm(*packing.vectors(block.ln_1), block.ln_1.eps),
            qkv=packing.product(*packing.behind(block.ln_1, attention.in_proj_weight, attention.in_proj_bias)),
            out=packing.product(exact(attention.out_proj.weight), exact(attention.out_proj.bias)),
            norm_2=Norm(*packing.vectors(block.ln_2), block.ln_2.eps),
            fc=packing.product(*fc, activation),
            projection=packing.product(*projection),
            heads=attention.heads,
        )
