"""The golden files: outputs of the official code at random weights."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from safetensors import safe_open
from torch import Tensor

from xclip_fast.config import XCLIPConfig
from xclip_fast.reference import XCLIP

DATA = Path(__file__).parent / "data"


@dataclass(frozen=True)
class Golden:
    """Inputs, weights and outputs of the official code, computed once in float32.

    Attributes:
        config: the sizes, in our words.
        weights: the official state dict.
        video: (B, T, 3, R, R), normalised.
        tokens: (K, 77).
        outputs: ``block{i}`` (S, B T, D), ``video_features``, ``patch_features``, ``text_features``, ``logits``.
    """

    config: XCLIPConfig
    weights: dict[str, Tensor]
    video: Tensor
    tokens: Tensor
    outputs: dict[str, Tensor]

    def model(self) -> XCLIP:
        """A reference model with these weights."""
        model = XCLIP(self.config)
        model.load_state_dict(self.weights)
        return model.eval()


def read_golden(path: Path) -> Golden:
    """Read a golden file."""
    with safe_open(path, "pt") as file:
        sizes = json.loads(file.metadata()["config"])
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118

    def part(prefix: str) -> dict[str, Tensor]:
        return {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}

    config = XCLIPConfig(
        image_size=sizes["image_resolution"],
        patch_size=sizes["vision_patch_size"],
        vision_width=sizes["vision_width"],
        vision_layers=sizes["vision_layers"],
        embed_dim=sizes["embed_dim"],
        context_length=sizes["context_length"],
        vocab_size=sizes["vocab_size"],
        text_width=sizes["transformer_width"],
        text_layers=sizes["transformer_layers"],
        text_heads=sizes["transformer_heads"],
        frames=sizes["T"],
        mit_layers=sizes["mit_layers"],
        prompt_layers=sizes["prompts_layers"],
        prompt_alpha=sizes["prompts_alpha"],
    )
    return Golden(config, part("sd."), tensors["in.video"], tensors["in.text"], part("out."))
