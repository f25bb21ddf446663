"""The model users get: X-CLIP on the fused layers, and the entry point for random weights."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from xclip_fast import layers, reference
from xclip_fast.config import XCLIPConfig, resolve_config
from xclip_fast.ops import clip_logits, mean_norm_over_frames
from xclip_fast.plain import NORM, Plain, is_plain
from xclip_fast.reference import VideoFeatures
from xclip_fast.reference.model import check_video


class XCLIP(reference.XCLIP):
    """X-CLIP on the fused layers; the same surface and state dict as ``reference.XCLIP``, which documents them.

    Example:
        >>> import torch, xclip_fast
        >>> config = xclip_fast.XCLIPConfig(image_size=32, vision_width=64, text_width=64, vocab_size=514)
        >>> model = xclip_fast.model.XCLIP(config).eval()
        >>> features = model.encode_video(torch.zeros(1, 8, 32, 32, 3, dtype=torch.uint8))
        >>> features.video.shape, features.patches.shape
        (torch.Size([1, 512]), torch.Size([1, 1, 512]))
    """

    vision_tower = layers.VisionTower
    text_transformer = layers.TextTransformer
    integration = layers.MultiframeIntegration
    prompts = layers.VideoPrompts
    visual: layers.VisionTower
    prompts_generator: layers.VideoPrompts

    def encode_video(self, video: Tensor) -> VideoFeatures:
        """Features of videos, as ``reference.XCLIP.encode_video``; patches are averaged before their projection."""
        check_video(video)
        # bytes enter the first GEMM as they are: its weights normalise them
        statistics = (
            {"mean": self.config.pixel_mean, "std": self.config.pixel_std} if video.dtype == torch.uint8 else {}
        )
        if is_plain(self, visual=_VISION_TOWER):
            frame_features, patches, pending = self.visual._advance(video, **statistics)
        else:
            (frame_features, patches), pending = self.visual(video, **statistics), None
        norm = self.prompts_visual_ln
        if is_plain(self, prompts_visual_ln=NORM):
            patches = mean_norm_over_frames(patches, norm.weight, norm.bias, residual=pending, eps=norm.eps)
        else:
            patches = norm(patches if pending is None else patches + pending).mean(dim=1)
        return VideoFeatures(self.mit(frame_features), patches @ self.prompts_visual_proj)

    def logits(self, features: VideoFeatures, text: Tensor) -> Tensor:
        """Scaled cosine similarities (B, K) of encoded videos and encoded texts (K, E)."""
        generator = self.prompts_generator
        if not is_plain(self, prompts_generator=_PROMPTS):
            return super().logits(features, text)
        prompts, pending = generator._advance(text, features.patches)
        return clip_logits(features.video, text, prompts, generator.alpha, self.logit_scale, residual=pending)

    def gradient_checkpointing_enable(self, gradient_checkpointing_kwargs: dict[str, Any] | None = None) -> None:
        """Keep no more than the input of each block of both towers for the backward pass, and compute it again there.

        Args:
            gradient_checkpointing_kwargs: options of ``torch.utils.checkpoint.checkpoint``; by default
                ``{"use_reentrant": False}``.
        """
        self._checkpoint({"use_reentrant": False} | (gradient_checkpointing_kwargs or {}))

    def gradient_checkpointing_disable(self) -> None:
        """Undo ``gradient_checkpointing_enable``."""
        self._checkpoint(None)

    @property
    def is_gradient_checkpointing(self) -> bool:
        """Whether ``gradient_checkpointing_enable`` is in force."""
        return any(getattr(module, "checkpointing", None) is not None for module in self.modules())

    def _checkpoint(self, options: dict[str, Any] | None) -> None:
        for module in self.modules():
            if isinstance(module, layers.CrossFrameTransformer | layers.TextTransformer):
                module.checkpointing = options


_VISION_TOWER = Plain(layers.VisionTower)
_PROMPTS = Plain(layers.VideoPrompts)


def create_model(variant_or_config: str | XCLIPConfig, *, frames: int | None = None, seed: int | None = None) -> XCLIP:
    """An X-CLIP model with random weights, in evaluation mode.

    Args:
        variant_or_config: "B/32", "B/16", "L/14", "L/14-336", or a configuration.
        frames: length of the temporal position table; by default 8, or what the configuration says.
        seed: makes the weights reproducible and leaves the global random state as it was.

    Raises:
        ValueError: no variant has this name, or ``frames`` is not a positive integer.

    Example:
        >>> import torch, xclip_fast
        >>> config = xclip_fast.XCLIPConfig(image_size=32, vision_width=64, text_width=64, vocab_size=514)
        >>> model = xclip_fast.create_model(config, seed=0)  # or a name: "B/16"
        >>> video = torch.zeros(1, 8, 32, 32, 3, dtype=torch.uint8)
        >>> model(video, torch.tensor([[512, 97, 513], [512, 98, 513]])).shape
        torch.Size([1, 2])
    """
    config = resolve_config(variant_or_config, frames)
    if seed is None:
        return XCLIP(config).eval()
    with torch.random.fork_rng(devices=[]):
        # torch.manual_seed would reseed every accelerator too
        torch.default_generator.manual_seed(seed)
        return XCLIP(config).eval()
