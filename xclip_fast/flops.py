"""What X-CLIP costs, by arithmetic: multiply-accumulates of each part, and parameters.

The paper's "GFLOPs" are multiply-accumulates (MACs) of GEMMs, one text of 77 tokens included; a FLOP counter
finds twice as many operations. Both are given. Norms, activations, softmax and additions are not counted, as there.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal, NamedTuple

from xclip_fast.config import VARIANTS, XCLIPConfig, resolve_config

Formulation = Literal["official", "fused"]

LONGEST_LABEL = 10  # tokens of the longest label of Kinetics-400, start and end of text included


@dataclass(frozen=True)
class Count:
    """The cost of one video against one set of classes.

    Attributes:
        parts: multiply-accumulates of each part: ``patch_embed``; ``cfa`` (messages and their attention);
            ``ifa_projections`` and ``ifa_attention``; ``mlp``; ``projection`` (class and patch tokens to the embedding
            width); ``mit``; ``prompts``; ``logits``; and ``text``, which is spent once per class set.
        parameters: numbers in the model.
        rewrites: multiply-accumulates that each exact rewrite saves; empty for the official formulation.

    Example:
        >>> from xclip_fast.flops import count
        >>> cost = count("B/16", frames=8)
        >>> cost.flops == 2 * cost.macs == 2 * sum(cost.parts.values())
        True
    """

    parts: dict[str, int]
    parameters: int
    rewrites: dict[str, int] = field(default_factory=dict)

    @property
    def macs(self) -> int:
        """Multiply-accumulates: the paper's "FLOPs"."""
        return sum(self.parts.values())

    @property
    def flops(self) -> int:
        """Floating point operations: a multiply-accumulate is two."""
        return 2 * self.macs


def count(
    variant_or_config: str | XCLIPConfig,
    frames: int | None = None,
    classes: int = 1,
    views: int = 1,
    text_length: int | None = None,
    formulation: Formulation = "official",
) -> Count:
    """The cost of classifying one video.

    Args:
        variant_or_config: a name such as "B/32", or a configuration.
        frames: frames of a view; by default those of the configuration.
        classes: texts. None (0) asks for the video's embedding alone.
        views: clips times crops; they multiply everything but the text.
        text_length: tokens of a text; by default the whole context (official) or that of Kinetics-400's longest label
            (fused).
        formulation: "official" is what the official modules execute, "fused" what is left of it after exact rewrites.

    Raises:
        ValueError: an argument is out of range.

    Example:
        >>> from xclip_fast.flops import count
        >>> [round(count("B/32", 8, formulation=name).macs / 1e9, 2) for name in ("official", "fused")]
        [39.01, 36.12]
    """
    config = resolve_config(variant_or_config, frames)
    if formulation not in ("official", "fused"):
        raise ValueError(f"formulation must be official or fused, found {formulation!r}")
    if text_length is None:
        text_length = config.context_length if formulation == "official" else min(LONGEST_LABEL, config.context_length)
    if classes < 0 or views < 1 or not 1 <= text_length <= config.context_length:
        raise ValueError(
            f"classes must be at least 0, views at least 1 and text_length in 1..{config.context_length}, "
            f"found {classes}, {views} and {text_length}"
        )
    if formulation == "official":
        return Count(_official(config, classes, views, text_length), parameters(config))
    parts = _official(config, classes, views, config.context_length)
    rewrites = {}
    for name, savings in _savings(config, classes, views, text_length).items():
        rewrites[name] = sum(savings.values())
        for part, saved in savings.items():
            parts[part] -= saved
    return Count(parts, parameters(config), rewrites)


def _official(config: XCLIPConfig, classes: int, views: int, text_length: int) -> dict[str, int]:
    width, embed, layers = config.vision_width, config.embed_dim, config.vision_layers
    frames, patches = config.frames, config.patches
    # the message is one more token of its frame in IFA, and gone before the MLP
    tokens = patches + 1
    video = {
        "patch_embed": frames * patches * 3 * config.patch_size**2 * width,
        "cfa": layers * _message(config),
        "ifa_projections": layers * frames * (tokens + 1) * 4 * width**2,
        "ifa_attention": layers * frames * 2 * (tokens + 1) ** 2 * width,
        "mlp": layers * frames * tokens * 2 * width * config.vision_mlp_width,
        "projection": frames * (1 + patches) * width * embed,
        "mit": config.mit_layers * _block(frames, embed),
        "prompts": config.prompt_layers * _prompt(config, classes),
        "logits": classes * embed,
    }
    return {part: views * macs for part, macs in video.items()} | {"text": classes * _text(config, text_length)}


def _message(config: XCLIPConfig) -> int:
    """Message projection and cross-frame attention of one block."""
    width, frames = config.vision_width, config.frames
    return frames * 5 * width**2 + 2 * frames**2 * width


def _block(tokens: int, width: int) -> int:
    """A transformer block: query, key, value, output, both GEMMs of attention, an MLP four times as wide."""
    return tokens * 12 * width**2 + 2 * tokens**2 * width


def _prompt(config: XCLIPConfig, classes: int) -> int:
    """A prompt layer: query, output and MLP for each text, key and value for each patch, attention between them."""
    if classes == 0:
        return 0
    embed, patches = config.embed_dim, config.patches
    return classes * 10 * embed**2 + patches * 2 * embed**2 + 2 * classes * patches * embed


