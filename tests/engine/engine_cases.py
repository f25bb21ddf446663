"""Small models and inputs that the engine's tests share."""

from __future__ import annotations

import torch
from configs import SMALL
from numerics import randomise_parameters
from torch import Tensor

from xclip_fast.config import XCLIPConfig
from xclip_fast.reference import XCLIP


def small_model(**sizes: object) -> XCLIP:
    """A reference model in which no parameter has a special value."""
    config = XCLIPConfig.from_dict(SMALL.to_dict() | sizes)
    return randomise_parameters(XCLIP(config)).requires_grad_(False).eval()


def random_video(batch: int = 2, frames: int = 4, side: int = 32) -> Tensor:
    return torch.randint(256, (batch, frames, side, side, 3), dtype=torch.uint8)


def random_tokens(classes: int = 5) -> Tensor:
    """Token ids of texts of 1 to 9 tokens; the largest id ends a text and zeros follow."""
    ids = torch.zeros(classes, SMALL.context_length, dtype=torch.int64)
    for row in range(classes):
        length = 1 + 4 * row % 9
        ids[row, :length] = torch.randint(1, 62, (length,))
        ids[row, length - 1] = 63
    return ids
