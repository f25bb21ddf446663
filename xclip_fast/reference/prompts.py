"""Video-specific prompts (paper, section 3.3): each class text is adapted to the patches of the video."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from xclip_fast.reference.transformer import QuickGELU, attend, initialise_linears, split_heads


class CrossAttention(nn.Module):
    """Texts attend to patches; query, key and value projections have no bias."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.q_proj = nn.Linear(width, width, bias=False)
        self.k_proj = nn.Linear(width, width, bias=False)
        self.v_proj = nn.Linear(width, width, bias=False)
        self.proj = nn.Linear(width, width)

    def forward(self, texts: Tensor, patches: Tensor) -> Tensor:
        query = split_heads(self.q_proj(texts), self.heads)
        key = split_heads(self.k_proj(patches), self.heads)
        value = split_heads(self.v_proj(patches), self.heads)
        return self.proj(attend(query, key, value))


class PromptLayer(nn.Module):
    """One decoder layer. The names, norm3 and the numbers in mlp among them, are the checkpoint's."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.cross_attn = CrossAttention(width, heads)
        self.norm1 = nn.LayerNorm(width)
        self.norm3 = nn.LayerNorm(width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), QuickGELU(), nn.Identity(), nn.Linear(4 * width, width))

    def forward(self, texts: Tensor, patches: Tensor) -> Tensor:
        texts = texts + self.cross_attn(self.norm1(texts), patches)
        return texts + self.mlp(self.norm3(texts))


class VideoPrompts(nn.Module):
    """Adapts class texts to a video.

    Args:
        width: feature width E.
        heads: attention heads.
        layers: decoder layers.
        alpha: initial scale of the prompts.

    Example:
        >>> import torch
        >>> from xclip_fast.reference import VideoPrompts
        >>> VideoPrompts(64, heads=1)(torch.randn(3, 64), torch.randn(2, 4, 64)).shape  # 3 texts, 2 videos
        torch.Size([2, 3, 64])
    """

    layer: type[PromptLayer] = PromptLayer

    def __init__(self, width: int, heads: int, layers: int = 2, alpha: float = 0.1) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.decoder = nn.ModuleList(self.layer(width, heads) for _ in range(layers))
        self.alpha = nn.Parameter(torch.full((width,), float(alpha)))
        initialise_linears(self)

    def forward(self, texts: Tensor, patches: Tensor) -> Tensor:
        """Texts (B, K, E) and mean patch features (B, N, E) to adapted texts (B, K, E)."""
        patches = self.norm(patches)
        prompts = texts
        for layer in self.decoder:
            prompts = layer(prompts, patches)
        return texts + self.alpha * prompts
