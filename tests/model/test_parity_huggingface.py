"""The reference equals the Hugging Face port at random weights, and so does the mapping of names between them."""

from __future__ import annotations

import pytest
import torch
from numerics import PUBLISHED, assert_within, randomise_parameters, relative_error
from torch import Tensor
from torch.nn.functional import normalize
from transformers import XCLIPConfig, XCLIPModel

from xclip_fast.checkpoints import load_model

VOCABULARY, CONTEXT = 100, 16
# image, patch; width, heads, layers of the vision tower; of the text tower; of MIT and prompts; frames
SHAPES = {
    "B/32-like": {"image": (96, 32), "vision": (192, 3, 3), "text": (128, 2, 2), "embed": (128, 2, 1), "frames": 8},
    "B/16-like, 3 frames": {
        "image": (64, 16),
        "vision": (128, 2, 2),
        "text": (64, 1, 1),
        "embed": (64, 1, 2),
        "frames": 3,
    },
    "L/14-like, 12 heads, 16 frames": {
        "image": (56, 14),
        "vision": (256, 4, 2),
        "text": (768, 12, 2),
        "embed": (768, 12, 1),
        "frames": 16,
    },
    "one frame, heads of 32": {
        "image": (32, 8),
        "vision": (96, 3, 2),
        "text": (64, 4, 2),
        "embed": (64, 2, 1),
        "frames": 1,
    },
}


def build(shape: dict) -> XCLIPModel:
    """A transformers model of these sizes with every parameter random."""
    (side, patch), (width, heads, layers), frames = shape["image"], shape["vision"], shape["frames"]
    text_width, text_heads, text_layers = shape["text"]
    embed, embed_heads, mit_layers = shape["embed"]
    config = XCLIPConfig(
        text_config={
            "vocab_size": VOCABULARY,
            "max_position_embeddings": CONTEXT,
            "hidden_size": text_width,
            "intermediate_size": 4 * text_width,
            "num_attention_heads": text_heads,
            "num_hidden_layers": text_layers,
        },
        vision_config={
            "image_size": side,
            "patch_size": patch,
            "hidden_size": width,
            "intermediate_size": 4 * width,
            "num_attention_heads": heads,
            "num_hidden_layers": layers,
            "mit_hidden_size": embed,
            "mit_intermediate_size": 4 * embed,
            "mit_num_attention_heads": embed_heads,
            "mit_num_hidden_layers": mit_layers,
            "num_frames": frames,
        },
        projection_dim=embed,
        prompt_num_attention_heads=embed_heads,
    )
    return randomise_parameters(XCLIPModel(config)).requires_grad_(False).eval()


def texts() -> Tensor:
    """Token ids of five texts of different lengths; the largest id ends a text."""
    ids = torch.zeros(5, CONTEXT, dtype=torch.int64)
    for row, length in enumerate((4, CONTEXT, 1, 7, 4)):
        ids[row, :length] = torch.randint(3, VOCABULARY - 1, (length,))
        ids[row, length - 1] = VOCABULARY - 1
    return ids


@pytest.mark.parametrize("name", SHAPES)
@torch.inference_mode()
def test_parity_with_transformers(name: str) -> None:
    theirs = build(SHAPES[name])
    ours = load_model(theirs)
    side = ours.config.image_size
    video, tokens = torch.randn(2, ours.config.frames, 3, side, side), texts()
    expected = theirs(input_ids=tokens, pixel_values=video)
    features, text = ours.encode_video(video), ours.encode_text(tokens)
    compare(f"transformers {name}", ours(video, tokens), expected.logits_per_video, "logits")
    compare(f"transformers {name}", normalize(features.video, dim=-1), expected.video_embeds, "video")
    compare(f"transformers {name}", text, theirs.get_text_features(tokens).pooler_output, "text")
    adapted = ours.prompts_generator(text.expand(2, -1, -1), features.patches)
    compare(f"transformers {name}", normalize(adapted, dim=-1), expected.text_embeds, "adapted text")


@torch.inference_mode()
def test_parity_with_transformers_at_another_resolution() -> None:
    theirs = build(SHAPES["B/16-like, 3 frames"])
    ours = load_model(theirs)
    video, tokens = torch.randn(2, 3, 3, 48, 80), texts()
    expected = theirs(input_ids=tokens, pixel_values=video, interpolate_pos_encoding=True)
    compare("transformers, 48x80 frames", ours(video, tokens), expected.logits_per_video, "logits")


# block 1: the first block's messages are all equal, so its keys and queries have no effect
@pytest.mark.parametrize("part", ["layers.1.message_attn.k_proj.weight", "mit.position_embedding", "generator.alpha"])
@torch.inference_mode()
def test_transformers_outputs_notice_one_changed_weight(part: str) -> None:
    theirs = build(SHAPES["B/16-like, 3 frames"])
    ours = load_model(theirs)
    video, tokens = torch.randn(2, 3, 3, 64, 64), texts()
    changed = [parameter for name, parameter in theirs.named_parameters() if name.endswith(part)]
    changed[0].view(-1)[:8] += 0.1
    expected = theirs(input_ids=tokens, pixel_values=video)
    assert relative_error(ours(video, tokens), expected.logits_per_video) > 2 * PUBLISHED


def compare(case: str, actual: Tensor, expected: Tensor, output: str) -> None:
    assert_within(actual, expected, PUBLISHED, what=f"{case}: {output}")
