"""A checkpoint whose tensors carry official names, before anything of it is copied into memory."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from xclip_fast.checkpoints.names import TRANSPOSED, listing, official_name
from xclip_fast.checkpoints.sizes import Claim
from xclip_fast.errors import InputError


@dataclass(frozen=True)
class Stored:
    """One tensor of a model as the checkpoint holds it: whole, or in parts to be stacked; maybe transposed."""

    parts: tuple[Tensor, ...]
    transposed: bool = False

    @property
    def shape(self) -> tuple[int, ...]:
        first, *rest = self.parts[0].shape or (1,)
        shape = (first * len(self.parts), *rest) if len(self.parts) > 1 else tuple(self.parts[0].shape)
        return shape[::-1] if self.transposed else shape

    def read(self, dtype: torch.dtype) -> Tensor:
        """A dense copy, which shares nothing with the checkpoint."""
        whole = self.parts[0] if len(self.parts) == 1 else torch.cat(self.parts)
        whole = whole.detach().T if self.transposed else whole.detach()
        return whole.to(dtype, copy=len(self.parts) == 1, memory_format=torch.contiguous_format)


@dataclass
class Checkpoint:
    """Tensors by official name, what the source claims of the configuration, and what was put right or assumed.

    ``where`` names the source in messages, ``format`` in the report.
    """

    where: str
    format: str
    tensors: dict[str, Stored]
    claims: list[Claim] = field(default_factory=list)
    repairs: list[str] = field(default_factory=list)

    @property
    def is_clip(self) -> bool:
        """Whether it holds CLIP alone, so that the modules of X-CLIP start random."""
        return self.format in ("clip", "open_clip")


def from_official(tensors: Mapping[str, Tensor]) -> dict[str, Stored]:
    """Tensors that have the official names already."""
    return {name: Stored((tensor,)) for name, tensor in tensors.items()}


def from_hf(tensors: Mapping[str, Tensor], where: str) -> dict[str, Stored]:
    """Tensors with Hugging Face names, renamed; the three projections of an attention become one tensor.

    Raises:
        InputError: a name is foreign, or one of three projections is missing or unlike the others.
    """
    parts: dict[str, dict[int, Tensor]] = {}
    foreign = []
    stacked = set()
    for name, tensor in tensors.items():
        found = official_name(name)
        if found is None:
            foreign.append(name)
            continue
        official, place = found
        parts.setdefault(official, {})[place] = tensor
        if ".in_proj_" in official:
            stacked.add(official)
    if foreign:
        raise InputError(f"{where} holds tensors no X-CLIP model has: {listing(foreign)}: nothing is skipped")
    for official in stacked:
        if len(parts[official]) != 3 or len({tensor.shape for tensor in parts[official].values()}) != 1:
            raise InputError(f"{where}: the q, k and v of {listing([official])} must be there and of one shape")
    return {
        official: Stored(tuple(found[place] for place in sorted(found)), official in TRANSPOSED)
        for official, found in parts.items()
    }
