"""The multiframe integration transformer, MIT (paper, equation 6)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from xclip_fast.reference.positions import temporal_positions
from xclip_fast.reference.transformer import Block, initialise_linears


class MultiframeIntegration(nn.Module):
    """Frame features of one video to one video feature.

    Args:
        width: feature width E.
        heads: attention heads.
        layers: transformer blocks.
        frames: length of the temporal position table.

    Example:
        >>> import torch
        >>> from xclip_fast.reference import MultiframeIntegration
        >>> MultiframeIntegration(64, heads=1)(torch.randn(2, 8, 64)).shape  # frame features to video features
        torch.Size([2, 64])
    """

    block: type[Block] = Block

    def __init__(self, width: int, heads: int, layers: int = 1, frames: int = 8) -> None:
        super().__init__()
        self.positional_embedding = nn.Parameter(torch.empty(1, frames, width))
        self.resblocks = nn.ModuleList(self.block(width, heads) for _ in range(layers))
        nn.init.trunc_normal_(self.positional_embedding, std=0.02)
        initialise_linears(self)

    def forward(self, features: Tensor) -> Tensor:
        """Frame features (B, T, E) to video features (B, E); the outer residual carries no positions."""
        x = features + temporal_positions(self.positional_embedding, features.shape[1]).to(features.dtype)
        for block in self.resblocks:
            x = block(x)
        return (features + x).mean(dim=1)
