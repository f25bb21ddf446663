"""Tiny models and the files that hold them."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from xclip_fast import XCLIPConfig, create_model
from xclip_fast.reference import XCLIP

TINY = XCLIPConfig(
    image_size=64,
    patch_size=32,
    vision_width=128,
    vision_layers=2,
    embed_dim=64,
    vocab_size=100,
    context_length=20,
    text_width=64,
    text_layers=3,
    frames=4,
    mit_layers=2,
    prompt_layers=1,
)


def randomise(module: nn.Module) -> nn.Module:
    """Random numbers in every tensor, norms and biases too: exchanged names then change the outputs."""
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.05)
    return module.eval()


def tiny_model(config: XCLIPConfig = TINY, dtype: torch.dtype = torch.float32) -> XCLIP:
    model = create_model(config)
    randomise(model)
    return model.to(dtype)


def inputs(config: XCLIPConfig = TINY, frames: int | None = None) -> tuple[Tensor, Tensor]:
    """Two videos, normalised, and three texts."""
    side = config.image_size
    return torch.randn(2, frames or config.frames, 3, side, side), torch.randint(1, config.vocab_size, (3, 9))


def same_bits(left: nn.Module, right: nn.Module) -> None:
    """Both state dicts hold the same names, dtypes and bits."""
    ours, theirs = left.state_dict(), right.state_dict()
    assert list(ours) == list(theirs)
    for name, tensor in ours.items():
        assert tensor.dtype == theirs[name].dtype, name
        assert torch.equal(tensor, theirs[name]), name


def hf_model(**changes: Any) -> Any:
    """A transformers XCLIPModel of the sizes of TINY; ``changes`` are "section.key" or top level keys."""
    transformers = pytest.importorskip("transformers")
    sections: dict[str, dict[str, Any]] = {
        "text_config": {
            "hidden_size": 64,
            "intermediate_size": 256,
            "num_hidden_layers": 3,
            "num_attention_heads": 1,
            "vocab_size": 100,
            "max_position_embeddings": 20,
        },
        "vision_config": {
            "hidden_size": 128,
            "intermediate_size": 512,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "image_size": 64,
            "patch_size": 32,
            "num_frames": 4,
            "mit_hidden_size": 64,
            "mit_intermediate_size": 256,
            "mit_num_hidden_layers": 2,
            "mit_num_attention_heads": 1,
        },
    }
    top: dict[str, Any] = {"projection_dim": 64, "prompt_layers": 1, "prompt_num_attention_heads": 1}
    for key, value in changes.items():
        section, _, name = key.rpartition(".")
        (sections[section] if section else top)[name] = value
    return randomise(transformers.XCLIPModel(transformers.XCLIPConfig(**sections, **top)))


def hf_logits(model: Any, video: Tensor, tokens: Tensor) -> Tensor:
    with torch.no_grad():
        return model(input_ids=tokens, pixel_values=video).logits_per_video


def logits(model: XCLIP, video: Tensor, tokens: Tensor) -> Tensor:
    with torch.no_grad():
        return model(video, tokens)


def clip_state(model: XCLIP) -> dict[str, Tensor]:
    """The part of a model that CLIP has too."""
    added = ("mit.", "prompts_")
    return {
        name: tensor
        for name, tensor in model.state_dict().items()
        if not name.startswith(added) and ".message_" not in name
    }


def edit_json(path: Path, **changes: Any) -> None:
    """Change keys of a JSON file; "section.key" reaches one level down."""
    content = json.loads(path.read_text())
    for key, value in changes.items():
        section, _, name = key.rpartition(".")
        (content[section] if section else content)[name] = value
    path.write_text(json.dumps(content))


def write_tensors(path: Path, tensors: dict[str, Tensor], metadata: dict[str, str] | None = None) -> Path:
    save_file({name: tensor.detach().contiguous().clone() for name, tensor in tensors.items()}, path, metadata)
    return path


class Lines(logging.Handler):
    """The library's log as a list of (level, line)."""

    def __init__(self) -> None:
        super().__init__()
        self.lines: list[tuple[str, str]] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append((record.levelname, record.getMessage()))
