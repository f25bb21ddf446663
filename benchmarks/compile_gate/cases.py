"""The launches of production: every variant, clip length and batch that changes what is compiled."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from benchmarks.compile_gate import calls
from benchmarks.compile_gate.capture import Launch, captured_launches
from xclip_fast.config import VARIANTS
from xclip_fast.kernels.frame_attention import KEPT_TOKENS
from xclip_fast.kernels.linear_quick_gelu import persistent_programs
from xclip_fast.ops.cases import OPS, Load, Sizes
from xclip_fast.ops.inputs import Draw

CLASSES = 400
FRAMES = (8, 16, 32)
# tiles depend on the rows: one video, enough of them to fill a GPU, more clips than one launch takes
BATCHES = (1, 8, 32)
MULTIPROCESSORS = 132  # of an H100 and an H200
# without memory: the compiler needs dtypes, alignment and strides
META = Draw(torch.bfloat16, "meta")


class Case(NamedTuple):
    """A shape of production, and the call of launchers it makes."""

    shape: str
    call: Callable[[], list[Tensor]]


def cases(draw: Draw = META) -> Iterator[Case]:
    """Every call of every shape; the first of several that compile to the same names it in the report."""
    for variant, config in VARIANTS.items():
        for frames in FRAMES:
            for batch in BATCHES:
                load = Load(replace(config, frames=frames), batch, CLASSES)
                yield from _model(draw, f"{variant} {frames}f x{batch}", load)


def _model(draw: Draw, shape: str, load: Load) -> Iterator[Case]:
    def sizes(op: str) -> Sizes:
        return OPS[op].in_model(load)

    config, images, tokens, wide = load.config, load.images, load.config.patches + 1, load.config.vision_width
    for part, rows, width in (
        ("vision", images * tokens, wide),
        ("temporal", images, config.embed_dim),
        ("prompts", load.batch * CLASSES, config.embed_dim),
    ):
        norm = partial(calls.layer_norm, draw, rows=rows, width=width)
        gemm = partial(calls.linear_quick_gelu, draw, rows=rows, width=width, hidden=4 * width)
        yield Case(f"{shape} {part}", norm)
        yield Case(f"{shape} {part} residual", partial(norm, residual=True))
        yield Case(f"{shape} {part}", partial(gemm, training=False))
        yield Case(f"{shape} {part} training", partial(gemm, training=True))
        for columns in {"vision": (width, 3 * width), "prompts": (width,)}.get(part, ()):
            yield Case(f"{shape} {part} gradient", partial(calls.column_sums, draw, rows=rows, width=columns))
        # on Hopper
        if programs := persistent_programs(rows, 4 * width, MULTIPROCESSORS):
            persistent = partial(calls.linear_quick_gelu_persistent, draw, rows, width, 4 * width, programs=programs)
            yield Case(f"{shape} {part} persistent", persistent)
            yield Case(f"{shape} {part} persistent training", partial(persistent, training=True))
    norm = partial(calls.layer_norm, draw, rows=images * tokens, width=wide)
    yield Case(f"{shape} constant", partial(norm, constant=True))
    yield Case(f"{shape} both", partial(norm, residual=True, constant=True))
    yield Case(f"{shape} autocast", partial(norm, norm_dtype=torch.float32))
    quantized = partial(calls.quantize_rows, draw, rows=images * tokens)
    for name, residual in (("norm", False), ("norm residual", True)):
        normed = partial(quantized, width=wide, norm=True, residual=residual, constant=True)
        yield Case(f"{shape} float8 {name}", normed)
    for width in (wide, 4 * wide):
        yield Case(f"{shape} float8 of {width}", partial(quantized, width=width))
    yield Case(f"{shape} float8 activation", partial(quantized, width=4 * wide, activation=config.activation))
    mean = partial(calls.mean_norm_over_frames, draw, **sizes("mean_norm_over_frames"))
    logits = partial(calls.clip_logits, draw, **sizes("clip_logits"))
    yield Case(f"{shape} constant", partial(mean, constant=True))
    for name, residual in ((shape, False), (f"{shape} residual", True)):
        yield Case(name, partial(mean, residual=residual))
        yield Case(name, partial(logits, residual=residual))
    yield Case(f"{shape} engine", partial(logits, residual=True, text_dtype=torch.float32))
    attention = partial(calls.frame_attention, draw, **sizes("frame_attention"))
    yield Case(shape, partial(attention, training=False))
    yield Case(f"{shape} training", partial(attention, training=True))
    if tokens in KEPT_TOKENS:
        # a GPU's table takes one of them
        for name, keys, stages in (("streamed", 64, 2), ("narrow", 32, 3), ("kept", 0, 2)):
            tile = {"rows": 64, "columns": keys, "num_warps": 4, "num_stages": stages}
            for training in (False, True):
                chosen = partial(attention, training=training, tile=tile)
                yield Case(f"{shape} keys {name}{' training' * training}", chosen)
    message = partial(calls.message_attention, draw, **sizes("message_attention"))
    block = partial(calls.temporal_block, draw, **sizes("temporal_block"))
    key_value = partial(calls.message_key_value, draw, **sizes("message_key_value"))
    for ragged in (False, True):
        name = f"{shape} ragged" if ragged else shape
        yield Case(name, partial(message, ragged=ragged))
        yield Case(name, key_value)
    yield Case(shape, block)
    yield Case(f"{shape} ragged", partial(block, ragged=True))
    yield Case(f"{shape} folded", partial(calls.folded_message, draw, **sizes("folded_message")))
    yield Case(f"{shape} whole", partial(block, whole=True))
    patches = partial(calls.patch_embed, draw, **sizes("patch_embed"))
    yield Case(f"{shape} bytes", patches)
    yield Case(f"{shape} floats", partial(patches, planes=True))
    prompts = partial(calls.prompt_attention, draw, **sizes("prompt_attention"))
    yield Case(shape, partial(prompts, shared=True))
    yield Case(shape, prompts)


def production_launches(part: str = "") -> list[tuple[str, Launch]]:
    """Shape and launch of every case whose shape contains ``part``."""
    found = []
    for case in cases():
        if part in case.shape:
            with captured_launches() as launches:
                case.call()
            found += [(case.shape, launch) for launch in launches]
    return found
