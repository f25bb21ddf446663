"""The multiframe integration transformer (MIT) on the fused op."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from xclip_fast import reference
from xclip_fast.layers.transformer import ATTENTION, MLP, Block
from xclip_fast.ops import temporal_block
from xclip_fast.ops._backends import host_bound
from xclip_fast.plain import NORM, Plain, is_plain
from xclip_fast.reference.positions import temporal_positions


class MultiframeIntegration(reference.MultiframeIntegration):
    """``reference.MultiframeIntegration`` on the fused ops.

    Example:
        >>> import torch
        >>> from xclip_fast.layers import MultiframeIntegration
        >>> MultiframeIntegration(64, heads=1)(torch.randn(2, 8, 64)).shape  # frame features to video features
        torch.Size([2, 64])
    """

    block = Block

    def forward(self, features: Tensor) -> Tensor:
        """Frame features (B, T, E) to video features (B, E)."""
        if host_bound(features):
            return super().forward(features)
        table = temporal_positions(self.positional_embedding, features.shape[1])[0]
        positions: Tensor | None = table.to(features.dtype)
        x: Tensor = features
        blocks: Any = self.resblocks
        *_, last = blocks
        for name, block in blocks.named_children():
            pooled_with = features if block is last else None
            # the op normalises twice with one eps
            if is_plain(blocks, **{name: _BLOCK}) and block.ln_1.eps == block.ln_2.eps:
                x = _temporal_block(x, block, positions, pooled_with)
            else:
                x = block(x if positions is None else x + positions)
                x = x if pooled_with is None else (pooled_with + x).mean(dim=1)
            positions = None
        return x


def _temporal_block(x: Tensor, block: Any, positions: Tensor | None, pooled_with: Tensor | None) -> Tensor:
    return temporal_block(
        x,
        block.ln_1.weight,
        block.ln_1.bias,
        block.attn.in_proj_weight,
        block.attn.in_proj_bias,
        block.attn.out_proj.weight,
        block.attn.out_proj.bias,
        block.ln_2.weight,
        block.ln_2.bias,
        block.mlp.c_fc.weight,
        block.mlp.c_fc.bias,
        block.mlp.c_proj.weight,
        block.mlp.c_proj.bias,
        block.attn.heads,
        positions=positions,
        pooled_with=pooled_with,
        eps=block.ln_1.eps,
    )


_BLOCK = Plain(Block, ln_1=NORM, attn=ATTENTION, ln_2=NORM, mlp=MLP)
