"""The fused operations, each in a file of its own: contract, reference, torch formulation, registration."""

from xclip_fast.ops._backends import BACKENDS, backend, explain
from xclip_fast.ops.clip_logits import clip_logits
from xclip_fast.ops.frame_attention import frame_attention
from xclip_fast.ops.layer_norm import layer_norm
from xclip_fast.ops.linear_quick_gelu import feed_forward, linear_quick_gelu
from xclip_fast.ops.mean_norm_over_frames import mean_norm_over_frames
from xclip_fast.ops.message_attention import message_attention, message_key_value
from xclip_fast.ops.patch_embed import patch_embed
from xclip_fast.ops.prompt_attention import prompt_attention
from xclip_fast.ops.temporal_block import temporal_block

__all__ = [
    "BACKENDS",
    "backend",
    "clip_logits",
    "explain",
    "feed_forward",
    "frame_attention",
    "layer_norm",
    "linear_quick_gelu",
    "mean_norm_over_frames",
    "message_attention",
    "message_key_value",
    "patch_embed",
    "prompt_attention",
    "temporal_block",
]
