"""Every launcher at sizes the interpreter is quick with: those of the registry, what ops never ask for, random ones."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from random import Random
from typing import Any

import torch

from benchmarks.compile_gate import calls
from xclip_fast.ops.cases import OPS

KEPT = {"rows": 64, "columns": 0, "num_warps": 4, "num_stages": 2}  # of frame attention: a program keeps all keys
HALF = torch.float16  # what the kernels take that need tensor cores

# each is called with a draw, and returns its outputs
CASES: dict[str, Callable[..., Any]] = {
    f"{op} {name}": partial(getattr(calls, op), **sizes)
    for op, case in OPS.items()
    if hasattr(calls, op)
    for name, sizes in case.small.items()
} | {
    "layer_norm autocast": partial(calls.layer_norm, rows=5, width=64, constant=True, norm_dtype=torch.float32),
    "linear_quick_gelu inference": partial(calls.linear_quick_gelu, rows=70, width=40, hidden=72, training=False),
    # parts, the last of fewer rows, and none
    "column_sums parts": partial(calls.column_sums, rows=261, width=200),
    # several tiles a program, one fewer for the last; ends inside of tiles
    "linear_quick_gelu_persistent": partial(
        calls.linear_quick_gelu_persistent, rows=261, width=72, hidden=264, programs=4, dtype=HALF
    ),
    "linear_quick_gelu_persistent one": partial(
        calls.linear_quick_gelu_persistent, rows=1, width=8, hidden=8, programs=3, dtype=HALF
    ),
    "linear_quick_gelu_persistent tiles": partial(
        calls.linear_quick_gelu_persistent, rows=384, width=64, hidden=256, programs=5, dtype=HALF
    ),
    "linear_quick_gelu_persistent training": partial(
        calls.linear_quick_gelu_persistent, rows=300, width=64, hidden=200, programs=3, training=True, dtype=HALF
    ),
    "clip_logits engine": partial(
        calls.clip_logits, batch=2, classes=5, width=40, residual=True, text_dtype=torch.float32
    ),
    "frame_attention inference": partial(calls.frame_attention, frames=2, tokens=17, width=64, heads=1, training=False),
    "frame_attention head": partial(
        calls.frame_attention, frames=2, tokens=65, width=128, heads=2, tile=KEPT, dtype=HALF
    ),
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
        heads = draw.choice([1, 2])
        attention = {"heads": heads, "width": heads * draw.choice([32, 64])}
        side, patch = draw.randint(1, 4), draw.randint(1, 9)
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
            "column_sums": {"rows": size(), "width": size()},
            "linear_quick_gelu_persistent": {
                "rows": size(),
                "width": -(-size() // 8) * 8,
                "hidden": -(-size() // 8) * 8,
                "programs": draw.randint(1, 264),
                "training": flag(),
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
                "image": side * patch,
                "patch": patch,
                "width": size(),
                "planes": flag(),
            },
            "prompt_attention": {
                "batch": draw.randint(1, 2),
                "classes": size(),
                "patches": size(),
                "width": 32 * heads,
                "heads": heads,
                "shared": flag(),
            },
            "frame_attention": {"frames": draw.randint(1, 2), "tokens": size(), "training": flag(), **attention},
            "message_attention": {"batch": draw.randint(1, 4), "frames": size(), "ragged": flag(), **attention},
            "message_key_value": {"frames": size(), "width": size()},
            "folded_message": {"batch": draw.randint(1, 4), "frames": size(), **attention},
            "temporal_block": {"batch": draw.randint(1, 3), "frames": size(), "ragged": flag(), **attention},
        }
        yield partial(getattr(calls, launcher), **sizes[launcher])


LAUNCHERS = sorted({name.split()[0] for name in CASES})
