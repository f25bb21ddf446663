"""A model without weights: names and shapes at once, whatever the sizes."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from xclip_fast.config import XCLIPConfig
from xclip_fast.model import XCLIP, create_model


def skeleton(config: XCLIPConfig) -> XCLIP:
    """The model on the meta device, in evaluation mode; nothing is allocated and no random number is drawn."""
    with torch.device("meta"), _Unfilled():
        return create_model(config)


class _Unfilled(TorchFunctionMode):
    """Leaves out the arithmetic of initialisation, for which the meta device would import the compiler: seconds."""

    _fillers = frozenset(
        {Tensor.normal_, Tensor.uniform_, Tensor.erfinv_, Tensor.mul_, Tensor.add_, Tensor.clamp_, Tensor.mul}
    )

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        if func in self._fillers or getattr(func, "__module__", "") == "torch.nn.init":
            return args[0] if args else kwargs["tensor"]
        return (torch.empty if func is torch.randn else func)(*args, **kwargs)
