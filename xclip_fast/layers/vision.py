"""The cross-frame communication transformer on the fused ops."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from xclip_fast import reference
from xclip_fast.layers.transformer import (
    ATTENTION,
    SelfAttention,
    add_norm,
    add_norm_mlp,
    add_pending,
    modules_do,
    run_blocks,
)
from xclip_fast.ops import frame_attention, message_attention, message_key_value, patch_embed
from xclip_fast.ops._backends import host_bound
from xclip_fast.ops._linear import linear
from xclip_fast.ops._norm_linear import norm_linear
from xclip_fast.ops._patch_contract import channels_last, pixel_statistics
from xclip_fast.plain import LINEAR, NORM, Plain, is_plain
from xclip_fast.reference.positions import spatial_positions
from xclip_fast.reference.vision import normalise_pixels

Statistics = Sequence[float] | None  # of pixels, one number a channel

DROP_PATH_UNITS = ("video", "token")


def drop_path(branch: Tensor, rate: float, unit: str) -> Tensor:
    """Drop residual branches at random and scale up the others; the mean stays.

    Args:
        branch: (B, T, S, D) tokens or (B, T, D) messages.
        rate: probability of a drop.
        unit: "video" drops whole samples; "token" is what the official code does: it drops one position (for messages
            one time step) in all samples at once.

    Example:
        >>> import torch
        >>> from xclip_fast.layers import drop_path
        >>> dropped = drop_path(torch.ones(64, 8, 5, 16), rate=0.5, unit="video")
        >>> sorted(dropped.unique().tolist())  # a video is dropped whole, or scaled up
        [0.0, 2.0]
    """
    shape = [branch.shape[0], *[1] * (branch.ndim - 1)] if unit == "video" else [1] * branch.ndim
    if unit == "token":
        shape[-2] = branch.shape[-2]
    keep = 1.0 - rate
    return branch * branch.new_empty(shape).bernoulli_(keep).div_(keep)


def _communicate(owner: Any, class_tokens: Tensor) -> Tensor:
    fc, norm, attention = owner.message_fc, owner.message_ln, owner.message_attn
    if not is_plain(owner, **_COMMUNICATION):
        message = fc(class_tokens)
        return message + attention(norm(message))
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


def _attend_within_frame(
    owner: Any, stream: Tensor, pending: Tensor | None, message: Callable[[Tensor], Tensor]
) -> tuple[Tensor, Tensor]:
    """The residual stream with ``pending`` added, and the branch of the intra-frame attention, both (B, T, S, D).

    ``message`` makes messages (B, T, D) of class tokens (B, T, D).
    """
    norm, attention = owner.ln_1, owner.attn
    if not is_plain(owner, ln_1=NORM, attn=ATTENTION):
        stream = add_pending(stream, pending)
        extended = torch.cat([stream, message(stream[:, :, 0]).unsqueeze(-2).to(stream.dtype)], dim=-2)
        return stream, attention(norm(extended))[..., :-1, :]
    # autocast leaves branches in half precision beside a float32 residual stream
    x, residual = (stream, None) if pending is None else (pending.to(stream.dtype), stream)
    in_proj = attention.in_proj_weight, attention.in_proj_bias
    packed, stream, class_tokens = norm_linear(x, residual, (norm.weight, norm.bias), *in_proj, norm.eps)
    width = stream.shape[-1]
    message_kv = message_key_value(
        message(class_tokens),
        norm.weight,
        norm.bias,
        attention.in_proj_weight[width:],
        attention.in_proj_bias[width:],
        eps=norm.eps,
    )
    mixed = frame_attention(packed.flatten(0, 1), message_kv.flatten(0, 1), attention.heads)
    return stream, linear(mixed, attention.out_proj.weight, attention.out_proj.bias).view(stream.shape)


class PatchEmbed(reference.PatchEmbed):
    """``reference.PatchEmbed`` on the fused op, for bytes too.

    Example:
        >>> import torch
        >>> from xclip_fast.layers import PatchEmbed
        >>> PatchEmbed(64, patch_size=16, image_size=32)(torch.randn(8, 3, 32, 32)).shape  # class token and patches
        torch.Size([8, 5, 64])
    """

    def forward(self, frames: Tensor, *, mean: Statistics = None, std: Statistics = None) -> Tensor:
        """Frames, as ``ops.patch_embed`` takes them, to tokens (F, 1 + N, D) in the dtype of the weights."""
        return _embed(self, frames, mean, std)


def _embed(patches: reference.PatchEmbed, frames: Tensor, mean: Statistics, std: Statistics) -> Tensor:
    dtype, side, norm = patches.class_embedding.dtype, patches.patch_size, patches.ln_pre
    plain = is_plain(patches, conv1=_CONVOLUTION, ln_pre=NORM) and _cuts_patches(patches.conv1, side)
    normalised = frames.ndim == 4 and frames.is_floating_point() and mean is None and std is None
    if not plain or (normalised and host_bound(frames) and norm.weight.dtype == dtype):
        if frames.dtype == torch.uint8:
            mean, std = pixel_statistics(frames, mean, std)
            frames = normalise_pixels(channels_last(frames), mean, std, dtype)
        return reference.PatchEmbed.forward(patches, frames.to(dtype))
    # whatever is wrong with the frames is refused by the op
    height, width = channels_last(frames).shape[1:3] if frames.ndim == 4 else (side, side)
    grid = max(height // side, 1), max(width // side, 1)
    return patch_embed(
        frames,
        patches.conv1.weight,
        patches.class_embedding,
        spatial_positions(patches.positional_embedding, grid),
        norm_weight=norm.weight,
        norm_bias=norm.bias,
        eps=norm.eps,
        mean=mean,
        std=std,
        dtype=dtype,
    )


def _cuts_patches(conv: nn.Conv2d, side: int) -> bool:
    return conv.stride == conv.kernel_size == (side, side) and conv.padding == (0, 0) and conv.dilation == (1, 1)


class MessageAttention(reference.MessageAttention):
    """``reference.MessageAttention`` on the fused op.

    Example:
        >>> import torch
        >>> from xclip_fast.layers import MessageAttention
        >>> MessageAttention(64, heads=1)(torch.randn(2, 8, 64)).shape  # (B, T, D)
        torch.Size([2, 8, 64])
    """

    attention = SelfAttention

    def forward(self, class_tokens: Tensor) -> Tensor:
        """Class tokens (B, T, D), not normalised, to messages (B, T, D)."""
        return _communicate(self, class_tokens)


class FrameAttention(reference.FrameAttention):
    """``reference.FrameAttention`` on the fused ops: the message is a key and a value, never a query.

    Example:
        >>> import torch
        >>> from xclip_fast.layers import FrameAttention
        >>> FrameAttention(64, heads=1)(torch.randn(2, 8, 5, 64), torch.randn(2, 8, 64)).shape  # (B, T, S, D)
        torch.Size([2, 8, 5, 64])
    """

    attention = SelfAttention

    def forward(self, tokens: Tensor, message: Tensor) -> Tensor:
        """Tokens (B, T, S, D) and messages (B, T, D) to tokens (B, T, S, D)."""
        stream, branch = _attend_within_frame(self, tokens, None, lambda class_tokens: message)
        return stream + branch


class CrossFrameBlock(reference.CrossFrameBlock):
    """``reference.CrossFrameBlock`` on the fused ops.

    Args:
        width, heads, mlp_width, activation: as in the reference.
        drop_path: probability of dropping a residual branch in training.
        drop_path_unit: see ``drop_path``.

    Example:
        >>> import torch
        >>> from xclip_fast.layers import CrossFrameBlock
        >>> CrossFrameBlock(64, heads=1)(torch.randn(2, 8, 5, 64)).shape  # (B, T, S, D)
        torch.Size([2, 8, 5, 64])
    """

    attention = SelfAttention

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

    def forward(self, tokens: Tensor) -> Tensor:
        """Tokens (B, T, S, D), the class token first in each frame, to tokens of the same shape."""
        drops = self.training and self.drop_path
        if modules_do(tokens, self.ln_1) and not drops:
            return super().forward(tokens)
        return add_pending(*self._advance(tokens, None))

    def _advance(self, stream: Tensor, pending: Tensor | None) -> tuple[Tensor, Tensor]:
        """``forward`` with its first and last addition left to the norms, inside a stack.

        Args:
            stream: the residual stream (B, T, S, D).
            pending: output of the previous MLP, not yet added; fused into the first norm.

        Returns:
            The residual stream, and the output of this block's MLP, not yet added.
        """
        stream, branch = _attend_within_frame(self, stream, pending, self._message)
        stream, branch = add_norm_mlp(self, stream, self._drop(branch))
        return stream, self._drop(branch)

    def _message(self, class_tokens: Tensor) -> Tensor:
        if not (self.training and self.drop_path):
            return _communicate(self, class_tokens)
        message = self.message_fc(class_tokens)
        return message + self._drop(self.message_attn(self.message_ln(message)))

    def _drop(self, branch: Tensor) -> Tensor:
        return drop_path(branch, self.drop_path, self.drop_path_unit) if self.training and self.drop_path else branch


class CrossFrameTransformer(reference.vision.CrossFrameTransformer):
    """The stack of blocks; the output of each MLP is added in the first norm of the next block.

    Example:
        >>> import torch
        >>> from xclip_fast.layers import CrossFrameTransformer
        >>> blocks = CrossFrameTransformer(64, layers=2, heads=1, mlp_width=256, activation="quick_gelu")
        >>> blocks(torch.randn(2, 8, 5, 64)).shape
        torch.Size([2, 8, 5, 64])
    """

    block = CrossFrameBlock
    checkpointing: dict[str, Any] | None = None  # options of torch.utils.checkpoint.checkpoint

    def forward(self, tokens: Tensor) -> Tensor:
        """Tokens (B, T, S, D) to tokens of the same shape."""
        return add_pending(*self._advance(tokens))

    def _advance(self, tokens: Tensor) -> tuple[Tensor, Tensor | None]:
        """``forward`` without its last addition: the residual stream, and ``pending``, not yet added."""
        return run_blocks(self, _BLOCK, tokens)


class VisionTower(reference.VisionTower):
    """``reference.VisionTower`` on the fused ops.

    Example:
        >>> import torch
        >>> from xclip_fast.layers import VisionTower
        >>> tower = VisionTower(64, patch_size=16, image_size=32, layers=2, heads=1, mlp_width=256, embed_dim=32)
        >>> features, patches = tower(torch.randn(2, 8, 3, 32, 32))
        >>> features.shape, patches.shape
        (torch.Size([2, 8, 32]), torch.Size([2, 8, 4, 64]))
    """

    blocks = CrossFrameTransformer
    transformer: CrossFrameTransformer

    def forward(  # type: ignore[override]
        self, video: Tensor, *, mean: Statistics = None, std: Statistics = None
    ) -> tuple[Tensor, Tensor]:
        """Video to frame features (B, T, E) and patch tokens (B, T, N, D).

        Args:
            video: uint8 (B, T, H, W, 3), or floating point (B, T, 3, H, W) already normalised.
            mean, std: of the pixels from 0 to 1, for uint8 video.
        """
        features, stream, pending = self._advance(video, mean=mean, std=std)
        return features, add_pending(stream, pending)

    def _advance(
        self, video: Tensor, *, mean: Statistics = None, std: Statistics = None
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """``forward`` without its last addition: features, residual stream of the patches, and ``pending``."""
        tokens = _embed(self, video.flatten(0, 1), mean, std).unflatten(0, video.shape[:2])
        stream, pending = tokens, None
        if is_plain(self, transformer=_TRANSFORMER):
            stream, pending = self.transformer._advance(tokens)
        else:
            stream = self.transformer(tokens)
        normed, _ = add_norm(self, "ln_post", stream[:, :, 0], None if pending is None else pending[:, :, 0])
        patches = stream[:, :, 1:]
        return normed @ self.proj, patches, None if pending is None else pending[:, :, 1:].to(patches.dtype)


_COMMUNICATION = {"message_fc": LINEAR, "message_ln": NORM, "message_attn": ATTENTION}
_CONVOLUTION = Plain(nn.Conv2d, parameters="weight")
_BLOCK = Plain(CrossFrameBlock)
_TRANSFORMER = Plain(CrossFrameTransformer)