def _text(config: XCLIPConfig, text_length: int) -> int:
    return config.text_layers * _block(text_length, config.text_width) + config.text_width * config.embed_dim


def _savings(config: XCLIPConfig, classes: int, views: int, text_length: int) -> dict[str, dict[str, int]]:
    """What each exact rewrite takes from which part."""
    width, embed, layers = config.vision_width, config.embed_dim, config.vision_layers
    patches, tokens = config.patches, config.patches + 1
    frames = views * config.frames
    shorter = classes * (_text(config, config.context_length) - _text(config, text_length))
    savings = {
        "messages have no query in IFA": {
            "ifa_projections": layers * frames * 2 * width**2,
            "ifa_attention": layers * frames * 2 * (tokens + 1) * width,
        },
        "messages of the first block are constants": {
            "cfa": views * _message(config),
            "ifa_projections": frames * 2 * width**2,
        },
    }
    if classes:
        return savings | {
            "patches are averaged before their projection": {"projection": (frames - views) * patches * width * embed},
            "texts end at the longest end of text": {"text": shorter},
            "first prompt queries belong to the class set": {
                "prompts": views * classes * embed**2,
                "text": -classes * embed**2,
            },
        }
    others = frames * (tokens - 1)
    return savings | {
        "patches are not projected without prompts": {"projection": frames * patches * width * embed},
        "the last block computes the class row alone": {
            "ifa_projections": others * 2 * width**2,
            "ifa_attention": others * 2 * (tokens + 1) * width,
            "mlp": others * 2 * width * config.vision_mlp_width,
        },
    }


def parameters(variant_or_config: str | XCLIPConfig, frames: int | None = None) -> int:
    """Numbers in a model, the positions of ``frames`` frames included.

    Example:
        >>> from xclip_fast.flops import parameters
        >>> round(parameters("B/32") / 1e6, 1)
        196.6
    """
    return sum(parameter_parts(variant_or_config, frames).values())


def parameter_parts(variant_or_config: str | XCLIPConfig, frames: int | None = None) -> dict[str, int]:
    """Parameters by part; the names are those of ``Count.parts``, with all of IFA in ``ifa_projections``."""
    config = resolve_config(variant_or_config, frames)
    width, hidden, embed, text = config.vision_width, config.vision_mlp_width, config.embed_dim, config.text_width
    attention = 4 * width**2 + 4 * width
    norm = 2 * width
    return {
        "patch_embed": (3 * config.patch_size**2 + config.patches + 2) * width + norm,
        "cfa": config.vision_layers * (width**2 + width + norm + attention),
        "ifa_projections": config.vision_layers * (norm + attention),
        "mlp": config.vision_layers * (norm + 2 * width * hidden + hidden + width),
        "projection": 2 * (norm + width * embed),
        "mit": config.frames * embed + config.mit_layers * _block_parameters(embed),
        "prompts": config.prompt_layers * (12 * embed**2 + 10 * embed) + 3 * embed,
        "logits": 1,
        "text": (config.vocab_size + config.context_length + 2 + embed) * text
        + config.text_layers * _block_parameters(text),
    }


def _block_parameters(width: int) -> int:
    return 12 * width**2 + 13 * width


class HeadlineRow(NamedTuple):
    """One published figure and what the arithmetic gives.

    what: model, frames, or a ratio to another model of the paper's table.
    published, official, fused: GMACs of a view, or a ratio; of the official formulation and after the exact rewrites.
    why: where the difference comes from.
    """

    what: str
    published: float
    official: float
    fused: float
    why: str


_ROUNDED = "published as a whole number"
_SOFTMAX = "softmax is not counted here; five operations for each of its elements would make it "
_PUBLISHED = [
    ("B/32", 8, 39, _ROUNDED),
    ("B/32", 16, 75, _ROUNDED),
    ("B/16", 8, 145, _ROUNDED),
    ("B/16", 16, 287, _ROUNDED),
    ("B/16", 32, 571, _SOFTMAX + "571.0"),
    ("L/14", 8, 658, "published is less than the official modules execute; how it was counted is not said"),
    ("L/14-336", 16, 3086, _SOFTMAX + "3085.6"),
]
_RATIOS = [
    ("ViViT-H", 8316, 12, "8316 / 658 = 12.6, published as 12"),
    ("MTV-H", 3706, 5, "3706 / 658 = 5.6, published as 5"),
]


def headline() -> list[HeadlineRow]:
    """The published figures, recomputed: GMACs of one view with one text, and the ratios the paper draws from them.

    The ratios are those of L/14 with 8 frames; both sides run 4 clips of 3 crops, so they hold for a view and for all.

    Example:
        >>> from xclip_fast.flops import headline
        >>> row = headline()[0]
        >>> row.what, row.published, round(row.official, 2)
        ('X-CLIP-B/32, 8 frames', 39, 39.01)
    """
    rows = [
        HeadlineRow(f"X-CLIP-{name}, {frames} frames", published, *_giga_macs(name, frames), why)
        for name, frames, published, why in _PUBLISHED
    ]
    official, fused = _giga_macs("L/14", 8)
    for name, macs, published, why in _RATIOS:
        rows.append(HeadlineRow(f"{name} / X-CLIP-L/14, 8 frames", published, macs / official, macs / fused, why))
    return rows


def _giga_macs(variant: str, frames: int) -> tuple[float, float]:
    config = VARIANTS[variant]
    return count(config, frames).macs / 1e9, count(config, frames, formulation="fused").macs / 1e9
