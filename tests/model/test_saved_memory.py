"""What a training step keeps for its backward pass, and the kernels a forward pass launches: counted, not timed."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import xclip_fast
from xclip_fast import VARIANTS, layers, ops, reference
from xclip_fast.bench.memory import saved_bytes

ROOT = Path(__file__).parents[2]


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


@pytest.mark.parametrize("path", ["cpu, float32", "cpu, bfloat16", "gpu"])
@pytest.mark.slow
def test_a_step_keeps_at_most_six_tenths_of_eager(path: str) -> None:
    pytest.importorskip("transformers")
    from xclip_fast.bench.huggingface import HuggingFace, model_of
    from xclip_fast.bench.run import make_case
    from xclip_fast.bench.setting import Setting

    # three of twelve blocks weigh the rest of the model heavier than all of them would
    config = replace(VARIANTS["B/32"], vision_layers=3, text_layers=1, vocab_size=514)
    dtype = torch.bfloat16 if "bfloat16" in path else torch.float32
    case = make_case("model", "B/32", batch=2, dtype=str(dtype).removeprefix("torch."), direction="train")
    eager = HuggingFace(model_of(config, "sdpa"), Setting(case, config, {})).train()
    video, text = torch.randn(2, 8, 3, 224, 224, dtype=dtype), torch.randn(5, 512, dtype=dtype)
    theirs = saved_bytes(lambda: eager(video, text), eager)
    device = "meta" if path == "gpu" else "cpu"
    with torch.device(device), ops.backend("triton" if path == "gpu" else "torch"):
        model = xclip_fast.create_model(config).to(dtype).train()
        video, text = video.to(device), text.to(device)
        ours = saved_bytes(lambda: model.logits(model.encode_video(video), text), model)
    print(f"{path}: {ours / theirs:.3f} of what eager keeps")
    assert 0.2 * theirs < ours <= 0.6 * theirs


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
