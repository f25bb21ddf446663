"""Kernel launches of one call, counted on meta tensors: no GPU and no time, but the number that batch 1 feels.

A call goes from frames on the GPU, normalised or decoded bytes, to logits; class texts are encoded once, before it. An
operator that writes memory is one launch, also a cast or a reshape that has to copy; views and allocations are none.
The fused ops say how many kernels they launch; attention counts as one, whatever backend would serve it.

Bytes are embedded by as many kernels as other frames. Hugging Face's model takes none, and what normalises them is
counted with it. The engine replays its kernels as one graph: they are counted, and not the copies of the frames
into it and of the logits out of it, two more a call.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from functools import lru_cache, partial
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from xclip_fast.bench.huggingface import HuggingFace, model_of
from xclip_fast.bench.record import Case
from xclip_fast.bench.setting import INPUTS, Setting, UnavailableError
from xclip_fast.config import VARIANTS
from xclip_fast.engine.cuda import CudaTower
from xclip_fast.engine.heads import Heads
from xclip_fast.engine.packing import CUDA_REWRITES, Packing
from xclip_fast.model import create_model
from xclip_fast.ops import backend
from xclip_fast.ops._folded_message import launches as folded_launches
from xclip_fast.ops.cases import config_of
from xclip_fast.ops.message_attention import key_value_launches
from xclip_fast.ops.message_attention import launches as message_launches
from xclip_fast.ops.temporal_block import launches as temporal_launches
from xclip_fast.reference import XCLIP

CLASSES = 400
# operators that allocate or describe memory, or ask for a dtype
FREE = {"empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided", "promote_types"}
# registered ops of more than one kernel
MANY = {
    "folded_message": folded_launches,
    "message_attention": message_launches,
    "message_key_value": key_value_launches,
    "temporal_block": temporal_launches,
    "feed_forward": lambda *arguments: 2,
    # rows, their GEMM and what follows it; weights that have to be padded are copied into zeros
    "patch_embed": lambda *arguments: 3 + 2 * (arguments[1][0].numel() % 8 > 0),
}


class _Counter(TorchDispatchMode):
    """Counts what would be launched while it is active, by operator."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        name = func._schema.name.split("::")[1]
        # a cast, a reshape or a dropout may give back what it was given
        if name not in FREE and (func._schema.is_mutable or not _shares(result, args)):
            self.counts[name] += MANY[name](*args) if name in MANY else 1
        return result


def _shares(result: Any, arguments: Any) -> bool:
    """Whether a result, or each of several, lies in the memory of an argument: nothing was written."""
    results = [result] if isinstance(result, Tensor) else result
    places = {x.untyped_storage()._cdata for x in arguments if isinstance(x, Tensor)}
    return all(isinstance(x, Tensor) and x.untyped_storage()._cdata in places for x in results)


class _AttentionAsOne(TorchFunctionMode):
    """On meta tensors PyTorch's attention falls apart into its mathematics; on a GPU it is one kernel."""

    def __init__(self, counts: Counter[str]) -> None:
        super().__init__()
        self.counts = counts

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.nn.functional.scaled_dot_product_attention:
            self.counts["scaled_dot_product_attention"] += 1
            query, _, value = args[:3]
            # heads lie side by side in memory, as the fused kernels leave them
            mixed = query.new_empty(*query.shape[:-3], query.shape[-2], query.shape[-3], value.shape[-1])
            return mixed.transpose(-3, -2)
        return func(*args, **(kwargs or {}))


def count(run: Callable[[], object]) -> Counter[str]:
    """Launches of a function on meta tensors, by operator; the fused ops count as their kernels."""
    counter = _Counter()
    with torch.inference_mode(), backend("triton"), counter, _AttentionAsOne(counter.counts):
        run()
    return counter.counts


