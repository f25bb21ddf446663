"""X-CLIP's modules on the fused ops: the reference's constructors and state dicts, for training and inference.

Each class extends its reference and replaces the computation alone, so weights move between the two as they are.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear, scaled_dot_product_attention

from xclip_fast import reference
from xclip_fast.ops import (
    feed_forward,
    frame_attention,
    layer_norm,
    message_attention,
    message_key_value,
    patch_embed,
    prompt_attention,
    temporal_block,
)
from xclip_fast.ops._patch_contract import channels_last
from xclip_fast.reference.positions import spatial_positions, temporal_positions
from xclip_fast.reference.transformer import QuickGELU, SelfAttention, split_heads
from xclip_fast.reference.transformer import TextTransformer as ReferenceTextTransformer

Statistics = Sequence[float] | None  # of pixels, one number a channel

DROP_PATH_UNITS = ("video", "token")


def drop_path(branch: Tensor, rate: float, unit: str) -> Tensor:
    """Drop residual branches at random and scale up the others; the mean stays.

    Args:
        branch: (B, T, S, D) tokens or (B, T, D) messages.
        rate: probability of a drop.
        unit: "video" drops whole samples; "token" is what the official code does: it drops one position (for messages
            one time step) in all samples at once.
    """
    shape = [branch.shape[0], *[1] * (branch.ndim - 1)] if unit == "video" else [1] * branch.ndim
    if unit == "token":
        shape[-2] = branch.shape[-2]
    keep = 1.0 - rate
    return branch * branch.new_empty(shape).bernoulli_(keep).div_(keep)


def _norm(x: Tensor, norm: nn.LayerNorm, residual: Tensor | None = None) -> tuple[Tensor, Tensor]:
    # autocast leaves branches in half precision beside a float32 stream
    x = x if residual is None else x.to(residual.dtype)
    return layer_norm(x, norm.weight, norm.bias, residual=residual, eps=norm.eps)


def _join(stream: Tensor, branch: Tensor | None, norm: nn.LayerNorm) -> tuple[Tensor, Tensor]:
    """The norm of the stream with its pending branch, and the stream with it added."""
    return _norm(stream, norm) if branch is None else _norm(branch, norm, stream)


def _perceptron(x: Tensor, mlp: nn.Sequential) -> Tensor:
    fc: Any
    proj: Any
    fc, activation, *_, proj = mlp
    if isinstance(activation, QuickGELU):
        return feed_forward(x, fc.weight, fc.bias, proj.weight, proj.bias)
    return mlp(x)


def _communicate(class_tokens: Tensor, fc: nn.Linear, norm: nn.LayerNorm, attention: SelfAttention) -> Tensor:
    return message_attention(
        class_tokens,
        fc.weight,
        fc.bias,
        norm.weight,
        norm.bias,
        attention.in_proj_weight,
        attention.in_proj_bias,
        attention.out_proj.weight,
        attention.out_proj.bias,
        attention.heads,
        eps=norm.eps,
    )


def _attend_within_frame(normed: Tensor, message: Tensor, norm: nn.LayerNorm, attention: SelfAttention) -> Tensor:
    """The branch of the intra-frame attention: normed tokens (B, T, S, D) and messages (B, T, D) to (B, T, S, D)."""
    width = normed.shape[-1]
    packed = linear(normed, attention.in_proj_weight, attention.in_proj_bias)
    message_kv = message_key_value(
        message,
        norm.weight,
        norm.bias,
        attention.in_proj_weight[width:],
        attention.in_proj_bias[width:],
        eps=norm.eps,
    )
    mixed = frame_attention(packed.flatten(0, 1), message_kv.flatten(0, 1), attention.heads)
    return attention.out_proj(mixed).view(normed.shape)


class PatchEmbed(reference.PatchEmbed):
    """``reference.PatchEmbed`` on the fused op, for bytes too."""

    def forward(self, frames: Tensor, *, mean: Statistics = None, std: Statistics = None) -> Tensor:
        """Frames, as ``ops.patch_embed`` takes them, to tokens (F, 1 + N, D) in the dtype of the weights."""
        return _embed(self, frames, mean, std)


def _embed(patches: reference.PatchEmbed, frames: Tensor, mean: Statistics, std: Statistics) -> Tensor:
    weight, norm = patches.conv1.weight, patches.ln_pre
    side = weight.shape[-1]
    # whatever is wrong with the frames is refused by the op
    height, width = channels_last(frames).shape[1:3] if frames.ndim == 4 else (side, side)
    grid = max(height // side, 1), max(width // side, 1)
    return patch_embed(
        frames,
        weight,
        patches.class_embedding,
        spatial_positions(patches.positional_embedding, grid),
        norm_weight=norm.weight,
        norm_bias=norm.bias,
        eps=norm.eps,
        mean=mean,
        std=std,
        dtype=weight.dtype,
    )


class MessageAttention(reference.MessageAttention):
    """``reference.MessageAttention`` on the fused op."""

    def forward(self, class_tokens: Tensor) -> Tensor:
        """Class tokens (B, T, D), not normalised, to messages (B, T, D)."""
        return _communicate(class_tokens, self.message_fc, self.message_ln, self.message_attn)


class FrameAttention(reference.FrameAttention):
    """``reference.FrameAttention`` on the fused ops: the message is a key and a value, never a query."""

    def forward(self, tokens: Tensor, message: Tensor) -> Tensor:
        """Tokens (B, T, S, D) and messages (B, T, D) to tokens (B, T, S, D)."""
        normed, stream = _norm(tokens, self.ln_1)
        return stream + _attend_within_frame(normed, message, self.ln_1, self.attn)


class CrossFrameBlock(reference.CrossFrameBlock):
    """``reference.CrossFrameBlock`` on the fused ops.

    Args:
        width, heads, mlp_width, activation: as in the reference.
        drop_path: probability of dropping a residual branch in training.
        drop_path_unit: see ``drop_path``.
    """

    def __init__(
        self,
        width: int,
        heads: int,
        mlp_width: int | None = None,
        activation: str = "quick_gelu",
        *,
        drop_path: float = 0.0,
        drop_path_unit: str = "video",
    ) -> None:
        super().__init__(width, heads, mlp_width, activation)
        if not 0.0 <= drop_path < 1.0 or drop_path_unit not in DROP_PATH_UNITS:
            raise ValueError(
                f"drop_path must be in [0, 1) and its unit one of {', '.join(DROP_PATH_UNITS)}, "
                f"found {drop_path} and {drop_path_unit!r}"
            )
        self.drop_path = drop_path
        self.drop_path_unit = drop_path_unit

    def forward(self, tokens: Tensor, branch: Tensor | None = None, *, closed: bool = True):  # type: ignore[no-untyped-def]
        """Tokens (B, T, S, D), the class token first in each frame, to tokens of the same shape.

        Args:
            tokens: the residual stream.
            branch: what the block before has still to add to it; the first norm adds it on its way.
            closed: return tokens; otherwise the stream and the branch still to be added, for the next block.
        """
        normed, stream = _join(tokens, branch, self.ln_1)
        branch = _attend_within_frame(normed, self._message(stream[:, :, 0]), self.ln_1, self.attn)
        normed, stream = _norm(self._drop(branch), self.ln_2, stream)
        branch = self._drop(_perceptron(normed, self.mlp))
        return stream + branch if closed else (stream, branch)

    def _message(self, class_tokens: Tensor) -> Tensor:
        message = _communicate(class_tokens, self.message_fc, self.message_ln, self.message_attn)
        if not (self.training and self.drop_path):
            return message
        projected = self.message_fc(class_tokens)
        return projected + self._drop(message - projected)

    def _drop(self, branch: Tensor) -> Tensor:
        return drop_path(branch, self.drop_path, self.drop_path_unit) if self.training and self.drop_path else branch


class CrossFrameTransformer(reference.vision.CrossFrameTransformer):
    """The stack of blocks; each leaves its last addition to the norm of the next."""

    block = CrossFrameBlock

    def forward(self, tokens: Tensor, *, closed: bool = True):  # type: ignore[no-untyped-def]
        """Tokens (B, T, S, D) to tokens of the same shape; ``closed`` as in ``CrossFrameBlock``."""
        stream: Tensor = tokens
        branch: Tensor | None = None
        for block in self.resblocks:
            stream, branch = block(stream, branch, closed=False)
        if not closed:
            return stream, branch
        return stream if branch is None else stream + branch


class VisionTower(reference.VisionTower):
    """``reference.VisionTower`` on the fused ops."""

    blocks = CrossFrameTransformer

    def forward(  # type: ignore[no-untyped-def]
        self, video: Tensor, *, mean: Statistics = None, std: Statistics = None, closed: bool = True
    ):
        """Video to frame features (B, T, E) and patch tokens (B, T, N, D).

        Args:
            video: uint8 (B, T, H, W, 3), or floating point (B, T, 3, H, W) already normalised.
            mean, std: of the pixels from 0 to 1, for uint8 video.
            closed: return features and tokens; otherwise the features, the patches' stream and the branch still to be
                added to it, or None, for the op that reads both.
        """
        tokens = _embed(self, video.flatten(0, 1), mean, std).unflatten(0, video.shape[:2])
        stream, branch = self.transformer(tokens, closed=False)
        normed, _ = _join(stream[:, :, 0], None if branch is None else branch[:, :, 0], self.ln_post)
        features, patches = normed @ self.proj, stream[:, :, 1:]
        branch = None if branch is None else branch[:, :, 1:].to(patches.dtype)
        if not closed:
            return features, patches, branch
        return features, patches if branch is None else patches + branch


class MultiframeIntegration(reference.MultiframeIntegration):
    """``reference.MultiframeIntegration`` on the fused ops."""

    def forward(self, features: Tensor) -> Tensor:
        """Frame features (B, T, E) to video features (B, E)."""
        table = temporal_positions(self.positional_embedding, features.shape[1])[0]
        positions: Tensor | None = table.to(features.dtype)
        x: Tensor = features
        *inner, last = self.resblocks
        for block in inner:
            x, positions = _temporal_block(x, block, positions=positions), None
        return _temporal_block(x, last, positions=positions, pooled_with=features)


def _temporal_block(x: Tensor, block: Any, *, positions: Tensor | None, pooled_with: Tensor | None = None) -> Tensor:
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


class TextTransformer(ReferenceTextTransformer):
    """CLIP's causal text transformer on the fused ops."""

    def forward(self, x: Tensor) -> Tensor:
        """Token embeddings (K, L, width) to the same shape."""
        stream: Tensor = x
        branch: Tensor | None = None
        for block in self.resblocks:
            stream, branch = _causal_block(stream, branch, block)
        return stream if branch is None else stream + branch


