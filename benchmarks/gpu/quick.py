"""Random tensors drawn where they are used: on a GPU at once, where the ones every device agrees on take seconds."""

from __future__ import annotations

import torch
from torch import Tensor

from xclip_fast.ops.inputs import Draw


class QuickDraw(Draw):
    """``Draw`` with the generator of the device."""

    def __call__(self, *shape: int, mean: float = 0.0, scale: float = 1.0, dtype: torch.dtype | None = None) -> Tensor:
        """A normal tensor."""
        return torch.randn(shape, dtype=dtype or self.dtype, device=self.device) * scale + mean
