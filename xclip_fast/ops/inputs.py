"""Example arguments of every op, with outlier channels as real activations have them, at any size.

One function an op; each returns the arguments of the op by name, drawn by whatever draws: random numbers for
verification and benchmarks, tensors without memory for the compile gate, guarded memory for the tests.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from xclip_fast.ops._dtypes import exact_dtype

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

    def __call__(self, *shape: int, mean: float = 0.0, scale: float = 1.0, dtype: torch.dtype | None = None) -> Tensor:
        """A normal tensor, of the draw's dtype unless another is asked for; on the meta device one without numbers."""
        if self.device == "meta":
            return torch.empty(shape, dtype=dtype or self.dtype, device="meta")
        numbers = torch.randn(shape, generator=self._generator)  # type: ignore[attr-defined]
        return (numbers * scale + mean).to(self.device, dtype or self.dtype)

    def bytes(self, *shape: int) -> Tensor:
        """Pixels of decoded frames."""
        if self.device == "meta":
            return torch.empty(shape, dtype=torch.uint8, device="meta")
        generator = torch.Generator().manual_seed(self.seed)
        return torch.randint(0, 256, shape, generator=generator, dtype=torch.uint8).to(self.device)

    def activations(self, *shape: int, mean: float = 0.0) -> Tensor:
        """A normal tensor whose outlier channels are larger."""
        made = self(*shape, mean=mean)
        if shape[-1] > 2 and self.device != "meta":
            made[..., list(OUTLIERS)] *= OUTLIER_SCALE
        return made

    def weight(self, *shape: int) -> Tensor:
        """A matrix that maps activations of unit scale to unit scale."""
        return self(*shape, scale=shape[-1] ** -0.5)

    def norm(self, width: int, which: str = "norm_", dtype: torch.dtype | None = None) -> Inputs:
        """Weight and bias of a layer norm."""
        return {
            f"{which}weight": self(width, mean=1.0, scale=0.3, dtype=dtype),
            f"{which}bias": self(width, scale=0.3, dtype=dtype),
        }

    def attention(self, width: int) -> Inputs:
        """The packed projection of a self-attention and its out-projection."""
        return {
            "in_proj_weight": self.weight(3 * width, width),
            "in_proj_bias": self(3 * width, scale=0.3),
            "out_weight": self.weight(width, width),
            "out_bias": self(width, scale=0.3),
        }

    def mlp(self, width: int, hidden: int) -> Inputs:
        """Both linear layers of a block's MLP."""
        return {
            "fc_weight": self.weight(hidden, width),
            "fc_bias": self(hidden, scale=0.3),
            "proj_weight": self.weight(width, hidden),
            "proj_bias": self(width, scale=0.3),
        }

    def ragged(self, clips: int, frames: int) -> Inputs:
        """Boundaries of ragged clips in a batch of clips x frames: the first lacks a frame, one frame has no clip."""
        bounds = torch.arange(0, (clips + 1) * frames, frames, dtype=torch.int32, device=self.device)
        return {"cu_frames": bounds.sub(1).clamp(min=0), "max_frames": frames}


class Factory(Draw):
    """Tensors from a function of shape and dtype, whose numbers are its own affair.

    Args:
        make: without a dtype, in that of the activations.
        device: of its tensors.
    """

    def __init__(self, make: Callable[..., Tensor], device: str = "cpu") -> None:
        super().__init__(torch.float32, device)
        object.__setattr__(self, "_make", make)

    def __call__(self, *shape: int, mean: float = 0.0, scale: float = 1.0, dtype: torch.dtype | None = None) -> Tensor:
        made: Tensor = self._make(*shape, dtype=dtype)  # type: ignore[attr-defined]
        return made

    def activations(self, *shape: int, mean: float = 0.0) -> Tensor:
        """As they are made: memory that is watched is not written to."""
        return self(*shape)

    def bytes(self, *shape: int) -> Tensor:
        return self(*shape, dtype=torch.uint8)


