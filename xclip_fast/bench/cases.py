"""The registry: for every op the shape a model gives it, how often, and the awkward shapes it is verified at.

The names are those of ``xclip_fast.ops``, which is where the functions are taken from: an op that an installation lacks
is listed, and said to be missing.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

from xclip_fast.bench import inputs
from xclip_fast.bench.inputs import Draw, Inputs
from xclip_fast.config import VARIANTS, XCLIPConfig, resolve_config
from xclip_fast.errors import InputError

Make = Callable[[Draw], Inputs]

# sizes to try a command with, and to test it: everything a model has, in a blink
TINY = XCLIPConfig(
    image_size=32,
    patch_size=16,
    vision_width=64,
    vision_layers=2,
    embed_dim=64,
    text_width=64,
    text_layers=1,
    context_length=8,
    vocab_size=64,
    frames=4,
)
SIZES = VARIANTS | {"tiny": TINY}


def config_of(variant: str, frames: int | None = None) -> XCLIPConfig:
    """The sizes of a variant, or of "tiny", which is no published model.

    Raises:
        InputError: there is no such variant.
    """
    if variant not in SIZES:
        raise InputError(f"unknown variant {variant!r}: choose one of {', '.join(SIZES)}")
    return resolve_config(SIZES[variant], frames)


class Load(NamedTuple):
    """What a model is given: sizes, videos in the batch, class texts."""

    config: XCLIPConfig
    batch: int
    classes: int

    @property
    def images(self) -> int:
        """Frames in the batch."""
        return self.batch * self.config.frames

    @property
    def tokens(self) -> int:
        """Rows of all frames."""
        return self.images * (self.config.patches + 1)


class OpCase(NamedTuple):
    """One op.

    in_model: the arguments that a model gives it.
    times: calls in one forward pass.
    small: name of the case to arguments that find faults: odd sizes, single rows, ragged clips.
    conditioning: by how much outlier channels, in front of a norm or a cosine, lift what the dtype may err at most.
    """

    in_model: Callable[[Draw, Load], Inputs]
    times: Callable[[XCLIPConfig], int]
    small: dict[str, Make]
    conditioning: float = 1.0


def _layers(config: XCLIPConfig) -> int:
    return config.vision_layers


def _once(config: XCLIPConfig) -> int:
    return 1


OPS: dict[str, OpCase] = {
    "patch_embed": OpCase(
        lambda draw, load: inputs.patch_embed(
            draw, load.images, load.config.image_size, load.config.patch_size, load.config.vision_width
        ),
        _once,
        {
            "patches of 4": partial(inputs.patch_embed, frames=2, image=8, patch=4, width=24),
            "patches of 16": partial(inputs.patch_embed, frames=2, image=32, patch=16, width=40),
            "one patch of 14": partial(inputs.patch_embed, frames=1, image=14, patch=14, width=64),
        },
        conditioning=8.0,
    ),
    "layer_norm": OpCase(
        lambda draw, load: inputs.layer_norm(draw, load.tokens, load.config.vision_width),
        lambda config: 2 * config.vision_layers,
        {
            "odd width": partial(inputs.layer_norm, rows=9, width=33),
            "one row": partial(inputs.layer_norm, rows=1, width=768),
            "mean far from zero": partial(inputs.layer_norm, rows=5, width=769, mean=30.0),
            "no residual": partial(inputs.layer_norm, rows=6, width=128, residual=False),
        },
        conditioning=8.0,
    ),
    "linear_quick_gelu": OpCase(
        lambda draw, load: inputs.linear_quick_gelu(
            draw, load.tokens, load.config.vision_width, load.config.vision_mlp_width
        ),
        _layers,
        {
            "odd sizes": partial(inputs.linear_quick_gelu, rows=33, width=40, hidden=66),
            "one row": partial(inputs.linear_quick_gelu, rows=1, width=64, hidden=128),
            "several tiles": partial(inputs.linear_quick_gelu, rows=130, width=64, hidden=144),
        },
    ),
    "mean_norm_over_frames": OpCase(
        lambda draw, load: inputs.mean_norm_over_frames(
            draw, load.batch, load.config.frames, load.config.patches, load.config.vision_width
        ),
        _once,
        {
            "odd sizes": partial(inputs.mean_norm_over_frames, batch=2, frames=3, patches=5, width=40),
            "one frame": partial(inputs.mean_norm_over_frames, batch=3, frames=1, patches=2, width=65),
        },
        conditioning=8.0,
    ),
    "clip_logits": OpCase(
        lambda draw, load: inputs.clip_logits(draw, load.batch, load.classes, load.config.embed_dim),
        _once,
        {
            "odd sizes": partial(inputs.clip_logits, batch=3, classes=7, width=40),
            "one class": partial(inputs.clip_logits, batch=5, classes=1, width=512),
        },
        conditioning=8.0,
    ),
    "prompt_attention": OpCase(
        lambda draw, load: inputs.prompt_attention(
            draw, load.batch, load.classes, load.config.patches, load.config.embed_dim, load.config.embed_heads
        ),
        lambda config: config.prompt_layers,
        {
            "several tiles": partial(inputs.prompt_attention, batch=2, classes=35, patches=37, width=64, heads=2),
            "one class": partial(inputs.prompt_attention, batch=1, classes=1, patches=40, width=64, heads=1),
        },
    ),
    "frame_attention": OpCase(
        lambda draw, load: inputs.frame_attention(
            draw, load.images, load.config.patches + 1, load.config.vision_width, load.config.vision_heads
        ),
        _layers,
        {
            "B/32": partial(inputs.frame_attention, frames=2, tokens=50, width=64, heads=1),
            "one token": partial(inputs.frame_attention, frames=2, tokens=1, width=64, heads=2),
            "whole tiles and a tail": partial(inputs.frame_attention, frames=1, tokens=66, width=128, heads=2),
        },
    ),
    "message_attention": OpCase(
        lambda draw, load: inputs.message_attention(
            draw, load.batch, load.config.frames, load.config.vision_width, load.config.vision_heads
        ),
        _layers,
        {
            "8 frames": partial(inputs.message_attention, batch=2, frames=8, width=64, heads=1),
            "one frame": partial(inputs.message_attention, batch=3, frames=1, width=64, heads=2),
            "ragged clips": partial(inputs.message_attention, batch=3, frames=5, width=64, heads=1, ragged=True),
            "long clips": partial(inputs.message_attention, batch=1, frames=66, width=32, heads=1),
        },
        conditioning=8.0,
    ),
    "message_key_value": OpCase(
        lambda draw, load: inputs.message_key_value(draw, load.images, load.config.vision_width),
        _layers,
        {
            "odd sizes": partial(inputs.message_key_value, frames=7, width=40),
            "many frames": partial(inputs.message_key_value, frames=130, width=64),
        },
        conditioning=8.0,
    ),
    "temporal_block": OpCase(
        lambda draw, load: inputs.temporal_block(
            draw, load.batch, load.config.frames, load.config.embed_dim, load.config.embed_heads
        ),
        lambda config: config.mit_layers,
        {
            "9 frames": partial(inputs.temporal_block, batch=2, frames=9, width=64, heads=1),
            "one frame": partial(inputs.temporal_block, batch=2, frames=1, width=64, heads=2),
        },
        conditioning=8.0,
    ),
}

IN_EXTENSION = ("frame_attention", "patch_embed")  # ops that the compiled extension serves too


def find_op(name: str) -> Callable[..., Any]:
    """The public function of an op.

    Raises:
        InputError: there is no such op in the registry.
        ImportError: this installation lacks it.
    """
    if name not in OPS:
        raise InputError(f"unknown op {name!r}: choose one of {', '.join(OPS)}")
    from xclip_fast import ops

    if not hasattr(ops, name):
        raise ImportError(f"this installation has no {name}")
    found: Callable[..., Any] = getattr(ops, name)
    return found
