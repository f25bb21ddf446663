"""A training step under autocast with class texts that were encoded once, outside of it."""

from __future__ import annotations

import copy

import pytest
import torch
from configs import SMALL
from interpreted_bfloat16 import interpreted_bfloat16
from numerics import model_allowance, relative_error
from torch import Tensor

from xclip_fast import create_model, ops, reference
from xclip_fast.model import XCLIP

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
TEXT = "token_embedding", "positional_embedding", "transformer.", "ln_final", "text_projection"


def _frozen_text(model: reference.XCLIP) -> reference.XCLIP:
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(not name.startswith(TEXT))
    return model


def _step(model: reference.XCLIP, video: Tensor, text: Tensor) -> Tensor:
    """Logits of a step whose gradients are left in the model."""
    logits = model.logits(model.encode_video(video), text)
    torch.nn.functional.cross_entropy(logits.float(), torch.arange(len(video), device=DEVICE)).backward()
    return logits.detach()


@pytest.fixture
def models() -> tuple[XCLIP, reference.XCLIP]:
    model = _frozen_text(create_model(SMALL, seed=0).to(DEVICE))
    other = _frozen_text(reference.XCLIP(SMALL).eval().to(DEVICE))
    other.load_state_dict(model.state_dict())
    return model, other


@pytest.mark.parametrize("backend", ["reference", "torch", "triton"])
def test_texts_encoded_once_in_float32_meet_videos_under_autocast(
    models: tuple[XCLIP, reference.XCLIP], backend: str
) -> None:
    model, other = models
    generator = torch.Generator().manual_seed(0)
    # of two videos the gradients of some biases nearly cancel: what is left of them is rounding
    video = torch.randn(4, SMALL.frames, 3, SMALL.image_size, SMALL.image_size, generator=generator).to(DEVICE)
    tokens = torch.randint(1, SMALL.vocab_size, (5, 8), generator=generator).to(DEVICE)
    with torch.no_grad():
        text = other.encode_text(tokens)
    exact = copy.deepcopy(other).double()
    truth = _step(exact, video.double(), text.double())
    with torch.autocast(DEVICE, torch.bfloat16):
        plain = _step(other, video, text)
        with interpreted_bfloat16(), ops.backend(backend):
            found = _step(model, video, text)
    assert found.dtype == plain.dtype == torch.bfloat16
    assert relative_error(found, truth) <= model_allowance(relative_error(plain, truth), torch.bfloat16)
    trained = {name: x.grad for name, x in model.named_parameters() if x.requires_grad}
    for name, grad in trained.items():
        right, near = exact.get_parameter(name).grad, other.get_parameter(name).grad
        assert grad.dtype == torch.float32
        limit = model_allowance(relative_error(near, right), torch.bfloat16, gradients=True)
        assert relative_error(grad, right) <= limit, name
