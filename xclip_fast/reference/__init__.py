"""The oracle: X-CLIP in plain PyTorch, unfused, with the official attribute names.

Read it to learn what the fast paths compute, and compare against it to learn whether they do.
Nothing here imports the ops or the kernels.
"""

from xclip_fast.reference.mit import MultiframeIntegration
from xclip_fast.reference.model import XCLIP, VideoFeatures
from xclip_fast.reference.prompts import VideoPrompts
from xclip_fast.reference.vision import (
    CrossFrameBlock,
    FrameAttention,
    MessageAttention,
    PatchEmbed,
    VisionTower,
)

__all__ = [
    "XCLIP",
    "CrossFrameBlock",
    "FrameAttention",
    "MessageAttention",
    "MultiframeIntegration",
    "PatchEmbed",
    "VideoFeatures",
    "VideoPrompts",
    "VisionTower",
]
