"""The cross-frame communication transformer (paper, section 3.2): frames to class features and patch tokens."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from xclip_fast.reference.positions import spatial_positions
from xclip_fast.reference.transformer import SelfAttention, mlp


def normalise_pixels(frames: Tensor, mean: Sequence[float], std: Sequence[float], dtype: torch.dtype) -> Tensor:
    """Bytes (..., H, W, 3) as normalised (..., 3, H, W), rounded to a dtype at the end."""
    exact = torch.promote_types(dtype, torch.float32)
    # filled by the device: no CUDA graph can capture a copy from the host
    shift, scale = (
        torch.stack([torch.full((), value, dtype=exact, device=frames.device) for value in values])
        for values in (mean, std)
    )
    return ((frames.to(exact) / 255 - shift) / scale).movedim(-1, -3).to(dtype)


def embed_patches(
    frames: Tensor, conv: nn.Module, class_embedding: Tensor, positions: Tensor, norm: nn.Module
) -> Tensor:
    """Normalised frames (F, 3, H, W) to tokens (F, 1 + N, D): patches, class token, positions, norm."""
    patches = conv(frames)
    grid = patches.shape[-2:]
    patches = patches.flatten(2).transpose(1, 2)
    classes = class_embedding.to(patches.dtype).expand(patches.shape[0], 1, -1)
    tokens = torch.cat([classes, patches], dim=1)
    return norm(tokens + spatial_positions(positions, tuple(grid)).to(tokens.dtype))


def communicate(class_tokens: Tensor, fc: nn.Linear, norm: nn.LayerNorm, attention: nn.Module) -> Tensor:
    """Cross-frame attention, CFA (paper, equations 3 and 4): class tokens (B, T, D) to messages (B, T, D)."""
    message = fc(class_tokens)
    return message + attention(norm(message))


def attend_within_frame(tokens: Tensor, message: Tensor, norm: nn.LayerNorm, attention: nn.Module) -> Tensor:
    """Intra-frame attention, IFA (equation 5): tokens (B, T, S, D) attend to their frame and its message (B, T, D)."""
    extended = torch.cat([tokens, message.unsqueeze(-2)], dim=-2)
    extended = extended + attention(norm(extended))
    return extended[..., :-1, :]


class PatchEmbed(nn.Module):
    """Patch embedding of frames.

    Args:
        width: token width D.
        patch_size: side of a patch, P pixels.
        image_size: side of the frames the position table is made for.

    Example:
        >>> import torch
        >>> from xclip_fast.reference import PatchEmbed
        >>> PatchEmbed(64, patch_size=16, image_size=32)(torch.randn(8, 3, 32, 32)).shape  # class token and patches
        torch.Size([8, 5, 64])
    """

    def __init__(self, width: int, patch_size: int, image_size: int) -> None:
        super().__init__()
        self.patch_size = patch_size
        self.conv1 = nn.Conv2d(3, width, kernel_size=patch_size, stride=patch_size, bias=False)
        tokens = (image_size // patch_size) ** 2 + 1
        self.class_embedding = nn.Parameter(width**-0.5 * torch.randn(width))
        self.positional_embedding = nn.Parameter(width**-0.5 * torch.randn(tokens, width))
        self.ln_pre = nn.LayerNorm(width)

    def forward(self, frames: Tensor) -> Tensor:
        """Normalised frames (F, 3, H, W) to tokens (F, 1 + N, D)."""
        height, width = frames.shape[-2:]
        if height % self.patch_size or width % self.patch_size or not height or not width:
            raise ValueError(
                f"height and width of the frames must be multiples of {self.patch_size}, found {height}x{width}"
            )
        return embed_patches(frames, self.conv1, self.class_embedding, self.positional_embedding, self.ln_pre)


class MessageAttention(nn.Module):
    """Cross-frame attention over one message token per frame.

    Example:
        >>> import torch
        >>> from xclip_fast.reference import MessageAttention
        >>> MessageAttention(64, heads=1)(torch.randn(2, 8, 64)).shape  # (B, T, D)
        torch.Size([2, 8, 64])
    """

    attention: type[SelfAttention] = SelfAttention

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.message_fc = nn.Linear(width, width)
        self.message_ln = nn.LayerNorm(width)
        self.message_attn = self.attention(width, heads)

    def forward(self, class_tokens: Tensor) -> Tensor:
        """Class tokens (B, T, D), not normalised, to messages (B, T, D)."""
        return communicate(class_tokens, self.message_fc, self.message_ln, self.message_attn)


class FrameAttention(nn.Module):
    """Intra-frame attention of a frame's tokens over themselves and the frame's message, with the residual.

    Example:
        >>> import torch
        >>> from xclip_fast.reference import FrameAttention
        >>> FrameAttention(64, heads=1)(torch.randn(2, 8, 5, 64), torch.randn(2, 8, 64)).shape  # (B, T, S, D)
        torch.Size([2, 8, 5, 64])
    """

    attention: type[SelfAttention] = SelfAttention

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.ln_1 = nn.LayerNorm(width)
        self.attn = self.attention(width, heads)

    def forward(self, tokens: Tensor, message: Tensor) -> Tensor:
        """Tokens (B, T, S, D) and messages (B, T, D) to tokens (B, T, S, D)."""
        return attend_within_frame(tokens, message, self.ln_1, self.attn)


class CrossFrameBlock(nn.Module):
    """One block: CFA, IFA, MLP. The checkpoint's flat names keep the three parts in one module.

    Example:
        >>> import torch
        >>> from xclip_fast.reference import CrossFrameBlock
        >>> CrossFrameBlock(64, heads=1)(torch.randn(2, 8, 5, 64)).shape  # (B, T, S, D)
        torch.Size([2, 8, 5, 64])
    """

    attention: type[SelfAttention] = SelfAttention

    def __init__(self, width: int, heads: int, mlp_width: int | None = None, activation: str = "quick_gelu") -> None:
        super().__init__()
        self.message_fc = nn.Linear(width, width)
        self.message_ln = nn.LayerNorm(width)
        self.message_attn = self.attention(width, heads)
        self.attn = self.attention(width, heads)
        self.ln_1 = nn.LayerNorm(width)
        self.mlp = mlp(width, mlp_width or 4 * width, activation)
        self.ln_2 = nn.LayerNorm(width)

    def forward(self, tokens: Tensor) -> Tensor:
        """Tokens (B, T, S, D), the class token first in each frame, to tokens of the same shape."""
        message = communicate(tokens[:, :, 0], self.message_fc, self.message_ln, self.message_attn)
        tokens = attend_within_frame(tokens, message, self.ln_1, self.attn)
        return tokens + self.mlp(self.ln_2(tokens))


class CrossFrameTransformer(nn.Module):
    """The stack of cross-frame blocks; tokens are (B, T, S, D)."""

    block: type[CrossFrameBlock] = CrossFrameBlock

    def __init__(self, width: int, layers: int, heads: int, mlp_width: int, activation: str) -> None:
        super().__init__()
        self.resblocks = nn.ModuleList(self.block(width, heads, mlp_width, activation) for _ in range(layers))

    def forward(self, tokens: Tensor) -> Tensor:
        for block in self.resblocks:
            tokens = block(tokens)
        return tokens


class VisionTower(PatchEmbed):
    """Patch embedding, cross-frame blocks and the projection of the class token.

    It extends PatchEmbed because the checkpoint keeps both in one flat namespace, ``visual``.

    Example:
        >>> import torch
        >>> from xclip_fast.reference import VisionTower
        >>> tower = VisionTower(64, patch_size=16, image_size=32, layers=2, heads=1, mlp_width=256, embed_dim=32)
        >>> features, patches = tower(torch.randn(2, 8, 3, 32, 32))
        >>> features.shape, patches.shape
        (torch.Size([2, 8, 32]), torch.Size([2, 8, 4, 64]))
    """

    blocks: type[CrossFrameTransformer] = CrossFrameTransformer

    def __init__(
        self,
        width: int,
        patch_size: int,
        image_size: int,
        layers: int,
        heads: int,
        mlp_width: int,
        embed_dim: int,
        activation: str = "quick_gelu",
    ) -> None:
        super().__init__(width, patch_size, image_size)
        self.transformer = self.blocks(width, layers, heads, mlp_width, activation)
        self.ln_post = nn.LayerNorm(width)
        self.proj = nn.Parameter(width**-0.5 * torch.randn(width, embed_dim))

    def forward(self, video: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        """Normalised video (B, T, 3, H, W) to frame features (B, T, E) and patch tokens (B, T, N, D)."""
        tokens = self.transformer(self.embed(video))
        return self.ln_post(tokens[:, :, 0]) @ self.proj, tokens[:, :, 1:]

    def embed(self, video: Tensor) -> Tensor:
        """Normalised video (B, T, 3, H, W) to the tokens of its frames (B, T, S, D)."""
        return PatchEmbed.forward(self, video.flatten(0, 1)).unflatten(0, video.shape[:2])
