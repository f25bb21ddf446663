"""optimize and restore on models of others: same answers, same gradients, and not a trace afterwards."""

from __future__ import annotations

import copy
from types import SimpleNamespace

import pytest
import torch
from numerics import (
    PUBLISHED,
    assert_gradients,
    assert_within,
    model_allowance,
    randomise_parameters,
    relative_error,
)
from torch import Tensor, nn

import xclip_fast
from xclip_fast import ops

transformers = pytest.importorskip("transformers")

BACKENDS = ["torch", "triton"]
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def huggingface(frames: int = 4, patch: int = 16, heads: int = 2, activation: str = "quick_gelu", **more) -> nn.Module:
    """A small X-CLIP of transformers with random weights everywhere."""
    width = 64 * heads
    text = {
        "hidden_size": 64,
        "intermediate_size": 256,
        "num_hidden_layers": 2,
        "num_attention_heads": 1,
        "vocab_size": 99,
        "eos_token_id": 98,
        "bos_token_id": 97,
        "pad_token_id": 0,
    }
    vision = {
        "hidden_size": width,
        "intermediate_size": 4 * width,
        "num_hidden_layers": 2,
        "num_attention_heads": heads,
        "mit_hidden_size": 64,
        "mit_intermediate_size": 256,
        "mit_num_attention_heads": 1,
        "image_size": 48,
        "patch_size": patch,
        "num_frames": frames,
        "hidden_act": activation,
        **more,
    }
    config = transformers.XCLIPConfig(
        text_config=text, vision_config=vision, projection_dim=64, prompt_num_attention_heads=1
    )
    return randomise_parameters(transformers.XCLIPModel(config)).eval().to(DEVICE)


def arguments(frames: int = 4, videos: int = 2) -> dict[str, Tensor]:
    tokens = torch.randint(1, 97, (3, 6), device=DEVICE)
    tokens[:, -1] = 98
    return {"input_ids": tokens, "pixel_values": torch.randn(videos, frames, 3, 48, 48, device=DEVICE)}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("shape", [(4, 16, 2), (3, 24, 1), (8, 12, 1), (1, 16, 1)], ids=str)
def test_parity_of_a_hugging_face_model(shape: tuple[int, int, int], backend: str) -> None:
    model = huggingface(*shape)
    inputs = arguments(shape[0])

    def run(model: nn.Module, inputs: dict[str, Tensor]) -> tuple[Tensor, tuple[Tensor | None, ...]]:
        logits = model(**inputs).logits_per_video
        parameters = [p for p in model.parameters() if p.requires_grad]
        return logits, torch.autograd.grad(logits.sum(), parameters, allow_unused=True)

    exact = copy.deepcopy(model).double()
    expected, truth = run(exact, inputs | {"pixel_values": inputs["pixel_values"].double()})
    _, plain = run(model, inputs)
    report = xclip_fast.optimize(model)
    assert len([kind for kind in report.replaced.values() if kind == "XCLIPVisionEncoderLayer"]) == 2
    with ops.backend(backend):
        found, grads = run(model, inputs)
    assert_within(found, expected, PUBLISHED, what=f"optimized Hugging Face {backend}")
    assert_gradients(grads, plain, truth)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_parity_without_gradients(dtype: torch.dtype) -> None:
    model, inputs = huggingface().to(dtype), arguments()
    inputs["pixel_values"] = inputs["pixel_values"].to(dtype)
    exact = copy.deepcopy(model).double()
    with torch.no_grad(), ops.backend("torch"):
        truth = exact(**inputs | {"pixel_values": inputs["pixel_values"].double()}).logits_per_video
        plain = relative_error(model(**inputs).logits_per_video, truth)
        xclip_fast.optimize(model)
        found = model(**inputs).logits_per_video
    assert relative_error(found, truth) <= model_allowance(plain, dtype)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("recorded", [False, True], ids=["no_grad", "grad"])
