"""The registry: for every op the shape a model gives it, how often, and the awkward shapes it is tried at.

Verification, benchmarks, the sweep of tiles, the compile gate, the sanitizers and the tests read it. The names are
those of ``xclip_fast.ops``, where the functions are taken from, and of the two ops that only the engine calls.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from xclip_fast.config import VARIANTS, XCLIPConfig, resolve_config
from xclip_fast.errors import InputError
from xclip_fast.numerics import TOLERANCES
from xclip_fast.ops import inputs
from xclip_fast.ops.inputs import Draw, Inputs

Sizes = Mapping[str, Any]

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

    make: its arguments by name, from a draw and sizes.
    in_model: the sizes that a model gives it.
    times: calls in one forward pass.
    small: name of the case to sizes that find faults: odd ones, single rows, ragged clips, all that a kernel can skip.
    conditioning: by how much outlier channels, in front of a norm or a cosine, lift what the dtype may err at most.
    coarse: what a result may err in any dtype: the rounding of its own format, or long sums in float32.
    trained: whether it has a backward pass; the ops of the engine have none.
    """

    make: Callable[..., Inputs]
    in_model: Callable[[Load], Sizes]
    times: Callable[[XCLIPConfig], int]
    small: dict[str, Sizes]
    conditioning: float = 1.0
    coarse: float = 0.0
    trained: bool = True

    def arguments(self, draw: Draw, load: Load) -> Inputs:
        """The arguments that a model gives it."""
        return self.make(draw, **self.in_model(load))

    def example(self, draw: Draw, name: str) -> Inputs:
        """The arguments of a small case."""
        return self.make(draw, **self.small[name])

    def ceiling(self, dtype: torch.dtype) -> float:
        """What a result may err at most."""
        return max(TOLERANCES[dtype].ceiling * self.conditioning, self.coarse)


def _layers(config: XCLIPConfig) -> int:
    return config.vision_layers


def _once(config: XCLIPConfig) -> int:
    return 1


def _mlp(load: Load) -> Sizes:
    return {"rows": load.tokens, "width": load.config.vision_width, "hidden": load.config.vision_mlp_width}


def _clips(load: Load) -> Sizes:
    return {
        "batch": load.batch,
        "frames": load.config.frames,
        "width": load.config.vision_width,
        "heads": load.config.vision_heads,
    }


