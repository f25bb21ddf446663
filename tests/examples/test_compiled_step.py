"""A training step is one graph to a compiler: bytes in, a loss over soft targets out, and its gradients the same."""

from __future__ import annotations

import shutil

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

import xclip_fast

TINY = xclip_fast.XCLIPConfig(
    image_size=32,
    patch_size=16,
    vision_width=64,
    vision_layers=1,
    embed_dim=64,
    vocab_size=64,
    text_width=64,
    text_layers=1,
    frames=3,
    mit_layers=1,
    prompt_layers=1,
)
VIDEOS = torch.randint(256, (2, 3, 32, 32, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
TOKENS = torch.tensor([[62, 9, 63], [62, 17, 63], [62, 5, 63]])
HARD = torch.tensor([2, 0])
SOFT = torch.tensor([[0.1, 0.2, 0.7], [0.8, 0.1, 0.1]])


class Step(nn.Module):
    """What is compiled of a training step."""

    def __init__(self) -> None:
        super().__init__()
        self.model = xclip_fast.create_model(TINY, seed=0).train()

    def forward(self, videos: Tensor, tokens: Tensor, targets: Tensor) -> Tensor:
        return cross_entropy(self.model(videos, tokens).float(), targets, label_smoothing=0.1)

    def of_features(self, videos: Tensor, text: Tensor, targets: Tensor) -> Tensor:
        """The same with encoded texts (K, E)."""
        return cross_entropy(self.model.logits(self.model.encode_video(videos), text).float(), targets)


@pytest.fixture(autouse=True)
def _fresh_compiler() -> None:
    torch.compiler.reset()


@pytest.mark.parametrize("autocast", [False, True], ids=["float32", "autocast"])
@pytest.mark.parametrize("targets", [HARD, SOFT], ids=["labels", "mixed"])
@pytest.mark.slow
def test_a_step_has_no_graph_break(targets: Tensor, autocast: bool) -> None:
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        explained = torch._dynamo.explain(Step())(VIDEOS, TOKENS, targets)
    assert (explained.graph_count, explained.graph_break_count) == (1, 0), explained.break_reasons


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
@pytest.mark.timeout(600)
@pytest.mark.slow
def test_gradients_of_a_compiled_step_are_those_of_the_step(backend: str) -> None:
    if backend == "inductor" and shutil.which("g++") is None and shutil.which("clang++") is None:
        pytest.skip("there is no C++ compiler")
    step = Step()
    # the texts encoded before, as where their tower is frozen: C++ is compiled for minutes otherwise
    call, texts = (step.of_features, torch.randn(3, 64)) if backend == "inductor" else (step, TOKENS)
    found = []
    for run in (call, torch.compile(call, fullgraph=True, backend=backend)):
        step.zero_grad()
        loss = run(VIDEOS, texts, SOFT)
        loss.backward()
        grads = {name: p.grad.clone() for name, p in step.named_parameters() if p.grad is not None}
        found.append((loss.detach(), grads))
    (expected, truth), (loss, grads) = found
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-6)
    assert grads.keys() == truth.keys()
    least = 1e-2 * max(grad.norm() for grad in truth.values())
    for name, grad in grads.items():
        assert (grad - truth[name]).norm() <= 1e-4 * max(truth[name].norm(), least), name
