"""PART=questions: the measurements that decide what is worth building; each a few contenders, timed in turn.

1. ``products``: the rate of cuBLAS at the models' GEMMs, K = 768 and 1024, float8 with fast and with exact sums too.
2. ``fc1``: the GEMM with its activation in the epilogue against cuBLAS and a pass of its own.
3. ``ifa``: bytes a second of the attention within frames, beside that of a copy, against SDPA on joined keys.
4. ``side``: the engine with cross-frame attention on a stream of its own against the same on one stream.
5. ``sdpa``: PyTorch's attention backends at 198 and 258 keys.
6. ``patch``: patches of decoded bytes by the extension, by the Triton kernel and by PyTorch's operators.
7. ``norm``: bytes a second of the layer norm, with its residual, beside PyTorch's own.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks.gpu.journal import Journal, leave_if_lost
from benchmarks.gpu.quick import QuickDraw
from xclip_fast.bench.machine import Sensors, ceilings
from xclip_fast.bench.timing import alternate, noise_of, sampler, timing_of
from xclip_fast.config import XCLIPConfig
from xclip_fast.ops.cases import Load, config_of
from xclip_fast.ops.inputs import frame_attention, linear_quick_gelu
from xclip_fast.ops.inputs import layer_norm as layer_norm_inputs
from xclip_fast.ops.inputs import patch_embed as patch_inputs

Call = Callable[[], object]
Rows = list[dict[str, Any]]

BLOCKS, BLOCK = 7, 0.02
CEILINGS = "ceilings"
FLASH, CUDNN = SDPBackend.FLASH_ATTENTION, SDPBackend.CUDNN_ATTENTION


class Bench:
    """Where and how long to measure; a dry run does both as little as it can.

    Args:
        dry: on the CPU in float32, a block each.
        brief: on the GPU, a block each: for a driver that measures nothing.
    """

    def __init__(self, dry: bool, *, brief: bool = False) -> None:
        self.dry, self.device = dry, "cpu" if dry else "cuda"
        self.blocks, self.block = (1, 0.001) if dry or brief else (BLOCKS, BLOCK)
        self.draw = QuickDraw(torch.float32 if dry else torch.bfloat16, self.device)

    def load(self, variant: str, batch: int) -> Load:
        """The sizes of a case."""
        return Load(config_of(variant), batch, 400)

    def compare(self, calls: dict[str, Call], *, own_graph: bool = False) -> Rows:
        """A row a contender, the first being the baseline of all; one that cannot run says why."""
        rows: Rows = []
        sensors, count = Sensors(self.device), self.blocks
        base, baseline, noise = None, "", 0.0
        for name, call in calls.items():
            try:
                with torch.inference_mode():
                    call()
                    sample = sampler(call, self.device, self.block, graph=not (self.dry or own_graph))
                    if base is None:
                        base, baseline = sample, name
                        blocks = alternate(base, base, count, sensors)
                        noise = noise_of(blocks)
                    else:
                        blocks = alternate(base, sample, count, sensors)
            except RuntimeError as error:
                rows.append({"contender": name, "status": "failed", "reason": f"{type(error).__name__}: {error}"[:300]})
                continue
            timing = timing_of(blocks, baseline, noise, method="wall" if self.dry else "graph")
            rows.append({"contender": name, "status": "timed", **asdict(timing)})
        return rows


def products(bench: Bench, variant: str, batch: int) -> Rows:
    """One row a GEMM of a block, in TFLOP/s."""
    from xclip_fast.engine.linears import Float8Linear
    from xclip_fast.ops._quantize_rows import quantize_rows

    load = bench.load(variant, batch)
    width, rows = load.config.vision_width, load.tokens
    found: Rows = []
    for name, inner, outer in (
        ("qkv", width, 3 * width),
        ("out", width, width),
        ("fc1", width, 4 * width),
        ("fc2", 4 * width, width),
    ):
        x, weight, bias = bench.draw(rows, inner), bench.draw.weight(outer, inner), bench.draw(outer)
        stream = bench.draw(rows, outer)
        calls: dict[str, Call] = {f"{name} linear": partial(functional.linear, x, weight, bias)}
        if name in ("out", "fc2"):
            # as the engine adds to its residual stream; half of it, so that it stays finite over many calls
            calls[f"{name} addmm_"] = partial(stream.addmm_, x, weight.t(), beta=0.5)
        # a CPU has no float8, or one of other speeds
        for fast in () if bench.dry else (True, False):
            layer = Float8Linear(weight, bias, "silu", x.dtype, fast=fast)
            quantized, scale, _ = quantize_rows(x)
            calls[f"{name} float8, {'fast' if fast else 'exact'} sums"] = partial(layer.multiply, quantized, scale)
        for row in bench.compare(calls):
            found.append(
                row | {"m": rows, "n": outer, "k": inner} | _rate(row, 2 * rows * inner * outer, "tflops", 1e12)
            )
    return found


def fc1(bench: Bench, variant: str, batch: int) -> Rows:
    """cuBLAS with the engine's separate activation is the baseline; cuBLAS alone is what a fused kernel may cost."""
    from xclip_fast.ops import linear_quick_gelu as fused

    load = bench.load(variant, batch)
    config = load.config
    given = linear_quick_gelu(bench.draw, load.tokens, config.vision_width, config.vision_mlp_width)
    plain = partial(functional.linear, given["x"], given["weight"], given["bias"])
    calls: dict[str, Call] = {
        # the slope of QuickGELU is folded into the weights there
        "cublas and silu": lambda: functional.silu(plain(), inplace=True),
        "cublas alone": plain,
        "triton": partial(fused, **given, backend="torch" if bench.dry else "triton"),
    }
    flops = 2 * load.tokens * config.vision_width * config.vision_mlp_width
    return [row | _rate(row, flops, "tflops", 1e12) for row in bench.compare(calls)]