def test_what_a_projection_was_given_beside_its_weight_counts(recorded: bool, backend: str) -> None:
    model, inputs = huggingface(), arguments()
    layers = model.vision_model.encoder.layers

    class Adapted(nn.Module):
        def __init__(self, inner: nn.Linear) -> None:
            super().__init__()
            self.inner, self.added = inner, nn.Linear(inner.in_features, inner.out_features).to(DEVICE)

        def forward(self, x: Tensor) -> Tensor:
            return self.inner(x) + self.added(x)

    layers[0].self_attn.q_proj = Adapted(layers[0].self_attn.q_proj)
    layers[1].message_attn.v_proj = Adapted(layers[1].message_attn.v_proj)
    layers[1].self_attn.k_proj.register_forward_hook(lambda module, given, result: 2 * result)
    with torch.set_grad_enabled(recorded), ops.backend(backend):
        expected = model(**inputs).logits_per_video
        xclip_fast.optimize(model)
        assert relative_error(model(**inputs).logits_per_video, expected) <= PUBLISHED


def test_autocast_gives_what_it_gives_without() -> None:
    model, inputs = huggingface(), arguments()
    truth = model(**inputs).logits_per_video
    with torch.no_grad(), ops.backend("torch"), torch.autocast(DEVICE, torch.bfloat16):
        plain = relative_error(model(**inputs).logits_per_video, truth)
        xclip_fast.optimize(model)
        assert relative_error(model(**inputs).logits_per_video, truth) <= model_allowance(plain, torch.bfloat16)


def test_restore_leaves_no_trace() -> None:
    model = huggingface()
    inputs = arguments()
    before, names = model(**inputs).logits_per_video, list(model.state_dict())
    attributes = [set(vars(module)) for module in model.modules()]
    report = xclip_fast.optimize(model)
    assert list(model.state_dict()) == names
    assert relative_error(model(**inputs).logits_per_video, before) <= PUBLISHED
    assert xclip_fast.restore(model) == len(report.replaced)
    assert torch.equal(model(**inputs).logits_per_video, before)
    assert [set(vars(module)) for module in model.modules()] == attributes
    assert xclip_fast.restore(model) == 0


def test_a_second_call_changes_nothing() -> None:
    model = huggingface()
    first = xclip_fast.optimize(model)
    second = xclip_fast.optimize(model)
    assert not second.replaced
    assert second.already == first.replaced
    assert "replaced before" in str(second)
    assert "2 x XCLIPVisionEncoderLayer" in str(first)


def test_only_this_instance_is_touched() -> None:
    model, other = huggingface(), huggingface()
    inputs = arguments()
    expected = other(**inputs).logits_per_video
    xclip_fast.optimize(model)
    assert torch.equal(other(**inputs).logits_per_video, expected)
    assert "forward" not in vars(other.vision_model.encoder.layers[0])


def test_a_copy_runs_on_its_own_weights() -> None:
    model = huggingface()
    xclip_fast.optimize(model)
    twin = copy.deepcopy(model)
    inputs = arguments()
    expected = twin(**inputs).logits_per_video
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    assert torch.equal(twin(**inputs).logits_per_video, expected)


def test_vision_model_alone() -> None:
    model = huggingface().vision_model
    pixels = arguments()["pixel_values"].flatten(0, 1)
    expected = model(pixel_values=pixels).last_hidden_state
    xclip_fast.optimize(model)
    assert relative_error(model(pixel_values=pixels).last_hidden_state, expected) <= PUBLISHED


def test_another_activation_keeps_its_perceptron() -> None:
    model = huggingface(activation="gelu")
    inputs = arguments()
    expected = model(**inputs).logits_per_video
    report = xclip_fast.optimize(model)
    vision = [name for name, kind in report.replaced.items() if kind == "XCLIPMLP" and "vision_model" in name]
    assert not vision
    assert relative_error(model(**inputs).logits_per_video, expected) <= PUBLISHED


def test_drop_path_in_training_is_left_to_the_original() -> None:
    model = huggingface(drop_path_rate=0.5)
    xclip_fast.optimize(model)
    model.train()
    inputs = arguments()
    assert not torch.equal(model(**inputs).logits_per_video, model(**inputs).logits_per_video)


