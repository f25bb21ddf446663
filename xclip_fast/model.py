"""The model users get: X-CLIP on the fused layers, and the entry point for random weights."""

from __future__ import annotations

import torch
from torch import Tensor

from xclip_fast import layers, reference
from xclip_fast.config import XCLIPConfig, resolve_config
from xclip_fast.ops import clip_logits, mean_norm_over_frames
from xclip_fast.reference import VideoFeatures
from xclip_fast.reference.model import check_video


class XCLIP(reference.XCLIP):
    """X-CLIP on the fused layers; the same surface and state dict as ``reference.XCLIP``, which documents them."""

    vision_tower = layers.VisionTower
    text_transformer = layers.TextTransformer
    integration = layers.MultiframeIntegration
    prompts = layers.VideoPrompts
    prompts_generator: layers.VideoPrompts

    def encode_video(self, video: Tensor) -> VideoFeatures:
        """Features of videos, as ``reference.XCLIP.encode_video``; patches are averaged before their projection."""
        check_video(video)
        # bytes reach the first product as they are, which normalises them
        statistics = (
            {"mean": self.config.pixel_mean, "std": self.config.pixel_std} if video.dtype == torch.uint8 else {}
        )
        frame_features, patches, branch = self.visual(video, **statistics, closed=False)
        norm = self.prompts_visual_ln
        patches = mean_norm_over_frames(patches, norm.weight, norm.bias, residual=branch, eps=norm.eps)
        return VideoFeatures(self.mit(frame_features), patches @ self.prompts_visual_proj)

    def logits(self, features: VideoFeatures, text: Tensor) -> Tensor:
        """Scaled cosine similarities (B, K) of encoded videos and encoded texts (K, E)."""
        generator = self.prompts_generator
        prompts, branch = generator.prompt(text, features.patches)
        return clip_logits(features.video, text, prompts, generator.alpha, self.logit_scale, residual=branch)


def create_model(variant_or_config: str | XCLIPConfig, *, frames: int | None = None, seed: int | None = None) -> XCLIP:
    """An X-CLIP model with random weights, in evaluation mode.

    Args:
        variant_or_config: "B/32", "B/16", "L/14", "L/14-336", or a configuration.
        frames: length of the temporal position table; by default 8, or what the configuration says.
        seed: makes the weights reproducible and leaves the global random state as it was.

    Raises:
        ValueError: no variant has this name, or ``frames`` is not a positive integer.
    """
    config = resolve_config(variant_or_config, frames)
    if seed is None:
        return XCLIP(config).eval()
    with torch.random.fork_rng(devices=[]):
        # torch.manual_seed would reseed every accelerator too
        torch.default_generator.manual_seed(seed)
        return XCLIP(config).eval()