OPS: dict[str, OpCase] = {
    "patch_embed": OpCase(
        inputs.patch_embed,
        lambda load: {
            "frames": load.images,
            "image": load.config.image_size,
            "patch": load.config.patch_size,
            "width": load.config.vision_width,
        },
        _once,
        {
            "patches of 4": {"frames": 2, "image": 12, "patch": 4, "width": 24},
            "patches of 16": {"frames": 2, "image": 32, "patch": 16, "width": 40},
            "one patch of 14": {"frames": 1, "image": 14, "patch": 14, "width": 64},
            "planes": {"frames": 3, "image": 5, "patch": 5, "width": 70, "planes": True},
        },
        conditioning=8.0,
    ),
    "layer_norm": OpCase(
        inputs.layer_norm,
        lambda load: {"rows": load.tokens, "width": load.config.vision_width, "residual": True},
        lambda config: 2 * config.vision_layers,
        {
            "odd width": {"rows": 9, "width": 33, "residual": True},
            "one row": {"rows": 1, "width": 768, "residual": True},
            "mean far from zero": {"rows": 5, "width": 769, "residual": True, "mean": 30.0},
            "no residual": {"rows": 6, "width": 128},
            "constant": {"rows": 5, "width": 64, "constant": True},
            "both": {"rows": 6, "width": 33, "residual": True, "constant": True},
            "wide": {"rows": 3, "width": 1025},
        },
        conditioning=8.0,
    ),
    "linear_quick_gelu": OpCase(
        inputs.linear_quick_gelu,
        _mlp,
        _layers,
        {
            "odd sizes": {"rows": 33, "width": 40, "hidden": 66},
            "one row": {"rows": 1, "width": 64, "hidden": 128},
            "several tiles": {"rows": 130, "width": 64, "hidden": 144},
            "whole tiles": {"rows": 64, "width": 64, "hidden": 128},
        },
    ),
    "feed_forward": OpCase(
        inputs.feed_forward,
        _mlp,
        _layers,
        {
            "odd sizes": {"rows": 33, "width": 40, "hidden": 66},
            "one row": {"rows": 1, "width": 64, "hidden": 128},
            "several tiles": {"rows": 130, "width": 64, "hidden": 144},
        },
        # a GPU adds up the thousands of terms of its second sum one after another. That errs 0.29 sqrt(n) units (see
        # numerics.sum_error), 9.6e-7 of 3072 terms, and twice as much is allowed; PyTorch errs 1.3e-6 on an H100
        coarse=2e-6,
    ),
    "mean_norm_over_frames": OpCase(
        inputs.mean_norm_over_frames,
        lambda load: {
            "batch": load.batch,
            "frames": load.config.frames,
            "patches": load.config.patches,
            "width": load.config.vision_width,
        },
        _once,
        {
            "odd sizes": {"batch": 2, "frames": 3, "patches": 5, "width": 40},
            "one frame": {"batch": 3, "frames": 1, "patches": 2, "width": 65},
            "residual": {"batch": 2, "frames": 2, "patches": 3, "width": 40, "residual": True},
            # more frames than a tile of such a width holds
            "constant": {"batch": 2, "frames": 5, "patches": 2, "width": 1040, "constant": True},
        },
        conditioning=8.0,
    ),
    "clip_logits": OpCase(
        inputs.clip_logits,
        lambda load: {"batch": load.batch, "classes": load.classes, "width": load.config.embed_dim},
        _once,
        {
            "odd sizes": {"batch": 3, "classes": 7, "width": 40},
            "one class": {"batch": 5, "classes": 1, "width": 512},
            "residual": {"batch": 3, "classes": 5, "width": 33, "residual": True},
            "wide": {"batch": 3, "classes": 2, "width": 1030},
        },
        conditioning=8.0,
    ),
    "prompt_attention": OpCase(
        inputs.prompt_attention,
        lambda load: {
            "batch": load.batch,
            "classes": load.classes,
            "patches": load.config.patches,
            "width": load.config.embed_dim,
            "heads": load.config.embed_heads,
        },
        lambda config: config.prompt_layers,
        {
            "several tiles": {"batch": 2, "classes": 35, "patches": 37, "width": 64, "heads": 2},
            "one class": {"batch": 1, "classes": 1, "patches": 40, "width": 64, "heads": 1},
            "shared": {"batch": 2, "classes": 5, "patches": 9, "width": 64, "heads": 1, "shared": True},
        },
    ),
    "frame_attention": OpCase(
        inputs.frame_attention,
        lambda load: {
            "frames": load.images,
            "tokens": load.config.patches + 1,
            "width": load.config.vision_width,
            "heads": load.config.vision_heads,
        },
        _layers,
        {
            "B/32": {"frames": 2, "tokens": 50, "width": 64, "heads": 1},
            "one token": {"frames": 2, "tokens": 1, "width": 64, "heads": 2},
            "whole tiles and a tail": {"frames": 1, "tokens": 66, "width": 128, "heads": 2},
        },
    ),
    "message_attention": OpCase(
        inputs.message_attention,
        _clips,
        _layers,
        {
            "8 frames": {"batch": 2, "frames": 8, "width": 64, "heads": 1},
            "one frame": {"batch": 3, "frames": 1, "width": 64, "heads": 2},
            "ragged clips": {"batch": 3, "frames": 5, "width": 64, "heads": 1, "ragged": True},
            # more than one launch takes, of rows few enough for the skinny GEMM
            "many clips": {"batch": 20, "frames": 2, "width": 32, "heads": 1},
            "long clips": {"batch": 1, "frames": 66, "width": 32, "heads": 1},
            "long ragged clips": {"batch": 2, "frames": 66, "width": 32, "heads": 1, "ragged": True},
        },
        conditioning=8.0,
    ),
    "message_key_value": OpCase(
        inputs.message_key_value,
        lambda load: {"frames": load.images, "width": load.config.vision_width},
        _layers,
        {
            "odd sizes": {"frames": 7, "width": 40},
            "many frames": {"frames": 130, "width": 64},
        },
        conditioning=8.0,
    ),
    "temporal_block": OpCase(
        inputs.temporal_block,
        lambda load: {
            "batch": load.batch,
            "frames": load.config.frames,
            "width": load.config.embed_dim,
            "heads": load.config.embed_heads,
        },
        lambda config: config.mit_layers,
        {
            "9 frames": {"batch": 2, "frames": 9, "width": 64, "heads": 1},
            "one frame": {"batch": 2, "frames": 1, "width": 64, "heads": 2},
            "whole": {"batch": 3, "frames": 8, "width": 32, "heads": 1, "whole": True},
            "whole, 5 frames": {"batch": 2, "frames": 5, "width": 32, "heads": 1, "whole": True},
        },
        conditioning=8.0,
    ),
    "folded_message": OpCase(
        inputs.folded_message,
        _clips,
        _layers,
        {
            "3 frames": {"batch": 2, "frames": 3, "width": 64, "heads": 2},
            "long clips": {"batch": 1, "frames": 66, "width": 32, "heads": 1},
        },
        conditioning=8.0,
        trained=False,
    ),
    "quantize_rows": OpCase(
        inputs.quantize_rows,
        lambda load: {"rows": load.tokens, "width": load.config.vision_width, "norm": True, "residual": True},
        lambda config: 4 * config.vision_layers,
        {
            "rows": {"rows": 9, "width": 40},
            "norm": {"rows": 6, "width": 33, "norm": True},
            "constant": {"rows": 5, "width": 64, "norm": True, "constant": True},
            "residual": {"rows": 9, "width": 40, "norm": True, "residual": True},
            "both": {"rows": 6, "width": 33, "norm": True, "residual": True, "constant": True},
            "activation": {"rows": 9, "width": 40, "activation": "quick_gelu"},
            "wide": {"rows": 3, "width": 1025, "activation": "gelu"},
        },
        # the largest of a row errs by half a step of e4m3, 16 of 448
        coarse=0.04,
        trained=False,
    ),
}

