"""The models that can be packed: an engine reads weights and calls no module."""

from __future__ import annotations

import re
from functools import cache
from typing import Any

import torch
from torch import nn

from xclip_fast.config import XCLIPConfig
from xclip_fast.errors import InputError
from xclip_fast.plain import first_oddity
from xclip_fast.reference.model import XCLIP

_TORCH_MODULES = (nn.Linear, nn.LayerNorm, nn.Conv2d, nn.Embedding, nn.Sequential, nn.ModuleList, nn.Identity, nn.GELU)


def check_model(model: Any) -> None:
    """A whole X-CLIP whose answer is in its weights alone.

    Raises:
        InputError: it is not.
    """
    whole = isinstance(model, XCLIP) and hasattr(model.mit, "resblocks")
    if not whole or not all(hasattr(block, "message_fc") for block in model.visual.transformer.resblocks):
        raise InputError(
            f"an engine of a {type(model).__name__} was asked for: it takes a whole X-CLIP, "
            "as create_model and load_model return it"
        )
    expected = _classes(model.config.activation)

    def is_known(name: str, cls: type) -> bool:
        ours = cls.__module__.startswith(("xclip_fast.layers.", "xclip_fast.reference."))
        name = re.sub(r"(resblocks|decoder)\.\d+", r"\1.0", name)
        return expected.get(name) == cls.__name__ and (ours or cls in _TORCH_MODULES)

    oddity = first_oddity(model, is_known)
    if oddity is not None:
        name, reason = oddity
        raise InputError(
            f"an engine of this model was asked for, which reads weights and calls no module, but found {reason} at "
            f"{name or 'the model itself'}: merge adapters, make pruned or parametrized weights permanent, remove "
            "hooks and wrappers, or give the model as it was before"
        )


@cache
def _classes(activation: str) -> dict[str, str]:
    """The name of the class of each module in a model with one block of each kind, by the name of the module."""
    with torch.random.fork_rng(devices=[]):
        model = XCLIP(
            XCLIPConfig(
                image_size=1,
                patch_size=1,
                vision_width=64,
                vision_layers=1,
                embed_dim=64,
                context_length=1,
                vocab_size=1,
                text_width=64,
                text_layers=1,
                mit_layers=1,
                prompt_layers=1,
                activation=activation,
            )
        )
    return {name: type(module).__name__ for name, module in model.named_modules()}
