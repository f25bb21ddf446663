"""Random inputs of every op, with outlier channels as real activations have them, at any size.

One function an op; each returns the arguments of the public function in ``xclip_fast.ops`` by name.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

Inputs = dict[str, Any]

OUTLIERS = (1, -2)  # channels of activations that are
OUTLIER_SCALE = 16.0  # times as large as the others: a bad sum or variance shows there first


@dataclass(frozen=True)
class Draw:
    """Tensors of one dtype on one device; numbers are drawn in float32 on the CPU, the same ones for every dtype."""

    dtype: torch.dtype
    device: str
    seed: int = 0

    def __post_init__(self) -> None:
        object.__setattr__(self, "_generator", torch.Generator().manual_seed(self.seed))

    def __call__(self, *shape: int, mean: float = 0.0, scale: float = 1.0) -> Tensor:
        """A normal tensor; on the meta device one without numbers."""
        if self.device == "meta":
            return torch.empty(shape, dtype=self.dtype, device="meta")
        numbers = torch.randn(shape, generator=self._generator)  # type: ignore[attr-defined]
        return (numbers * scale + mean).to(self.device, self.dtype)

    def activations(self, *shape: int, mean: float = 0.0) -> Tensor:
        """A normal tensor whose outlier channels are larger."""
        made = self(*shape, mean=mean)
        if shape[-1] > 2 and self.device != "meta":
            made[..., list(OUTLIERS)] *= OUTLIER_SCALE
        return made

    def weight(self, *shape: int) -> Tensor:
        """A matrix whose products with unit activations are of unit scale."""
        return self(*shape, scale=shape[-1] ** -0.5)

    def norm(self, width: int, which: str = "norm") -> Inputs:
        """Weight and bias of a layer norm."""
        return {f"{which}_weight": self(width, mean=1.0, scale=0.3), f"{which}_bias": self(width, scale=0.3)}

    def attention(self, width: int) -> Inputs:
        """The packed projection of a self-attention and its out-projection."""
        return {
            "in_proj_weight": self.weight(3 * width, width),
            "in_proj_bias": self(3 * width, scale=0.3),
            "out_weight": self.weight(width, width),
            "out_bias": self(width, scale=0.3),
        }

    def bounds(self, clips: int, frames: int) -> Tensor:
        """Boundaries of ragged clips in a batch of clips x frames: the first lacks a frame, one frame has no clip."""
        return torch.arange(0, (clips + 1) * frames, frames, dtype=torch.int32, device=self.device).sub(1).clamp(min=0)


def patch_embed(draw: Draw, frames: int, image: int, patch: int, width: int) -> Inputs:
    """Decoded frames, uint8 (F, H, W, 3)."""
    shape = (frames, image, image, 3)
    if draw.device == "meta":
        pixels = torch.empty(shape, dtype=torch.uint8, device="meta")
    else:
        generator = torch.Generator().manual_seed(draw.seed)
        pixels = torch.randint(0, 256, shape, generator=generator, dtype=torch.uint8).to(draw.device)
    return {
        "frames": pixels,
        "weight": draw(width, 3, patch, patch, scale=(3 * patch**2) ** -0.5),
        "class_embedding": draw(width, scale=0.3),
        "positions": draw((image // patch) ** 2 + 1, width, scale=0.3),
    } | draw.norm(width)


def layer_norm(draw: Draw, rows: int, width: int, *, residual: bool = True, mean: float = 0.5) -> Inputs:
    """Rows of tokens, with the branch that waits to be added."""
    norm = draw.norm(width)
    inputs = {
        "x": draw.activations(rows, width, mean=mean),
        "weight": norm["norm_weight"],
        "bias": norm["norm_bias"],
    }
    return inputs | ({"residual": draw.activations(rows, width)} if residual else {})


def linear_quick_gelu(draw: Draw, rows: int, width: int, hidden: int) -> Inputs:
    """Normed rows and the first product of a perceptron."""
    return {"x": draw(rows, width), "weight": draw.weight(hidden, width), "bias": draw(hidden, scale=0.3)}


def mean_norm_over_frames(draw: Draw, batch: int, frames: int, patches: int, width: int) -> Inputs:
    """The view of the tokens without the class token."""
    norm = draw.norm(width)
    tokens = draw.activations(batch, frames, patches + 1, width)[:, :, 1:]
    return {"tokens": tokens, "weight": norm["norm_weight"], "bias": norm["norm_bias"]}


def clip_logits(draw: Draw, batch: int, classes: int, width: int) -> Inputs:
    """Features of videos and texts, not normalised."""
    return {
        "video": draw.activations(batch, width),
        "text": draw(classes, width),
        "prompts": draw(batch, classes, width),
        "alpha": draw(width, scale=0.1, mean=0.1),
        "logit_scale": draw(mean=2.0, scale=0.0),
    }


def prompt_attention(draw: Draw, batch: int, classes: int, patches: int, width: int, heads: int) -> Inputs:
    """Keys and values are halves of one projection, as in the prompt layers."""
    key, value = draw(batch, patches, 2 * width).chunk(2, -1)
    return {"query": draw(batch, classes, width), "key": key, "value": value, "heads": heads}


def frame_attention(draw: Draw, frames: int, tokens: int, width: int, heads: int) -> Inputs:
    """Packed queries, keys and values of each frame; key and value of its message."""
    return {"qkv": draw(frames, tokens, 3 * width), "message_kv": draw(frames, 2 * width), "heads": heads}


def message_attention(draw: Draw, batch: int, frames: int, width: int, heads: int, *, ragged: bool = False) -> Inputs:
    """The class rows in front of each frame's patches; ragged clips lie behind each other."""
    tokens = draw.activations(batch, frames, 2, width)[:, :, 0]
    inputs = {"class_tokens": tokens.flatten(0, 1) if ragged else tokens}
    inputs |= {"fc_weight": draw.weight(width, width), "fc_bias": draw(width, scale=0.3)}
    inputs |= draw.norm(width) | draw.attention(width)
    return (
        inputs | ({"cu_frames": draw.bounds(batch, frames), "max_frames": frames} if ragged else {}) | {"heads": heads}
    )


def message_key_value(draw: Draw, frames: int, width: int) -> Inputs:
    """Messages, the block's norm, and the key and value rows of its projection."""
    inputs = {"messages": draw.activations(frames, width)} | draw.norm(width)
    return inputs | {"weight": draw.weight(2 * width, width), "bias": draw(2 * width, scale=0.3)}


def temporal_block(draw: Draw, batch: int, frames: int, width: int, heads: int) -> Inputs:
    """Features of frames and a whole transformer block."""
    hidden = 4 * width
    inputs = {"x": draw.activations(batch, frames, width)} | draw.norm(width, "norm1") | draw.attention(width)
    inputs |= draw.norm(width, "norm2")
    inputs |= {"fc_weight": draw.weight(hidden, width), "fc_bias": draw(hidden, scale=0.3)}
    return inputs | {"proj_weight": draw.weight(width, hidden), "proj_bias": draw(width, scale=0.3), "heads": heads}
