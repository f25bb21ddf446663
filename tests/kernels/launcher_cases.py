"""Every launcher at sizes the interpreter is quick with: chosen ones with several programs, and random ones."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from random import Random
from typing import Any

import torch

from benchmarks.compile_gate import calls

KEPT = {"rows": 64, "columns": 0, "num_warps": 4, "num_stages": 2}  # of frame attention: a program keeps all keys

# each is called with a factory of inputs, and returns its outputs
CASES: dict[str, Callable[..., Any]] = {
    "layer_norm": partial(calls.layer_norm, rows=9, width=40),
    "layer_norm residual": partial(calls.layer_norm, rows=9, width=40, residual=True),
    "layer_norm both": partial(calls.layer_norm, rows=6, width=33, residual=True, constant=True),
    "layer_norm constant, autocast": partial(
        calls.layer_norm, rows=5, width=64, constant=True, norm_dtype=torch.float32
    ),
    "layer_norm wide": partial(calls.layer_norm, rows=3, width=1025),
    "quantize_rows": partial(calls.quantize_rows, rows=9, width=40),
    "quantize_rows norm": partial(calls.quantize_rows, rows=6, width=33, norm=True),
    "quantize_rows constant": partial(calls.quantize_rows, rows=5, width=64, norm=True, constant=True),
    "quantize_rows residual": partial(calls.quantize_rows, rows=9, width=40, norm=True, residual=True),
    "quantize_rows both": partial(calls.quantize_rows, rows=6, width=33, norm=True, residual=True, constant=True),
    "quantize_rows activation": partial(calls.quantize_rows, rows=9, width=40, activation="quick_gelu"),
    "quantize_rows wide": partial(calls.quantize_rows, rows=3, width=1025, activation="gelu"),
    "linear_quick_gelu": partial(calls.linear_quick_gelu, rows=70, width=40, hidden=72, training=False),
    "linear_quick_gelu training": partial(calls.linear_quick_gelu, rows=33, width=24, hidden=66, training=True),
    "linear_quick_gelu tiles": partial(calls.linear_quick_gelu, rows=64, width=64, hidden=128, training=True),
    # several tiles a program, one fewer for the last; ends inside of tiles
    "linear_quick_gelu_persistent": partial(
        calls.linear_quick_gelu_persistent, rows=261, width=72, hidden=264, programs=4, dtype=torch.float16
    ),
    "linear_quick_gelu_persistent one": partial(
        calls.linear_quick_gelu_persistent, rows=1, width=8, hidden=8, programs=3, dtype=torch.float16
    ),
    "linear_quick_gelu_persistent tiles": partial(
        calls.linear_quick_gelu_persistent, rows=384, width=64, hidden=256, programs=5, dtype=torch.float16
    ),
    "mean_norm_over_frames": partial(calls.mean_norm_over_frames, batch=2, frames=3, patches=5, width=40),
    "mean_norm_over_frames one": partial(calls.mean_norm_over_frames, batch=3, frames=1, patches=2, width=33),
    "mean_norm_over_frames residual": partial(
        calls.mean_norm_over_frames, batch=2, frames=2, patches=3, width=40, residual=True
    ),
    # more frames than a tile of such a width holds
    "mean_norm_over_frames constant": partial(
        calls.mean_norm_over_frames, batch=2, frames=5, patches=2, width=1040, constant=True
    ),
    "clip_logits residual": partial(calls.clip_logits, batch=2, classes=5, width=33, residual=True),
    "clip_logits": partial(calls.clip_logits, batch=2, classes=7, width=40),
    "clip_logits engine": partial(
        calls.clip_logits, batch=2, classes=5, width=40, residual=True, text_dtype=torch.float32
    ),
    "clip_logits wide": partial(calls.clip_logits, batch=3, classes=2, width=1030),
    "patch_embed bytes": partial(calls.patch_embed, frames=2, grid=3, patch=4, width=40, pixels=torch.uint8),
    "patch_embed floats": partial(calls.patch_embed, frames=3, grid=1, patch=5, width=70),
    "prompt_attention": partial(
        calls.prompt_attention, batch=2, classes=35, patches=37, width=64, heads=2, shared=False
    ),
    "prompt_attention shared": partial(
        calls.prompt_attention, batch=2, classes=5, patches=9, width=64, heads=1, shared=True
    ),
    "frame_attention": partial(calls.frame_attention, frames=2, tokens=66, heads=2, head_dim=32, training=True),
    "frame_attention one": partial(calls.frame_attention, frames=2, tokens=1, heads=1, head_dim=32, training=True),
    "frame_attention tail": partial(calls.frame_attention, frames=2, tokens=17, heads=1, head_dim=64, training=False),
    "frame_attention head": partial(
        calls.frame_attention,
        frames=2,
        tokens=65,
        heads=2,
        training=True,
        tile=KEPT,
        dtype=torch.float16,
    ),
    "message_attention": partial(calls.message_attention, clips=2, frames=3, heads=2, head_dim=32),
    "message_attention ragged": partial(calls.message_attention, clips=2, frames=5, heads=1, head_dim=32, ragged=True),
    # more clips than one launch takes, rows few enough for the skinny product
    "message_attention long": partial(calls.message_attention, clips=20, frames=2, heads=1, head_dim=32),
    "message_attention long ragged": partial(
        calls.message_attention, clips=2, frames=66, heads=1, head_dim=32, ragged=True
    ),
    "folded_message": partial(calls.folded_message, clips=2, frames=3, heads=2, head_dim=32),
    "folded_message long": partial(calls.folded_message, clips=2, frames=66, heads=1, head_dim=32),
    "temporal_block": partial(calls.temporal_block, clips=2, frames=9, heads=1, head_dim=32),
    "temporal_block whole": partial(calls.temporal_block, clips=3, frames=8, heads=1, head_dim=32, whole=True),
    "temporal_block whole, odd": partial(calls.temporal_block, clips=2, frames=5, heads=1, head_dim=32, whole=True),
}


def random_cases(launcher: str, count: int, longest: int) -> Iterator[Callable[..., Any]]:
    """Calls of a launcher with random sizes up to ``longest``, the same ones in every run."""
    draw = Random(launcher)

    def size(least: int = 1) -> int:
        # as many small sizes as large ones
        return min(longest, int(least * (longest / least) ** draw.random()))

    def flag() -> bool:
        return draw.random() < 0.5

    for _ in range(count):
        attention = {"heads": draw.choice([1, 2]), "head_dim": draw.choice([32, 64])}
        sizes: dict[str, dict[str, Any]] = {
            "layer_norm": {"rows": size(), "width": size(), "residual": flag(), "constant": flag()},
            "quantize_rows": draw.choice(
                [
                    {"norm": True, "residual": flag(), "constant": flag()},
                    {"activation": draw.choice(["silu", "quick_gelu", "gelu"])},
                    {},
                ]
            )
            | {"rows": size(), "width": size()},
            "linear_quick_gelu": {"rows": size(), "width": size(), "hidden": size(), "training": flag()},
            "linear_quick_gelu_persistent": {
                "rows": size(),
                "width": -(-size() // 8) * 8,
                "hidden": -(-size() // 8) * 8,
                "programs": draw.randint(1, 132),
            },
            "mean_norm_over_frames": {
                "batch": draw.randint(1, 3),
                "frames": draw.randint(1, 5),
                "patches": size(),
                "width": size(),
                "residual": flag(),
                "constant": flag(),
            },
            "clip_logits": {
                "batch": draw.randint(1, 4),
                "classes": size(),
                "width": size(),
                "residual": flag(),
            },
            "patch_embed": {
                "frames": draw.randint(1, 3),
                "grid": draw.randint(1, 4),
                "patch": draw.randint(1, 9),
                "width": size(),
                "pixels": torch.uint8 if flag() else None,
            },
            "prompt_attention": {
                "batch": draw.randint(1, 2),
                "classes": size(),
                "patches": size(),
                "width": 32 * attention["heads"],
                "heads": attention["heads"],
                "shared": flag(),
            },
            "frame_attention": {"frames": draw.randint(1, 2), "tokens": size(), "training": flag(), **attention},
            "message_attention": {"clips": draw.randint(1, 4), "frames": size(), "ragged": flag(), **attention},
            "folded_message": {"clips": draw.randint(1, 4), "frames": size(), **attention},
            "temporal_block": {"clips": draw.randint(1, 3), "frames": size(), "ragged": flag(), **attention},
        }
        yield partial(getattr(calls, launcher), **sizes[launcher])


LAUNCHERS = sorted({name.split()[0] for name in CASES})
