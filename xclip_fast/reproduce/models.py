"""The tiny CLIP, and what it is expanded to: the rungs of the paper's ladder, and X-CLIP without its messages."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from xclip_fast.config import XCLIPConfig
from xclip_fast.demo.models import FrameAverage, without_messages
from xclip_fast.reference import XCLIP
from xclip_fast.reference.prompts import VideoPrompts
from xclip_fast.reproduce.world import CELL, FRAMES, SIZE, WORDS

_PUBLISHED_EMBED_DIM = 512


class Parts(NamedTuple):
    """What a model has of what X-CLIP adds to CLIP."""

    cfa: bool = True
    mit: bool = True
    prompts: bool = True


RUNGS: dict[str, Parts] = {
    "mean": Parts(cfa=False, mit=False, prompts=False),
    "cfa": Parts(mit=False, prompts=False),
    "cfa_mit": Parts(prompts=False),
    "full": Parts(),
}
MODELS: dict[str, Parts] = {**RUNGS, "no_cfa": Parts(cfa=False)}
TITLES = {
    "mean": "CLIP, mean of frames",
    "cfa": "+ cross-frame attention",
    "cfa_mit": "+ MIT",
    "full": "+ video-specific prompts: X-CLIP",
    "no_cfa": "X-CLIP without cross-frame attention",
}


def tokenize(texts: Sequence[str]) -> Tensor:
    """Token ids of texts, int64 (K, L): start of text, a token for each word, end of text, which has the largest id."""
    ids = {word: place for place, word in enumerate(WORDS)}
    rows = [[len(ids), *(ids[word] for word in text.split()), len(ids) + 1] for text in texts]
    longest = max(map(len, rows))
    # attention is causal and the feature is read at the end of text: what is behind it changes nothing
    return torch.tensor([row + [0] * (longest - len(row)) for row in rows])


def config() -> XCLIPConfig:
    """Sizes of all models. The embedding is narrow, so that a frame can't describe all of its shapes in it."""
    return XCLIPConfig(
        image_size=SIZE,
        patch_size=CELL,
        vision_width=64,
        vision_layers=4,
        vision_heads=2,
        embed_dim=16,
        embed_heads=2,
        context_length=8,
        vocab_size=len(WORDS) + 2,
        text_width=64,
        text_layers=2,
        text_heads=2,
        frames=FRAMES,
    )


class _NoPrompts(VideoPrompts):
    def __init__(self) -> None:
        nn.Module.__init__(self)

    def forward(self, texts: Tensor, patches: Tensor) -> Tensor:
        return texts


def build_model(name: str, seed: int, clip: Mapping[str, Tensor] | None = None) -> XCLIP:
    """One of ``MODELS`` before its training on videos.

    Args:
        name: a key of ``MODELS``.
        seed: of the random weights; those that two models share start equal.
        clip: the weights of the pretrained CLIP; without them, all weights are random.
    """
    sizes, parts = config(), MODELS[name]
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        model = XCLIP(sizes)
        _widen(model)
    if clip is not None:
        _load(model, clip)
    if not parts.cfa:
        blocks = model.visual.transformer.resblocks
        model.visual.transformer.resblocks = nn.ModuleList(without_messages(block, sizes) for block in blocks)
    if not parts.mit:
        model.mit = FrameAverage()
    if not parts.prompts:
        model.prompts_generator = _NoPrompts()
    return model


def clip_weights(model: XCLIP) -> dict[str, Tensor]:
    """Of a model without CFA, MIT and prompts, what belongs to CLIP."""
    return {
        name: value.detach().contiguous()
        for name, value in model.state_dict().items()
        if not name.startswith("prompts_")
    }


def _load(model: XCLIP, clip: Mapping[str, Tensor]) -> None:
    found = model.load_state_dict(dict(clip), strict=False)
    # what CLIP lacks is what X-CLIP adds, and nothing else
    strange = [
        name for name in found.missing_keys if not any(part in name for part in ("message_", "mit.", "prompts_"))
    ]
    if found.unexpected_keys or strange:
        raise ValueError(f"these are no weights of the tiny CLIP: {[*found.unexpected_keys, *strange][:3]}")


@torch.no_grad()
def _widen(model: XCLIP) -> None:
    """Weights of the parts as large as they are in a model of the published width, and tables that tell rows apart.

    A deviation of 0.02 is 0.45 / sqrt(512): with 16 inputs it would leave attention flat and its gradients tiny.
    """
    for table, deviation in (
        (model.visual.positional_embedding, 0.3),
        (model.token_embedding.weight, 0.5),
        (model.positional_embedding, 0.2),
        (model.mit.positional_embedding, 0.3),
    ):
        table.normal_(std=deviation)
    for part in (model.mit, model.prompts_generator):
        for module in part.modules():
            if isinstance(module, nn.Linear):
                module.weight.mul_((_PUBLISHED_EMBED_DIM / model.config.embed_dim) ** 0.5)
    model.prompts_visual_proj.mul_(model.config.vision_width**-0.5)
