"""Kernel launches of one forward pass, counted on meta tensors: no GPU and no time, but the number that batch 1 feels.

Every operator that computes or copies is one launch; views and allocations are none. The fused ops say how many kernels
they launch. Attention counts as one launch, whatever backend would serve it. The text tower is left out: class texts
are encoded once.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from xclip_fast.config import VARIANTS, XCLIPConfig
from xclip_fast.model import create_model
from xclip_fast.ops import backend
from xclip_fast.ops.message_attention import key_value_launches
from xclip_fast.ops.message_attention import launches as message_launches
from xclip_fast.ops.temporal_block import launches as temporal_launches
from xclip_fast.reference import XCLIP

CLASSES = 400
# operators that allocate or describe memory
FREE = {"empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided", "lift_fresh", "_unsafe_view"}
# registered ops of more than one kernel
MANY = {
    "message_attention": message_launches,
    "message_key_value": key_value_launches,
    "temporal_block": temporal_launches,
    "feed_forward": lambda *arguments: 2,
    # the product, and the norm where one is given
    "patch_embed": lambda *arguments: 1 + (arguments[4] is not None),
}


class _Counter(TorchDispatchMode):
    """Counts what would be launched while it is active, by operator."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        name = func._schema.name.split("::")[1]
        if not func.is_view and name not in FREE:
            self.counts[name] += MANY[name](*args) if name in MANY else 1
        return result


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


def ours(config: XCLIPConfig, batch: int = 1) -> Counter[str]:
    """Launches of the fused model from normalised frames to logits, class texts given."""
    with torch.device("meta"):
        return _count_model(create_model(config), batch)


def official(config: XCLIPConfig, batch: int = 1) -> Counter[str]:
    """Launches of the reference, which executes what the official code does, but splits its attentions."""
    with torch.device("meta"):
        return _count_model(XCLIP(config).eval(), batch)


def huggingface(config: XCLIPConfig, batch: int = 1) -> Counter[str]:
    """Launches of Hugging Face's model with PyTorch's attention.

    Raises:
        ImportError: transformers is not installed.
    """
    import transformers

    from xclip_fast.checkpoints.huggingface import configs_of

    with torch.device("meta"):
        settings = transformers.XCLIPConfig(**configs_of(config, "float32")[0])
        model = transformers.XCLIPModel(settings).eval()
        video = _video(config, batch)
        tokens = torch.zeros(CLASSES, config.context_length, dtype=torch.int64)
        whole = count(lambda: model(input_ids=tokens, pixel_values=video))
        text = count(lambda: model.text_projection(model.text_model(input_ids=tokens).pooler_output))
        return whole - text


def _count_model(model: XCLIP, batch: int) -> Counter[str]:
    video = _video(model.config, batch)
    text = torch.empty(CLASSES, model.config.embed_dim)
    return count(lambda: model.logits(model.encode_video(video), text))


def _video(config: XCLIPConfig, batch: int) -> Tensor:
    return torch.empty(batch, config.frames, 3, config.image_size, config.image_size)


PROVIDERS = {"xclip_fast": ours, "reference": official, "huggingface": huggingface}


def table(batch: int = 1) -> dict[str, dict[str, int]]:
    """Variant to provider to launches; a provider that cannot be counted here is left out."""
    found: dict[str, dict[str, int]] = {}
    for variant, config in VARIANTS.items():
        row = found.setdefault(variant, {})
        for provider, counted in PROVIDERS.items():
            try:
                row[provider] = sum(counted(config, batch).values())
            except ImportError:
                continue
    return found