TRAINED = [name for name, case in OPS.items() if case.trained]
IN_EXTENSION = ("frame_attention", "patch_embed")  # ops that the compiled extension serves too


def find_op(name: str) -> Callable[..., Any]:
    """The function of an op.

    Raises:
        InputError: there is no such op in the registry.
        ImportError: this installation lacks it.
    """
    if name not in OPS:
        raise InputError(f"unknown op {name!r}: choose one of {', '.join(OPS)}")
    if name == "quantize_rows":
        # explain knows the op when it is imported
        from xclip_fast.ops import _quantize_rows  # noqa: F401

        return _dequantized
    if not OPS[name].trained:
        from xclip_fast.ops._folded_message import folded_message

        return folded_message
    from xclip_fast import ops

    if not hasattr(ops, name):
        raise ImportError(f"this installation has no {name}")
    found: Callable[..., Any] = getattr(ops, name)
    return found


def _dequantized(**arguments: Any) -> tuple[Tensor, Tensor]:
    """``quantize_rows`` as it can be compared: rows times scale, in float64 the rows before they are quantised."""
    from xclip_fast.ops._quantize_rows import activate, quantize_rows
    from xclip_fast.ops.layer_norm import layer_norm_ref

    quantized, scale, stream = quantize_rows(**arguments)
    x, activation = arguments["x"], arguments.get("activation")
    if x.dtype != torch.float64:
        return quantized.float() * scale, stream
    if "weight" in arguments:
        added = arguments.get("residual"), arguments.get("constant")
        x, _ = layer_norm_ref(x, arguments["weight"], arguments["bias"], *added, arguments.get("eps", 1e-5))
    return x if activation is None else activate(x.clone(), activation), stream
