"""Sizes of small models that several tests share."""

from __future__ import annotations

from xclip_fast.config import XCLIPConfig

# no two steps of the model have a special case in common, and no pixel statistic is the default
SMALL = XCLIPConfig(
    image_size=32,
    patch_size=8,
    vision_width=128,
    vision_layers=3,
    embed_dim=128,
    context_length=20,
    vocab_size=64,
    text_width=64,
    text_layers=2,
    frames=4,
    mit_layers=2,
    pixel_mean=(0.4, 0.5, 0.6),
    pixel_std=(0.2, 0.25, 0.3),
)
# takes the tokens of the byte tokenizer, which needs no vocabulary file
LABELS = XCLIPConfig(
    image_size=32,
    patch_size=16,
    vision_width=64,
    vision_layers=1,
    embed_dim=64,
    text_width=64,
    text_layers=1,
    vocab_size=514,
    frames=2,
)
