"""How large the tensors are that a piece of code makes."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class Largest(TorchDispatchMode):
    """The bytes of the largest storage that an operator makes; views of the tensors given are none."""

    def __init__(self, *given: Tensor) -> None:
        super().__init__()
        self.given, self.largest = {one.untyped_storage()._cdata for one in given}, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        storages = [leaf.untyped_storage() for leaf in tree_leaves(out) if isinstance(leaf, Tensor)]
        self.largest = max([self.largest, *(one.nbytes() for one in storages if one._cdata not in self.given)])
        return out
