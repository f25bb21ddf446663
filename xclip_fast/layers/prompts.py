"""Video-specific prompts on the fused ops."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from xclip_fast import reference
from xclip_fast.layers.transformer import add_norm, add_pending, modules_do, run_mlp
from xclip_fast.ops import prompt_attention
from xclip_fast.ops._backends import host_bound
from xclip_fast.plain import LINEAR, LINEAR_WITHOUT_BIAS, NORM, QUICK_GELU, Plain, is_plain
from xclip_fast.reference.prompts import CrossAttention


class PromptLayer(reference.prompts.PromptLayer):
    """``reference.PromptLayer`` on the fused ops.

    Example:
        >>> import torch
        >>> from xclip_fast.layers import PromptLayer
        >>> PromptLayer(64, heads=1)(torch.randn(2, 3, 64), torch.randn(2, 4, 64)).shape  # texts, patches
        torch.Size([2, 3, 64])
    """

    def forward(self, texts: Tensor, patches: Tensor) -> Tensor:
        """Texts (B, K, E) and normalised patch features (B, N, E) to texts (B, K, E)."""
        if modules_do(texts, self.norm1):
            return super().forward(texts, patches)
        return add_pending(*self._advance(texts, None, patches))

    def _advance(
        self, stream: Tensor, pending: Tensor | None, patches: Tensor, *, key_value: Any = None
    ) -> tuple[Tensor, Tensor]:
        """As ``CrossFrameBlock._advance``; texts may be (1, K, E), and ``key_value`` of the patches may be given."""
        attention = self.cross_attn
        if not is_plain(self, norm1=NORM, cross_attn=_CROSS_ATTENTION):
            stream = stream.expand(patches.shape[0], -1, -1)
        normed, stream = add_norm(self, "norm1", stream, pending)
        if is_plain(self, cross_attn=_CROSS_ATTENTION):
            key, value = key_value or (attention.k_proj(patches), attention.v_proj(patches))
            branch = attention.proj(prompt_attention(attention.q_proj(normed), key, value, attention.heads))
        else:
            branch = attention(normed, patches)
        normed, stream = add_norm(self, "norm3", stream.expand_as(branch), branch)
        return stream, run_mlp(self, normed, _MLP)


class VideoPrompts(reference.VideoPrompts):
    """``reference.VideoPrompts`` on the fused ops.

    Example:
        >>> import torch
        >>> from xclip_fast.layers import VideoPrompts
        >>> VideoPrompts(64, heads=1)(torch.randn(3, 64), torch.randn(2, 4, 64)).shape  # 3 texts, 2 videos
        torch.Size([2, 3, 64])
    """

    layer = PromptLayer

    def forward(self, texts: Tensor, patches: Tensor) -> Tensor:
        """Texts (B, K, E), or (K, E) shared by all videos, and patch features (B, N, E) to texts (B, K, E)."""
        return texts + self.alpha * add_pending(*self._advance(texts, patches))

    def _advance(self, texts: Tensor, patches: Tensor) -> tuple[Tensor, Tensor | None]:
        """The residual stream (B, K, E) before ``alpha``, and ``pending``: output of the last MLP, not yet added.

        The first query of shared texts is computed once.
        """
        patches, _ = add_norm(self, "norm", patches, None)
        decoder: Any = self.decoder
        stream: Tensor = texts if texts.ndim == 3 else texts.unsqueeze(0)
        pending: Tensor | None = None
        by_modules = host_bound(stream.expand(patches.shape[0], -1, -1))
        known = [None] * len(decoder) if by_modules else self._keys_and_values(patches)
        for (name, layer), key_value in zip(decoder.named_children(), known, strict=True):
            if not by_modules and is_plain(decoder, **{name: _LAYER}):
                stream, pending = layer._advance(stream, pending, patches, key_value=key_value)
            else:
                stream, pending = layer(add_pending(stream, pending).expand(patches.shape[0], -1, -1), patches), None
        return stream, None if pending is None else pending.to(stream.dtype)

    def _keys_and_values(self, patches: Tensor) -> list[Any]:
        """Those of all layers from one GEMM, where they are plain."""
        decoder: Any = self.decoder
        if not is_plain(decoder, **dict.fromkeys(decoder._modules, _WHOLE_LAYER)):
            return [None] * len(decoder)
        weights = [part.weight for layer in decoder for part in (layer.cross_attn.k_proj, layer.cross_attn.v_proj)]
        parts = linear(patches, torch.cat(weights)).chunk(len(weights), dim=-1)
        return list(zip(parts[::2], parts[1::2], strict=True))


_CROSS_ATTENTION = Plain(
    CrossAttention,
    q_proj=LINEAR_WITHOUT_BIAS,
    k_proj=LINEAR_WITHOUT_BIAS,
    v_proj=LINEAR_WITHOUT_BIAS,
    proj=LINEAR,
)
_MLP = Plain(nn.Sequential, **{"0": LINEAR, "1": QUICK_GELU, "2": Plain(nn.Identity), "3": LINEAR})  # type: ignore[arg-type]
_LAYER = Plain(PromptLayer)
_WHOLE_LAYER = Plain(PromptLayer, cross_attn=_CROSS_ATTENTION)