def _causal_block(stream: Tensor, branch: Tensor | None, block: Any) -> tuple[Tensor, Tensor]:
    normed, stream = _join(stream, branch, block.ln_1)
    packed = linear(normed, block.attn.in_proj_weight, block.attn.in_proj_bias)
    query, key, value = (split_heads(part, block.attn.heads) for part in packed.chunk(3, dim=-1))
    mixed = scaled_dot_product_attention(query, key, value, is_causal=True)
    normed, stream = _norm(block.attn.out_proj(mixed.transpose(-3, -2).flatten(-2)), block.ln_2, stream)
    return stream, _perceptron(normed, block.mlp)


class VideoPrompts(reference.VideoPrompts):
    """``reference.VideoPrompts`` on the fused ops."""

    def forward(self, texts: Tensor, patches: Tensor) -> Tensor:
        """Texts (B, K, E), or (K, E) shared by all videos, and patch features (B, N, E) to texts (B, K, E)."""
        stream, branch = self.prompt(texts, patches)
        return texts + self.alpha * (stream if branch is None else stream + branch)

    def prompt(self, texts: Tensor, patches: Tensor) -> tuple[Tensor, Tensor | None]:
        """What the prompts add, before ``alpha``: (B, K, E) and, where not None, the same again to be added to it.

        Shared texts ask their first query once.
        """
        patches, _ = _norm(patches, self.norm)
        # one product makes the keys and values of all layers
        decoder: Any = self.decoder
        weights = [part.weight for layer in decoder for part in (layer.cross_attn.k_proj, layer.cross_attn.v_proj)]
        keys_values = linear(patches, torch.cat(weights)).chunk(len(weights), dim=-1)
        stream: Tensor = texts if texts.ndim == 3 else texts.unsqueeze(0)
        branch: Tensor | None = None
        for index, layer in enumerate(decoder):
            key, value = keys_values[2 * index : 2 * index + 2]
            stream, branch = _prompt_layer(stream, branch, key, value, layer)
        return stream, None if branch is None else branch.to(stream.dtype)


def _prompt_layer(
    stream: Tensor, branch: Tensor | None, key: Tensor, value: Tensor, layer: Any
) -> tuple[Tensor, Tensor]:
    """One decoder layer; like the blocks it leaves its last addition to the next norm."""
    attention = layer.cross_attn
    normed, stream = _join(stream, branch, layer.norm1)
    branch = attention.proj(prompt_attention(attention.q_proj(normed), key, value, attention.heads))
    normed, stream = _norm(branch, layer.norm3, stream.expand_as(branch))
    return stream, _perceptron(normed, layer.mlp)
