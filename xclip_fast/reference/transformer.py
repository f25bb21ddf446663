"""The pre-norm transformer that CLIP's towers and X-CLIP's own modules share."""

from __future__ import annotations

from collections import OrderedDict

import torch
from einops import rearrange
from torch import Tensor, nn


class QuickGELU(nn.Module):
    """``x * sigmoid(1.702 x)``, CLIP's activation."""

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.sigmoid(1.702 * x)


ACTIVATION_MODULES: dict[str, type[nn.Module]] = {"quick_gelu": QuickGELU, "gelu": nn.GELU}


def split_heads(x: Tensor, heads: int) -> Tensor:
    """(..., L, D) to (..., heads, L, D / heads)."""
    return rearrange(x, "... l (h d) -> ... h l d", h=heads)


def attend(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None = None) -> Tensor:
    """Softmax attention with heads side by side again in the result.

    Args:
        query: (..., heads, L, head_dim).
        key, value: (..., heads, M, head_dim).
        mask: (L, M) added to the scores, or None.

    Returns:
        (..., L, heads * head_dim).
    """
    scores = query @ key.transpose(-2, -1) * query.shape[-1] ** -0.5
    if mask is not None:
        scores = scores + mask
    return rearrange(scores.softmax(dim=-1) @ value, "... h l d -> ... l (h d)")


def causal_mask(x: Tensor) -> Tensor:
    """The mask (L, L) that lets each token of x (..., L, D) attend to itself and those before it."""
    length = x.shape[-2]
    return torch.full((length, length), float("-inf"), dtype=x.dtype, device=x.device).triu(1)


class SelfAttention(nn.Module):
    """Multi-head self-attention with the parameter names of ``nn.MultiheadAttention``; tokens are (..., L, width)."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.in_proj_weight = nn.Parameter(torch.empty(3 * width, width))
        self.in_proj_bias = nn.Parameter(torch.zeros(3 * width))
        self.out_proj = nn.Linear(width, width)
        nn.init.xavier_uniform_(self.in_proj_weight)
        nn.init.zeros_(self.out_proj.bias)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        packed = nn.functional.linear(x, self.in_proj_weight, self.in_proj_bias)
        query, key, value = (split_heads(part, self.heads) for part in packed.chunk(3, dim=-1))
        return self.out_proj(attend(query, key, value, mask))


def mlp(width: int, hidden: int, activation: str) -> nn.Sequential:
    """The MLP of a block, with CLIP's names."""
    return nn.Sequential(
        OrderedDict(
            c_fc=nn.Linear(width, hidden),
            gelu=ACTIVATION_MODULES[activation](),
            c_proj=nn.Linear(hidden, width),
        )
    )


class Block(nn.Module):
    """One pre-norm transformer block; tokens are (..., L, width)."""

    attention: type[SelfAttention] = SelfAttention

    def __init__(self, width: int, heads: int, activation: str = "quick_gelu") -> None:
        super().__init__()
        self.attn = self.attention(width, heads)
        self.ln_1 = nn.LayerNorm(width)
        self.mlp = mlp(width, 4 * width, activation)
        self.ln_2 = nn.LayerNorm(width)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        x = x + self.attn(self.ln_1(x), mask)
        return x + self.mlp(self.ln_2(x))


class TextTransformer(nn.Module):
    """CLIP's causal text transformer; tokens are (K, L, width)."""

    block: type[Block] = Block

    def __init__(self, width: int, layers: int, heads: int, activation: str) -> None:
        super().__init__()
        self.resblocks = nn.ModuleList(self.block(width, heads, activation) for _ in range(layers))
        self._initialise(width, layers)

    def _initialise(self, width: int, layers: int) -> None:
        # as CLIP: the residual branches shrink with depth
        residual = width**-0.5 * (2 * layers) ** -0.5
        deviations = {
            "in_proj_weight": width**-0.5,
            "out_proj.weight": residual,
            "c_fc.weight": (2 * width) ** -0.5,
            "c_proj.weight": residual,
        }
        for name, parameter in self.named_parameters():
            for ending, deviation in deviations.items():
                if name.endswith(ending):
                    nn.init.normal_(parameter, std=deviation)

    def forward(self, x: Tensor) -> Tensor:
        causal = causal_mask(x)
        for block in self.resblocks:
            x = block(x, causal)
        return x


def initialise_linears(module: nn.Module) -> None:
    """Truncated normal weights of deviation 0.02 and zero biases, for the modules X-CLIP adds to CLIP."""
    for part in module.modules():
        if isinstance(part, nn.Linear):
            nn.init.trunc_normal_(part.weight, std=0.02)
            if part.bias is not None:
                nn.init.zeros_(part.bias)
