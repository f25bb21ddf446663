"""What a training step keeps for its backward pass, and the kernels a forward pass launches: counted, not timed."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from xclip_fast import VARIANTS, layers, ops, reference

ROOT = Path(__file__).parents[2]


def saved_bytes(run, module: nn.Module) -> int:
    """Bytes of the distinct tensors a forward pass keeps for the backward pass, weights left out."""
    weights = {id(p) for p in module.parameters()} | {p.untyped_storage()._cdata for p in module.parameters()}
    kept: dict[int, int] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if id(tensor) not in weights and storage._cdata not in weights:
            kept[storage._cdata] = max(kept.get(storage._cdata, 0), storage.nbytes())
        alive.append(tensor)
        return tensor

    alive: list[torch.Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        alive.append(run())
    return sum(kept.values())


@pytest.mark.parametrize("variant", ["B/32", "B/16", "L/14"])
def test_a_block_keeps_at_most_six_tenths_of_eager(variant: str) -> None:
    transformers = pytest.importorskip("transformers")
    from transformers.models.x_clip.modeling_x_clip import XCLIPVisionEncoderLayer

    config = VARIANTS[variant]
    width, heads, tokens = config.vision_width, config.vision_heads, config.patches + 1
    settings = transformers.XCLIPVisionConfig(
        hidden_size=width, intermediate_size=4 * width, num_attention_heads=heads, num_frames=8
    )
    settings._attn_implementation = "sdpa"
    eager = XCLIPVisionEncoderLayer(settings)
    x = torch.randn(8, tokens, width, requires_grad=True)
    theirs = saved_bytes(lambda: eager(x, None), eager)
    with torch.device("meta"), ops.backend("triton"):
        block = layers.CrossFrameBlock(width, heads)
        meta = torch.empty(1, 8, tokens, width, requires_grad=True)
        ours = saved_bytes(lambda: block(meta), block)
    print(f"{variant}: {ours / theirs:.3f} of what eager keeps")
    assert 0.2 * theirs < ours <= 0.6 * theirs
    # of the tokens: two residual streams, queries, keys and values, what attention mixed, and four times the
    # pre-activation; the rest is of messages, statistics and the log-sum-exp
    assert 10 <= ours / meta.nbytes < 10.2
    with torch.no_grad():
        block = layers.CrossFrameBlock(width, heads)
    tokens_of_clip = torch.randn(1, 8, tokens, width, requires_grad=True)
    plain = saved_bytes(lambda: reference.CrossFrameBlock.forward(block, tokens_of_clip), block)
    # as docs/layers.md has it
    assert round(plain / ours, 1) == 2.1


@pytest.mark.slow
def test_launches_are_far_below_hugging_face() -> None:
    pytest.importorskip("transformers")
    command = [sys.executable, "-m", "benchmarks", "launches", "--json"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    counted = json.loads(done.stdout)
    assert set(counted) == set(VARIANTS)
    for inputs in counted.values():
        for launches in inputs.values():
            assert launches["engine"] < 0.5 * launches["hf-sdpa"]
            assert launches["layers"] < 0.6 * launches["hf-sdpa"]