def layers(case: Case) -> Counter[str]:
    """Of the fused model."""
    config, dtype = config_of(case.variant, case.frames), getattr(torch, case.dtype)
    with torch.device("meta"):
        return _of_model(create_model(config).to(dtype), case)


def reference(case: Case) -> Counter[str]:
    """Of the reference, which executes what the official code does, but splits its attentions."""
    with torch.device("meta"):
        model = XCLIP(config_of(case.variant, case.frames)).eval()
        return _of_model(model.to(getattr(torch, case.dtype)), case)


@lru_cache(maxsize=64)
def huggingface(case: Case) -> Counter[str]:
    """Of Hugging Face's model with PyTorch's attention, as it is timed.

    Raises:
        UnavailableError: transformers is not installed, or has no such model.
    """
    setting = Setting(case, config_of(case.variant, case.frames), {})
    with torch.device("meta"):
        model = HuggingFace(model_of(setting.config, "sdpa"), setting)
        return count(partial(model, *_inputs(case)))


def engine(case: Case) -> Counter[str]:
    """Of the engine's graph, from frames to logits of a class set that it knows."""
    tower, heads = _packed(case.variant, case.dtype)
    with torch.device("meta"):
        video, text = _inputs(case)
    texts = heads.prepare(text)

    def call() -> Tensor:
        classes, tokens = tower(video, patches=True)
        embedding = heads.integrate(tower.project(classes).view(case.batch, case.frames, -1))
        return heads.logits(lambda: embedding, heads.project_patches(tokens, case.frames, tower.missing_bias), texts)

    with torch.inference_mode(), backend("triton"):
        call()  # positions for this grid and this number of frames are made once
    return count(call)


@lru_cache(maxsize=8)
def _packed(variant: str, dtype: str) -> tuple[CudaTower, Heads]:
    """Both halves of an engine, on meta; what the rewrites compute with on the CPU was never set."""
    config = config_of(variant)
    with torch.device("meta"):
        model = create_model(config)
    model.to_empty(device="cpu")
    packing = Packing(torch.device("meta"), getattr(torch, dtype), CUDA_REWRITES)
    with torch.no_grad():
        return CudaTower(model.visual, config, packing), Heads(model, packing)


def _of_model(model: XCLIP, case: Case) -> Counter[str]:
    video, text = _inputs(case)
    return count(lambda: model.logits(model.encode_video(video), text))


def _inputs(case: Case) -> tuple[Tensor, Tensor]:
    config, dtype = config_of(case.variant, case.frames), getattr(torch, case.dtype)
    side, text = config.image_size, torch.empty(case.classes, config.embed_dim, dtype=dtype)
    if case.input == "uint8":
        return torch.empty(case.batch, case.frames, side, side, 3, dtype=torch.uint8), text
    return torch.empty(case.batch, case.frames, 3, side, side, dtype=dtype), text


# by the names of those who are timed
PROVIDERS: dict[str, Callable[[Case], Counter[str]]] = {
    "engine": engine,
    "layers": layers,
    "reference": reference,
    "hf-sdpa": huggingface,
}


def launches_of(case: Case, provider: str) -> int | None:
    """Launches of one call of a provider on a GPU; None where they are not counted: others, and training."""
    if provider not in PROVIDERS or case.direction != "forward":
        return None
    # the same on every device
    return PROVIDERS[provider](replace(case, device="meta")).total()


def table(batch: int = 1) -> dict[str, dict[str, dict[str, int]]]:
    """Variant to input to provider to launches in bfloat16; a provider that cannot be counted here is left out."""
    found: dict[str, dict[str, dict[str, int]]] = {}
    for variant, config in VARIANTS.items():
        for input in INPUTS:
            row = found.setdefault(variant, {}).setdefault(input, {})
            case = Case("model", variant, config.frames, batch, CLASSES, "bfloat16", "forward", input, "meta")
            for provider, counted in PROVIDERS.items():
                with suppress(UnavailableError):
                    row[provider] = counted(case).total()
    return found
