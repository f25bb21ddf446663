"""The launches of production: every variant, clip length and batch that changes what is compiled."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from benchmarks.compile_gate import calls
from benchmarks.compile_gate.capture import Launch, captured_launches
from xclip_fast.config import VARIANTS, XCLIPConfig
from xclip_fast.kernels.frame_attention import KEPT_TOKENS
from xclip_fast.kernels.linear_quick_gelu import tiles

CLASSES = 400
FRAMES = (8, 16, 32)
# tiles depend on the rows: one video, enough of them to fill a GPU, more clips than one launch takes
BATCHES = (1, 8, 32)
MULTIPROCESSORS = 132  # of an H100 and an H200


class Case(NamedTuple):
    """A shape of production, and the call of launchers it makes."""

    shape: str
    call: Callable[[], list[Tensor]]


def make(*shape: int, dtype: torch.dtype | None = None) -> Tensor:
    """A bfloat16 tensor without memory: the compiler needs its dtype, alignment and strides."""
    return torch.empty(shape, dtype=dtype or torch.bfloat16, device="meta")


def cases() -> Iterator[Case]:
    """Every call of every shape; the first of several that compile to the same names it in the report."""
    for variant, config in VARIANTS.items():
        for frames in FRAMES:
            for batch in BATCHES:
                yield from _model(f"{variant} {frames}f x{batch}", config, frames, batch)


def _model(shape: str, config: XCLIPConfig, frames: int, batch: int) -> Iterator[Case]:
    images, tokens, wide, narrow = batch * frames, config.patches + 1, config.vision_width, config.embed_dim
    for part, rows, width in (
        ("vision", images * tokens, wide),
        ("temporal", images, narrow),
        ("prompts", batch * CLASSES, narrow),
    ):
        norm = partial(calls.layer_norm, make, rows, width)
        product = partial(calls.linear_quick_gelu, make, rows, width, 4 * width)
        yield Case(f"{shape} {part}", norm)
        yield Case(f"{shape} {part} residual", partial(norm, residual=True))
        yield Case(f"{shape} {part}", partial(product, training=False))
        yield Case(f"{shape} {part} training", partial(product, training=True))
        # on Hopper, where every program has a tile
        if tiles(rows, 4 * width) >= MULTIPROCESSORS:
            persistent = partial(calls.linear_quick_gelu_persistent, make, rows, width, 4 * width)
            yield Case(f"{shape} {part} persistent", partial(persistent, programs=MULTIPROCESSORS))
    norm = partial(calls.layer_norm, make, images * tokens, wide)
    yield Case(f"{shape} constant", partial(norm, constant=True))
    yield Case(f"{shape} both", partial(norm, residual=True, constant=True))
    yield Case(f"{shape} autocast", partial(norm, norm_dtype=torch.float32))
    quantized = partial(calls.quantize_rows, make, images * tokens)
    for name, residual in (("norm", False), ("norm residual", True)):
        yield Case(f"{shape} float8 {name}", partial(quantized, wide, norm=True, residual=residual, constant=True))
    for width in (wide, 4 * wide):
        yield Case(f"{shape} float8 of {width}", partial(quantized, width))
    yield Case(f"{shape} float8 activation", partial(quantized, 4 * wide, activation=config.activation))
    mean = partial(calls.mean_norm_over_frames, make, batch, frames, config.patches, wide)
    yield Case(f"{shape} constant", partial(mean, constant=True))
    for name, residual in ((shape, False), (f"{shape} residual", True)):
        yield Case(name, partial(mean, residual=residual))
        yield Case(name, partial(calls.clip_logits, make, batch, CLASSES, narrow, residual=residual))
    logits = partial(calls.clip_logits, make, batch, CLASSES, narrow, residual=True)
    yield Case(f"{shape} engine", partial(logits, text_dtype=torch.float32))
    attention = partial(calls.frame_attention, make, images, tokens, config.vision_heads)
    yield Case(shape, partial(attention, training=False))
    yield Case(f"{shape} training", partial(attention, training=True))
    if tokens in KEPT_TOKENS:
        # a GPU's table takes one or the other
        for name, keys in (("streamed", 64), ("kept", 0)):
            tile = {"rows": 64, "columns": keys, "num_warps": 4, "num_stages": 2}
            for training in (False, True):
                chosen = partial(attention, training=training, tile=tile)
                yield Case(f"{shape} keys {name}{' training' * training}", chosen)
    for call, heads in ((calls.message_attention, config.vision_heads), (calls.temporal_block, config.embed_heads)):
        for ragged in (False, True):
            name = f"{shape} ragged" if ragged else shape
            yield Case(name, partial(call, make, batch, frames, heads, ragged=ragged))
    yield Case(f"{shape} folded", partial(calls.folded_message, make, batch, frames, config.vision_heads))
    yield Case(f"{shape} whole", partial(calls.temporal_block, make, batch, frames, config.embed_heads, whole=True))
    side = config.image_size // config.patch_size
    patches = partial(calls.patch_embed, make, images, side, config.patch_size, wide)
    yield Case(f"{shape} bytes", partial(patches, pixels=torch.uint8))
    yield Case(f"{shape} floats", patches)
    prompts = partial(calls.prompt_attention, make, batch, CLASSES, config.patches, narrow, config.embed_heads)
    yield Case(shape, partial(prompts, shared=True))
    yield Case(shape, partial(prompts, shared=False))


def production_launches(part: str = "") -> list[tuple[str, Launch]]:
    """Shape and launch of every case whose shape contains ``part``."""
    found = []
    for case in cases():
        if part in case.shape:
            with captured_launches() as launches:
                case.call()
            found += [(case.shape, launch) for launch in launches]
    return found
