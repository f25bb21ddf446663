"""The demo's X-CLIP, and the same model without what makes it look across frames.

Three models of the same sizes, trained alike on the same clips:

- ``xclip``: X-CLIP as the paper has it;
- ``no_cfa``: its blocks exchange no messages, so frames meet in MIT alone;
- ``average``: CFA and MIT replaced by the average over the frames. Frames in another order give the same video
  feature: no training can make it tell a clip from its reversal.

CFA has no temporal positions. It tells each frame what the others show, and MIT's position table brings in their order:
X-CLIP with MIT alone replaced by the average ignores the order just as well, so that model is not among the three.
"""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from xclip_fast.checkpoints import load_model
from xclip_fast.config import XCLIPConfig
from xclip_fast.demo.clips import SAMPLED, SIZE
from xclip_fast.reference import XCLIP, MultiframeIntegration
from xclip_fast.reference.transformer import Block
from xclip_fast.text.tokenizer import BYTE_VOCAB_SIZE

MODELS = {"xclip": "X-CLIP", "no_cfa": "X-CLIP without CFA", "average": "frame averaging"}
FOLDER = Path(__file__).parent

CONFIG = XCLIPConfig(
    image_size=SIZE,
    patch_size=16,
    vision_width=64,
    vision_layers=2,
    vision_heads=2,
    embed_dim=64,
    context_length=32,
    vocab_size=BYTE_VOCAB_SIZE,
    text_width=64,
    text_layers=1,
    frames=SAMPLED,
)


class FrameAverage(MultiframeIntegration):
    """The mean over frames, in MIT's place and without its weights."""

    def __init__(self) -> None:
        nn.Module.__init__(self)

    def forward(self, features: Tensor) -> Tensor:
        """Frame features (B, T, E) to video features (B, E)."""
        return features.mean(dim=1)


def build_model(name: str, seed: int) -> XCLIP:
    """One of ``MODELS`` before training; with one seed, the weights that two models share start equal."""
    with torch.random.fork_rng(devices=[]):
        # torch.manual_seed would reseed every accelerator too
        torch.default_generator.manual_seed(seed)
        model = XCLIP(CONFIG).eval()
    if name != "xclip":
        blocks = model.visual.transformer.resblocks
        model.visual.transformer.resblocks = nn.ModuleList(without_messages(block, CONFIG) for block in blocks)
    if name == "average":
        model.mit = FrameAverage()
    return model


def without_messages(block: nn.Module, config: XCLIPConfig) -> Block:
    """A block of the vision tower with the same weights but those of the messages: a block of CLIP's."""
    state = block.state_dict()
    # no random numbers are drawn for weights that are replaced at once
    with torch.device("meta"):
        plain = Block(config.vision_width, config.vision_heads, config.activation)
    plain.load_state_dict({name: state[name] for name in plain.state_dict()}, assign=True)
    return plain


def weights_path(name: str, folder: Path = FOLDER) -> Path:
    """Where the trained weights of one of ``MODELS`` are."""
    return folder / f"{name}.safetensors"


def load_trained(name: str, folder: Path = FOLDER) -> XCLIP:
    """One of ``MODELS`` with its trained weights, float32, in evaluation mode."""
    path = weights_path(name, folder)
    if name == "xclip":
        return load_model(path, dtype=torch.float32)
    model = build_model(name, seed=0)
    model.load_state_dict(load_file(path))
    return model