def patch_embed(draw: Draw, frames: int, image: int, patch: int, width: int, *, planes: bool = False) -> Inputs:
    """Decoded frames, uint8 (F, H, W, 3), or normalised ``planes`` (F, 3, H, W)."""
    pixels = draw(frames, 3, image, image) if planes else draw.bytes(frames, image, image, 3)
    return {
        "frames": pixels,
        "weight": draw(width, 3, patch, patch, scale=(3 * patch**2) ** -0.5),
        "class_embedding": draw(width, scale=0.3),
        "positions": draw((image // patch) ** 2 + 1, width, scale=0.3),
    } | draw.norm(width)


def layer_norm(
    draw: Draw,
    rows: int,
    width: int,
    *,
    residual: bool = False,
    constant: bool = False,
    mean: float = 0.5,
    norm_dtype: torch.dtype | None = None,
) -> Inputs:
    """Rows of tokens, and the branch that waits to be added; ``norm_dtype`` of weight and bias as under autocast."""
    vectors = draw.norm(width, "", norm_dtype)
    inputs = {"x": draw.activations(rows, width, mean=mean)} | vectors
    return inputs | _added(draw, (rows, width), residual, constant)


def quantize_rows(
    draw: Draw,
    rows: int,
    width: int,
    *,
    norm: bool = False,
    residual: bool = False,
    constant: bool = False,
    activation: str | None = None,
) -> Inputs:
    """Rows in front of a GEMM in float8, normed or activated on the way."""
    inputs: Inputs = {"x": draw.activations(rows, width)} | (draw.norm(width, "") if norm else {})
    return inputs | _added(draw, (rows, width), residual, constant) | {"activation": activation}


def linear_quick_gelu(draw: Draw, rows: int, width: int, hidden: int) -> Inputs:
    """Normed rows and the first GEMM of an MLP."""
    return {"x": draw(rows, width), "weight": draw.weight(hidden, width), "bias": draw(hidden, scale=0.3)}


def feed_forward(draw: Draw, rows: int, width: int, hidden: int) -> Inputs:
    """Normed rows and a whole MLP."""
    return {"x": draw(rows, width)} | draw.mlp(width, hidden)


def mean_norm_over_frames(
    draw: Draw, batch: int, frames: int, patches: int, width: int, *, residual: bool = False, constant: bool = False
) -> Inputs:
    """The view of the tokens without the class token; the branch is the tight result of a GEMM."""
    vectors = draw.norm(width, "")
    inputs = {"tokens": draw.activations(batch, frames, patches + 1, width)[:, :, 1:]} | vectors
    return inputs | _added(draw, (batch, frames, patches, width), residual, constant)


def clip_logits(
    draw: Draw, batch: int, classes: int, width: int, *, residual: bool = False, text_dtype: torch.dtype | None = None
) -> Inputs:
    """Features of videos and texts, not normalised.

    ``text_dtype`` is that of texts, ``alpha`` and scale: float32 in the engine, whose residual is one row.
    """
    inputs = {
        "video": draw.activations(batch, width),
        "text": draw(classes, width, dtype=text_dtype),
        "prompts": draw(batch, classes, width),
        "alpha": draw(width, scale=0.1, mean=0.1, dtype=text_dtype),
        "logit_scale": draw(mean=2.0, scale=0.0, dtype=text_dtype),
    }
    if residual:
        row = draw(batch, classes, width) if text_dtype is None else draw(width).expand(batch, classes, width)
        inputs["residual"] = row
    return inputs


def prompt_attention(
    draw: Draw, batch: int, classes: int, patches: int, width: int, heads: int, *, shared: bool = False
) -> Inputs:
    """Keys and values are halves of one projection, as in the prompt layers; ``shared`` queries serve all videos."""
    key, value = draw(batch, patches, 2 * width).chunk(2, -1)
    return {"query": draw(1 if shared else batch, classes, width), "key": key, "value": value, "heads": heads}


def frame_attention(
    draw: Draw, frames: int, tokens: int, width: int, heads: int, *, dtype: torch.dtype | None = None
) -> Inputs:
    """Packed queries, keys and values of each frame; key and value of its message."""
    qkv, message = draw(frames, tokens, 3 * width, dtype=dtype), draw(frames, 2 * width, dtype=dtype)
    return {"qkv": qkv, "message_kv": message, "heads": heads}


def message_attention(draw: Draw, batch: int, frames: int, width: int, heads: int, *, ragged: bool = False) -> Inputs:
    """The class rows in front of each frame's patches; ragged clips lie one after another."""
    tokens = draw.activations(batch, frames, 2, width)[:, :, 0]
    inputs = {"class_tokens": tokens.flatten(0, 1) if ragged else tokens}
    inputs |= {"fc_weight": draw.weight(width, width), "fc_bias": draw(width, scale=0.3)}
    inputs |= draw.norm(width) | draw.attention(width)
    return inputs | (draw.ragged(batch, frames) if ragged else {}) | {"heads": heads}


def message_key_value(draw: Draw, frames: int, width: int) -> Inputs:
    """Messages, the block's norm, and the key and value rows of its projection."""
    inputs = {"messages": draw.activations(frames, width)} | draw.norm(width)
    return inputs | {"weight": draw.weight(2 * width, width), "bias": draw(2 * width, scale=0.3)}


def folded_message(draw: Draw, batch: int, frames: int, width: int, heads: int) -> Inputs:
    """Class tokens as for ``message_attention``; vectors that no GEMM of PyTorch's reads are exact."""
    from xclip_fast.ops._folded_message import Folded

    exact = exact_dtype(draw.dtype)
    tokens = draw.activations(batch, frames, 2, width)[:, :, 0]
    weights = Folded(
        draw.weight(6 * width, width),
        draw(6 * width, scale=0.3),
        draw(3 * width, scale=0.3, dtype=exact),
        draw.weight(3 * width, width),
        draw(3 * width, scale=0.3, dtype=exact),
        draw(2 * width, scale=0.3, dtype=exact),
    )
    return {"class_tokens": tokens, "weights": weights, "heads": heads}


def temporal_block(
    draw: Draw, batch: int, frames: int, width: int, heads: int, *, ragged: bool = False, whole: bool = False
) -> Inputs:
    """Features of frames and a whole transformer block; ``whole`` is all of MIT, with positions and mean."""
    rows = draw.activations(batch, frames, width)
    inputs = {"x": rows.flatten(0, 1) if ragged else rows}
    inputs |= draw.norm(width, "norm1_") | draw.attention(width)
    inputs |= draw.norm(width, "norm2_") | draw.mlp(width, 4 * width)
    if whole:
        inputs |= {"positions": draw(frames, width), "pooled_with": draw(batch, frames, width)}
    return inputs | (draw.ragged(batch, frames) if ragged else {}) | {"heads": heads}


def _added(draw: Draw, shape: tuple[int, ...], residual: bool, constant: bool) -> Inputs:
    found = {"residual": draw.activations(*shape)} if residual else {}
    return found | ({"constant": draw(shape[-1])} if constant else {})