def ifa(bench: Bench, variant: str, batch: int, copy_gbs: float | None) -> Rows:
    """GB/s of what has to be moved once; ``of_copy`` is its share of the rate of a copy."""
    from xclip_fast.ops import frame_attention as fused

    load = bench.load(variant, batch)
    config = load.config
    given = frame_attention(bench.draw, load.images, config.patches + 1, config.vision_width, config.vision_heads)
    qkv, message_kv = given["qkv"], given["message_kv"]
    moved = (qkv.numel() * 4 // 3 + message_kv.numel()) * qkv.element_size()
    calls: dict[str, Call] = {f"{name} on joined keys": _joined(given, chosen) for name, chosen in _backends(bench)}
    calls["triton"] = partial(fused, **given, backend="torch" if bench.dry else "triton")
    rows = [row | _rate(row, moved, "gbs", 1e9) for row in bench.compare(calls)]
    for row in rows:
        if "gbs" in row and copy_gbs:
            row["of_copy"] = round(row["gbs"] / copy_gbs, 4)
    return rows


def _joined(given: dict[str, Any], chosen: SDPBackend | None) -> Call:
    """What a user of PyTorch writes: the message joined to the keys, then its attention."""
    heads = given["heads"]

    def call() -> Tensor:
        query, key, value = given["qkv"].chunk(3, -1)
        message_key, message_value = given["message_kv"].unsqueeze(1).chunk(2, -1)
        key, value = torch.cat([key, message_key], 1), torch.cat([value, message_value], 1)
        parts = (x.unflatten(-1, (heads, -1)).transpose(1, 2) for x in (query, key, value))
        with sdpa_kernel(chosen) if chosen is not None else nullcontext():
            return functional.scaled_dot_product_attention(*parts).transpose(1, 2).flatten(2)

    return call


def _backends(bench: Bench) -> list[tuple[str, SDPBackend | None]]:
    if bench.dry:
        return [("sdpa", None)]
    return [("flash", FLASH), *([("cudnn", CUDNN)] if torch.backends.cudnn.enabled else [])]


def sdpa(bench: Bench, variant: str, batch: int) -> Rows:
    """Attention alone, on keys and values that are joined already."""
    load = bench.load(variant, batch)
    config = load.config
    tokens, heads = config.patches + 1, config.vision_heads
    query = bench.draw(load.images, heads, tokens, 64)
    key, value = (bench.draw(load.images, heads, tokens + 1, 64) for _ in range(2))

    def call(chosen: SDPBackend | None) -> Tensor:
        with sdpa_kernel(chosen) if chosen is not None else nullcontext():
            return functional.scaled_dot_product_attention(query, key, value)

    flops = 4 * load.images * heads * tokens * (tokens + 1) * 64
    rows = bench.compare({name: partial(call, chosen) for name, chosen in _backends(bench)})
    return [row | {"keys": tokens + 1} | _rate(row, flops, "tflops", 1e12) for row in rows]


def side(bench: Bench, variant: str, batch: int) -> Rows:
    """One stream is the baseline: a ratio above 1 is what the second one gains."""
    from xclip_fast.engine import Engine
    from xclip_fast.engine.cuda import SideStream
    from xclip_fast.model import create_model

    config: XCLIPConfig = config_of(variant)
    model = create_model(config, seed=0).to(bench.device)
    dtype = torch.float32 if bench.dry else torch.bfloat16
    one, two = (Engine(model, dtype, bench.device) for _ in range(2))
    # on the CPU's side stream work is simply done, where it is begun
    one._tower.side = one._side = SideStream(torch.device("cpu"))  # type: ignore[union-attr]
    size = config.image_size
    video = torch.randint(256, (batch, config.frames, size, size, 3), dtype=torch.uint8, device=bench.device)
    calls: dict[str, Call] = {
        "one stream": lambda: one.encode_video(video),
        "two streams": lambda: two.encode_video(video),
    }
    # the engine replays graphs of its own
    return bench.compare(calls, own_graph=True)


def patch(bench: Bench, variant: str, batch: int) -> Rows:
    """PyTorch's operators in the official order are the baseline; weights are packed before, as the engine has them."""
    from xclip_fast.ops import explain, patch_embed

    config = bench.load(variant, batch).config
    images = batch * config.frames
    given = patch_inputs(bench.draw, images, config.image_size, config.patch_size, config.vision_width)
    calls: dict[str, Call] = {"eager": partial(patch_embed, **given, backend="reference")}
    refused = explain("patch_embed", **given)
    for name in ("triton", "extension"):
        if bench.dry or refused.get(name) is None:
            calls[name] = partial(patch_embed, **given, backend="torch" if bench.dry else name)
    return bench.compare(calls)


def norm(bench: Bench, variant: str, batch: int) -> Rows:
    """A residual added and normed: two passes by PyTorch are the baseline, which write the sum and read it again."""
    from xclip_fast.ops import layer_norm as fused

    load = bench.load(variant, batch)
    given = layer_norm_inputs(bench.draw, load.tokens, load.config.vision_width, residual=True)
    vectors = given["weight"], given["bias"]

    def plain() -> Tensor:
        return functional.layer_norm(given["x"] + given["residual"], given["x"].shape[-1:], *vectors)

    calls: dict[str, Call] = {
        "torch": plain,
        "triton": partial(fused, **given, backend="torch" if bench.dry else "triton"),
    }
    moved = 4 * given["x"].nbytes
    return [row | _rate(row, moved, "gbs", 1e9) for row in bench.compare(calls)]


def _rate(row: dict[str, Any], work: float, name: str, unit: float) -> dict[str, float]:
    """Work a second at the median, and at the two ends of the time."""
    if "median_ms" not in row:
        return {}
    times = {name: "median_ms", f"{name}_p10": "p90_ms", f"{name}_p90": "p10_ms"}
    return {key: round(work / (row[time] * 1e-3) / unit, 2) for key, time in times.items()}


QUESTIONS = (products, fc1, ifa, side, sdpa, patch, norm)


def questions(dry: bool) -> dict[str, tuple[Callable[..., Rows], str, int]]:
    """Name of a case to question, variant and batch: one case of each first."""
    if dry:
        return {f"{ask.__name__} tiny x1": (ask, "tiny", 1) for ask in QUESTIONS}
    asked: dict[Callable[..., Rows], list[tuple[str, int]]] = {
        products: [("B/16", 8), ("L/14", 8), ("B/16", 32), ("L/14", 32), ("B/32", 1), ("B/32", 8)],
        fc1: [("B/16", 8), ("L/14", 8), ("B/32", 1), ("L/14", 32), ("B/32", 8), ("B/16", 1)],
        ifa: [("B/16", 8), ("L/14", 8), ("B/16", 32), ("L/14-336", 1), ("L/14", 32), ("B/32", 8)],
        side: [("B/16", 8), ("B/32", 1), ("L/14", 8), ("B/16", 1), ("B/32", 8), ("L/14", 1)],
        sdpa: [("B/16", 8), ("L/14", 8), ("B/16", 32), ("L/14", 32)],
        patch: [("B/16", 8), ("L/14", 8), ("B/32", 8), ("B/32", 1)],
        norm: [("B/16", 8), ("L/14", 8), ("B/32", 8)],
    }
    order = ((ask, shapes[index]) for index in range(6) for ask, shapes in asked.items() if index < len(shapes))
    return {f"{ask.__name__} {variant} x{batch}": (ask, variant, batch) for ask, (variant, batch) in order}


def main(journal: Journal, out: Path, dry: bool) -> bool:
    """Measure what is left; true when everything was measured."""
    bench, asked = Bench(dry), questions(dry)
    if CEILINGS not in journal.cases:
        journal.add(CEILINGS, {"rates": {} if dry else ceilings("cuda", ("bfloat16",))})
    copy_gbs = journal.cases[CEILINGS]["rates"].get("copy_gbs")
    for name in journal.todo(asked):
        ask, variant, batch = asked[name]
        journal.start(name)
        try:
            rows = ask(bench, variant, batch, *([copy_gbs] if ask is ifa else []))
            journal.add(name, {"status": "done", "rows": rows})
            for row in rows:
                print(f"  {name}: {describe(row)}", flush=True)
        except Exception as error:
            # the other questions still have their turn
            journal.add(name, {"status": "failed", "reason": f"{type(error).__name__}: {error}"[:400], "rows": []})
            print(f"  {name}: {type(error).__name__}: {error}", flush=True)
        leave_if_lost()
        if not dry:
            torch.cuda.empty_cache()
    complete = journal.finish(asked)
    return complete and all(case.get("status", "done") == "done" for case in journal.cases.values())


def describe(row: dict[str, Any]) -> str:
    """A line of a log."""
    if row["status"] != "timed":
        return f"{row['contender']}: {row['reason'][:120]}"
    rates = " ".join(f"{row[name]:g} {unit}" for name, unit in (("tflops", "TFLOP/s"), ("gbs", "GB/s")) if name in row)
    return f"{row['contender']}: {row['median_ms']:.4f} ms {rates}, {row['ratio']:.3f} of {row['baseline']}"