def test_gradient_checkpointing_still_works() -> None:
    model = huggingface()
    inputs = arguments()
    xclip_fast.optimize(model)
    parameters = list(model.vision_model.encoder.parameters())
    plain = torch.autograd.grad(model(**inputs).logits_per_video.sum(), parameters, allow_unused=True)
    model.train()
    model.gradient_checkpointing_enable()
    again = torch.autograd.grad(model(**inputs).logits_per_video.sum(), parameters, allow_unused=True)
    assert all(torch.equal(a, b) for a, b in zip(plain, again, strict=True) if a is not None)


def test_frames_that_do_not_fit_are_refused() -> None:
    model = huggingface(frames=4)
    xclip_fast.optimize(model)
    with pytest.raises(ValueError, match="built for clips of 4 frames, found 6 frames"):
        model(**arguments(frames=3))


def test_nothing_to_replace_is_an_error() -> None:
    with pytest.raises(ValueError, match="nothing to optimize in Linear"):
        xclip_fast.optimize(nn.Linear(2, 2))


class CrossFramelAttentionBlock(nn.Module):
    """The names and shapes of the official block (spelled as upstream), with PyTorch's own attention."""

    def __init__(self, width: int, heads: int, frames: int) -> None:
        super().__init__()
        self.T = frames
        self.message_fc = nn.Linear(width, width)
        self.message_ln = nn.LayerNorm(width)
        self.message_attn = nn.MultiheadAttention(width, heads)
        self.attn = nn.MultiheadAttention(width, heads)
        self.ln_1 = nn.LayerNorm(width)
        self.drop_path = nn.Identity()
        self.mlp = nn.Sequential()
        self.mlp.c_fc = nn.Linear(width, 4 * width)
        self.mlp.gelu = xclip_fast.reference.transformer.QuickGELU()
        self.mlp.c_proj = nn.Linear(4 * width, width)
        self.ln_2 = nn.LayerNorm(width)

    def forward(self, x: Tensor) -> Tensor:
        length, _, width = x.shape
        message = self.message_fc(x[0].view(-1, self.T, width)).transpose(0, 1)
        normed = self.message_ln(message)
        message = message + self.message_attn(normed, normed, normed, need_weights=False)[0]
        extended = torch.cat([x, message.transpose(0, 1).reshape(1, -1, width)])
        normed = self.ln_1(extended)
        x = (extended + self.attn(normed, normed, normed, need_weights=False)[0])[:length]
        return x + self.mlp(self.ln_2(x))


@pytest.mark.parametrize("backend", BACKENDS)
def test_parity_of_official_blocks(backend: str) -> None:
    model = nn.Sequential(*(CrossFramelAttentionBlock(128, 2, 3) for _ in range(2)))
    randomise_parameters(model).to(DEVICE)
    x = torch.randn(10, 6, 128, device=DEVICE, requires_grad=True)
    expected = model(x)
    upstream = torch.randn_like(expected)
    plain = torch.autograd.grad(expected, [x, *model.parameters()], upstream)
    exact, wide = copy.deepcopy(model).double(), x.detach().double().requires_grad_()
    truth = torch.autograd.grad(exact(wide), [wide, *exact.parameters()], upstream.double())
    report = xclip_fast.optimize(model)
    assert list(report.replaced) == ["0", "1"]
    with ops.backend(backend):
        found = model(x)
        grads = torch.autograd.grad(found, [x, *model.parameters()], upstream)
    assert_within(found, expected, PUBLISHED, what=f"optimized official {backend}")
    assert_gradients(grads, plain, truth)
    xclip_fast.restore(model)
    assert torch.equal(model(x), expected)


def test_a_class_of_the_same_name_without_the_parts_is_left_alone() -> None:
    stranger = type("XCLIPMLP", (nn.Module,), {})()
    stranger.config = SimpleNamespace()
    with pytest.raises(ValueError, match="nothing to optimize"):
        xclip_fast.optimize(nn.Sequential(stranger))
