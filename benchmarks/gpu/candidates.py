"""The tiles that the sweep tries: eight at most for a function and shape, none of which spills on sm_90."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from xclip_fast.bench.cases import Load
from xclip_fast.kernels import (
    clip_logits,
    frame_attention,
    frame_attention_bwd,
    layer_norm,
    linear_quick_gelu,
    message_attention,
    prompt_attention,
    skinny_linear,
)
from xclip_fast.tuning import Tunable

MOST = 8


class Choice(NamedTuple):
    """A function that gives a launcher its tiles, and others to put in its place.

    Attributes:
        op: the op whose call reaches it.
        module, function: where the launcher looks it up.
        candidates: what it could return for this load.
        backward: the launch is one of the backward pass.
    """

    op: str
    module: Any
    function: str
    candidates: Callable[[Load], list[Any]]
    backward: bool = False

    @property
    def tunable(self) -> Tunable:
        """The function itself."""
        found: Tunable = getattr(self.module, self.function)
        return found


def _products(load: Load) -> list[Any]:
    sizes = [(128, 128, 64, 8, 3), (128, 128, 64, 8, 4), (256, 64, 64, 8, 3), (64, 128, 32, 4, 4)]
    sizes += [(64, 128, 64, 4, 4), (64, 256, 64, 8, 3), (128, 64, 64, 4, 4), (128, 128, 32, 8, 4)]
    return [linear_quick_gelu.Tiling(*size) for size in sizes]


def _plans(load: Load, sizes: list[tuple[int, int, int, int]]) -> list[Any]:
    tokens = load.config.patches + 1
    # short frames cut several of them alike
    return list(dict.fromkeys(frame_attention.plan(tokens, *size) for size in sizes))


def _frames(load: Load) -> list[Any]:
    sizes = [(64, 64, 4, 2), (128, 64, 8, 3), (128, 64, 8, 2), (64, 64, 4, 3)]
    sizes += [(128, 64, 4, 2), (64, 32, 4, 3), (128, 128, 8, 2), (64, 128, 4, 2)]
    if load.config.patches + 1 in frame_attention.KEPT_TOKENS:
        # behind the default's, in place of what comes last
        sizes[1:] = [(64, 0, 4, 2), (64, 0, 4, 1), *sizes[1:-2]]
    return _plans(load, sizes)


def _query_gradients(load: Load) -> list[Any]:
    sizes = [(64, 64, 4, 2), (64, 64, 8, 2), (64, 64, 4, 3), (64, 32, 4, 2)]
    return _plans(load, [*sizes, (128, 64, 8, 2), (128, 32, 8, 2), (32, 64, 4, 2), (128, 64, 8, 3)])


def _key_gradients(load: Load) -> list[Any]:
    sizes = [(32, 64, 4, 2), (32, 64, 4, 3), (32, 64, 8, 2), (64, 64, 8, 2)]
    return _plans(load, [*sizes, (64, 64, 4, 2), (32, 128, 8, 2), (64, 32, 4, 2), (32, 32, 4, 3)])


def _prompts(load: Load) -> list[Any]:
    sizes = [(64, 64, 4, 3), (64, 64, 4, 2), (64, 32, 4, 2), (32, 64, 4, 2), (128, 64, 8, 2), (16, 64, 2, 2)]
    return [prompt_attention.Tiling(*size) for size in sizes]


def _prompt_gradients(load: Load) -> list[Any]:
    sizes = [(64, 32, 4, 2), (64, 32, 4, 3), (64, 64, 8, 2), (32, 32, 4, 2), (32, 64, 4, 2), (64, 32, 8, 2)]
    return [prompt_attention.Tiling(*size) for size in sizes]


def _rows(load: Load) -> list[Any]:
    _, columns = layer_norm.block_shape(load.config.vision_width)
    return [(rows, columns) for rows in (4, 1, 2, 8)]


def _classes(load: Load) -> list[Any]:
    default = clip_logits.blocks.default(load.config.embed_dim)
    return [default._replace(classes=classes) for classes in (4, 1, 2, 8, 16)]


def _class_gradients(load: Load) -> list[Any]:
    return _classes(load)[:4]


def _skinny(load: Load) -> list[Any]:
    sizes = [(16, 32, 128, 4, 4), (16, 32, 128, 4, 3), (16, 64, 128, 4, 3), (16, 32, 256, 4, 2)]
    sizes += [(16, 16, 128, 4, 4), (32, 32, 128, 4, 4), (64, 32, 64, 4, 4), (16, 64, 64, 4, 4)]
    return [skinny_linear.Tile(*size) for size in sizes]


def _messages(load: Load) -> list[Any]:
    default = message_attention.fused_tile.default(load.config.frames, 64, 2)
    steps = [(default.depth, default.warps, stages) for stages in (3, 2, 4)]
    steps += [(depth, warps, 3) for depth in (32, 64) for warps in (4, 8)]
    made = [default._replace(depth=depth, warps=warps, stages=stages) for depth, warps, stages in steps]
    return list(dict.fromkeys(made))


def _long_clips(load: Load) -> list[Any]:
    default = message_attention.long_tile.default(64, 2)
    steps = [(64, 4, 2), (16, 2, 2), (16, 4, 2), (32, 4, 2), (64, 8, 2), (64, 4, 3)]
    return [default._replace(frames=frames, warps=warps, stages=stages) for frames, warps, stages in steps]


CHOICES = [
    Choice("linear_quick_gelu", linear_quick_gelu, "tiling", _products),
    Choice("frame_attention", frame_attention, "forward_plan", _frames),
    Choice("layer_norm", layer_norm, "forward_block_shape", _rows),
    Choice("message_key_value", skinny_linear, "tile", _skinny),
    Choice("message_attention", message_attention, "fused_tile", _messages),
    Choice("message_attention", message_attention, "long_tile", _long_clips),
    Choice("prompt_attention", prompt_attention, "tiling", _prompts),
    Choice("clip_logits", clip_logits, "blocks", _classes),
    Choice("frame_attention", frame_attention_bwd, "query_gradient_plan", _query_gradients, backward=True),
    Choice("frame_attention", frame_attention_bwd, "key_gradient_plan", _key_gradients, backward=True),
    Choice("layer_norm", layer_norm, "backward_block_shape", _rows, backward=True),
    Choice("prompt_attention", prompt_attention, "backward_tiling", _prompt_gradients, backward=True),
    Choice("clip_logits", clip_logits, "backward_blocks", _class_gradients, backward=True),
]
