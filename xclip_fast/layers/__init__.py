"""X-CLIP's modules on the fused ops: the reference's constructors and state dicts, for training and inference.

Each class extends its reference and replaces the computation alone, so weights move between the two as they are. An op
reads the weights of a module's parts only where ``xclip_fast.plain`` finds nothing else there; otherwise the parts run.
"""

from xclip_fast.layers.mit import MultiframeIntegration
from xclip_fast.layers.prompts import PromptLayer, VideoPrompts
from xclip_fast.layers.transformer import Block, SelfAttention, TextTransformer
from xclip_fast.layers.vision import (
    DROP_PATH_UNITS,
    CrossFrameBlock,
    CrossFrameTransformer,
    FrameAttention,
    MessageAttention,
    PatchEmbed,
    VisionTower,
    drop_path,
)

__all__ = [
    "DROP_PATH_UNITS",
    "Block",
    "CrossFrameBlock",
    "CrossFrameTransformer",
    "FrameAttention",
    "MessageAttention",
    "MultiframeIntegration",
    "PatchEmbed",
    "PromptLayer",
    "SelfAttention",
    "TextTransformer",
    "VideoPrompts",
    "VisionTower",
    "drop_path",
]
