"""Making models: the entry point for random weights (``checkpoints`` has the one for trained ones)."""

from __future__ import annotations

import torch

from xclip_fast.config import XCLIPConfig, resolve_config
from xclip_fast.reference import XCLIP


def create_model(variant_or_config: str | XCLIPConfig, *, frames: int | None = None, seed: int | None = None) -> XCLIP:
    """An X-CLIP model with random weights, in evaluation mode.

    Args:
        variant_or_config: "B/32", "B/16", "L/14", "L/14-336", or a configuration.
        frames: length of the temporal position table; by default 8, or what the configuration says.
        seed: makes the weights reproducible and leaves the global random state as it was.

    Raises:
        ValueError: no variant has this name, or ``frames`` is not a positive integer.
    """
    config = resolve_config(variant_or_config, frames)
    if seed is None:
        return XCLIP(config).eval()
    with torch.random.fork_rng(devices=[]):
        # torch.manual_seed would reseed every accelerator too
        torch.default_generator.manual_seed(seed)
        return XCLIP(config).eval()
