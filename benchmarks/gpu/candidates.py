"""The tiles that the sweep tries: eight at most for a kernel and shape, the default first; nothing else is searched."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from xclip_fast.bench.cases import Load
from xclip_fast.kernels import (
    clip_logits,
    frame_attention,
    layer_norm,
    linear_quick_gelu,
    message_attention,
    prompt_attention,
    skinny_linear,
)


class Tunable(NamedTuple):
    """A pure function of a launcher's module that gives the tiles, and others to put in its place.

    Attributes:
        op: the op whose call reaches it.
        module, function: where the launcher looks it up.
        candidates: what it could return for this load.
    """

    op: str
    module: Any
    function: str
    candidates: Callable[[Load], list[Any]]


def _products(load: Load) -> list[Any]:
    sizes = [(128, 128, 64, 8, 3), (128, 128, 64, 8, 4), (128, 128, 64, 4, 3), (128, 256, 64, 8, 3)]
    sizes += [(64, 128, 64, 4, 4), (64, 256, 64, 8, 3), (128, 64, 64, 4, 4), (128, 128, 32, 8, 4)]
    return [linear_quick_gelu.Tiling(*size) for size in sizes]


def _frames(load: Load) -> list[Any]:
    tokens = load.config.patches + 1
    sizes = [(128, 64, 8, 2), (128, 64, 8, 3), (64, 64, 4, 2), (64, 64, 4, 3)]
    sizes += [(128, 64, 4, 2), (64, 32, 4, 3), (128, 128, 8, 2), (64, 128, 4, 2)]
    made = [frame_attention.plan(tokens, queries, keys, warps, stages) for queries, keys, warps, stages in sizes]
    # short frames cut several of them alike
    return list(dict.fromkeys(made))


def _prompts(load: Load) -> list[Any]:
    sizes = [(64, 64, 4, 2), (64, 32, 4, 2), (32, 64, 4, 2), (64, 64, 4, 3), (128, 64, 8, 2), (16, 64, 2, 2)]
    return [prompt_attention.Tiling(*size) for size in sizes]


def _rows(load: Load) -> list[Any]:
    _, columns = layer_norm.block_shape(load.config.vision_width)
    return [(rows, columns) for rows in (1, 2, 4, 8)]


def _classes(load: Load) -> list[Any]:
    default = clip_logits.blocks(load.config.embed_dim)
    return [default._replace(classes=classes) for classes in (1, 2, 4, 8, 16)]


def _skinny(load: Load) -> list[Any]:
    sizes = [(16, 32, 128, 4, 4), (16, 32, 128, 4, 3), (16, 64, 128, 4, 3), (16, 32, 256, 4, 2)]
    sizes += [(16, 16, 128, 4, 4), (32, 32, 128, 4, 4), (64, 32, 64, 4, 4), (16, 64, 64, 4, 4)]
    return [skinny_linear.Tile(*size) for size in sizes]


def _messages(load: Load) -> list[Any]:
    default = message_attention.fused_tile(load.config.frames, 64, 2)
    steps = [(default.depth, default.warps, stages) for stages in (2, 3, 4)]
    steps += [(depth, warps, 3) for depth in (32, 64) for warps in (4, 8)]
    made = [default._replace(depth=depth, warps=warps, stages=stages) for depth, warps, stages in steps]
    return list(dict.fromkeys(made))


TUNABLE = [
    Tunable("linear_quick_gelu", linear_quick_gelu, "tiling", _products),
    Tunable("frame_attention", frame_attention, "forward_plan", _frames),
    Tunable("layer_norm", layer_norm, "block_shape", _rows),
    Tunable("prompt_attention", prompt_attention, "tiling", _prompts),
    Tunable("clip_logits", clip_logits, "blocks", _classes),
    Tunable("message_key_value", skinny_linear, "tile", _skinny),
    Tunable("message_attention", message_attention, "fused_tile", _messages),
]
MOST = 8
