"""What Hugging Face's models do beside answering, they do on the fused ops too: each beside the bare model."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from numerics import relative_error
from test_optimize import arguments, huggingface
from torch import Tensor, nn

import xclip_fast
from xclip_fast import patched

transformers = pytest.importorskip("transformers")

LIMIT = 1e-5
INPUTS = arguments()
FRAMES = INPUTS["pixel_values"].flatten(0, 1)


def pair(attention: str = "sdpa", **more: Any) -> tuple[nn.Module, nn.Module]:
    """The same model bare and optimised."""
    bare = huggingface(**more)
    bare.set_attn_implementation(attention)
    model = copy.deepcopy(bare)
    xclip_fast.optimize(model)
    return bare, model


def same(found: Any, expected: Any) -> None:
    """The same structure, shapes and numbers."""
    if isinstance(expected, Tensor):
        assert found.shape == expected.shape
        assert relative_error(found, expected) <= LIMIT
    elif isinstance(expected, dict):
        assert list(found) == list(expected)
        same(tuple(found.values()), tuple(expected.values()))
    elif isinstance(expected, tuple):
        assert len(found) == len(expected)
        for one, other in zip(found, expected, strict=True):
            same(one, other)
    else:
        assert found is expected


RECORDED = [
    {"output_attentions": True},
    {"output_hidden_states": True},
    dict.fromkeys(("output_attentions", "output_hidden_states"), True),
]


@pytest.mark.parametrize("way", ["argument", "configuration"])
@pytest.mark.parametrize("recorded", RECORDED, ids=["attentions", "hidden states", "both"])
def test_recorded_outputs(recorded: dict[str, bool], way: str) -> None:
    outputs = []
    for model in pair("eager"):
        options = recorded if way == "argument" else {}
        if way == "configuration":
            for name in recorded:
                for config in (model.config, model.config.vision_config, model.config.text_config):
                    setattr(config, name, True)
        outputs.append((model(**INPUTS, **options), model.vision_model(FRAMES, **options)))
    expected, found = outputs
    same(found, expected)
    for name in recorded:
        kept = getattr(found[1], name.removeprefix("output_"))
        assert len(kept) == 2 + (name == "output_hidden_states")
        assert all(isinstance(part, Tensor) for part in kept)


def test_the_fused_form_runs_again_after_a_recording(monkeypatch: pytest.MonkeyPatch) -> None:
    bare, model = pair("eager")
    calls = []

    def counted(*given: Any) -> Tensor:
        calls.append(given)
        return xclip_fast.ops.frame_attention(*given)

    monkeypatch.setattr(patched, "frame_attention", counted)
    with torch.no_grad():
        model(**INPUTS, output_attentions=True)
        assert not calls
        same(model(**INPUTS).logits_per_video, bare(**INPUTS).logits_per_video)
    assert len(calls) == 2


def test_gradients_are_kept_of_recorded_outputs() -> None:
    grads = []
    for model in pair("eager"):
        output = model.vision_model(FRAMES, output_attentions=True, output_hidden_states=True)
        kept = [*output.hidden_states, *output.attentions]
        for part in kept:
            part.retain_grad()
        output.last_hidden_state.square().mean().backward()
        grads.append(tuple(part.grad for part in kept))
    assert all(grad is not None and grad.any() for grad in grads[1])
    same(grads[1], grads[0])


def test_tuples_and_outputs_hold_the_same() -> None:
    bare, model = pair()
    expected, found = (one(**INPUTS, return_dict=False, return_loss=False) for one in (bare, model))
    assert len(found) == len(expected)
    same(found[0], model(**INPUTS).to_tuple()[0])


def test_losses() -> None:
    bare, model = pair()
    texts = {"input_ids": INPUTS["input_ids"][:2], "pixel_values": INPUTS["pixel_values"]}
    same(model(**texts, return_loss=True).loss, bare(**texts, return_loss=True).loss)


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_every_attention_implementation_gives_the_same(attention: str) -> None:
    bare, model = pair(attention)
    same(model(**INPUTS).logits_per_video, bare(**INPUTS).logits_per_video)
    model.set_attn_implementation("eager" if attention == "sdpa" else "sdpa")
    same(model(**INPUTS).logits_per_video, bare(**INPUTS).logits_per_video)


def test_attention_of_somebody_else_is_called() -> None:
    calls = []

    def somebody(module: nn.Module, *given: Any, **options: Any) -> Any:
        calls.append(module)
        output, weights = transformers.models.x_clip.modeling_x_clip.eager_attention_forward(module, *given, **options)
        return 2 * output, weights

    transformers.AttentionInterface.register("somebody", somebody)
    bare, model = pair("somebody")
    expected = bare(**INPUTS).logits_per_video
    asked = len(calls)
    same(model(**INPUTS).logits_per_video, expected)
    assert len(calls) == 2 * asked


def test_eager_attention_has_second_derivatives() -> None:
    penalties = []
    for model in pair("eager"):
        pixels = FRAMES.clone().requires_grad_()
        output = model.vision_model(pixels).last_hidden_state.square().mean()
        (first,) = torch.autograd.grad(output, pixels, create_graph=True)
        penalties.append(torch.autograd.grad(first.square().sum(), pixels)[0])
    assert penalties[1].any()
    assert relative_error(penalties[1], penalties[0]) <= 1e-4


def test_answers_are_deterministic_and_training_mode_changes_none() -> None:
    _, model = pair()
    first = model(**INPUTS).logits_per_video
    assert torch.equal(model(**INPUTS).logits_per_video, first)
    assert torch.equal(model.train()(**INPUTS).logits_per_video, first)


def test_a_video_answers_alone_as_in_a_batch() -> None:
    _, model = pair()
    many = model(**INPUTS).logits_per_video
    one = model(input_ids=INPUTS["input_ids"], pixel_values=INPUTS["pixel_values"][1:]).logits_per_video
    assert relative_error(one, many[1:]) <= LIMIT


def test_dropout_in_training_is_left_to_the_original() -> None:
    bare, model = pair(attention_dropout=0.5)
    outputs = []
    for one in (bare, model):
        torch.manual_seed(0)
        outputs.append(one.train().vision_model(FRAMES).last_hidden_state)
    same(outputs[1], outputs[0])
    assert not torch.equal(model.vision_model(FRAMES).last_hidden_state, outputs[1])


def test_the_embeddings_of_words_can_be_resized() -> None:
    bare, model = pair()
    table = model.text_model.get_input_embeddings()
    assert table is model.text_model.embeddings.token_embedding
    for one in (bare, model):
        torch.manual_seed(0)
        one.text_model.resize_token_embeddings(120)
    assert model.text_model.get_input_embeddings().weight.shape[0] == 120
    same(model(**INPUTS).logits_per_video, bare(**INPUTS).logits_per_video)


def test_saved_and_loaded(tmp_path) -> None:
    bare, model = pair()
    model.save_pretrained(tmp_path)
    loaded = transformers.XCLIPModel.from_pretrained(tmp_path).eval()
    assert [type(module) for module in loaded.modules()] == [type(module) for module in bare.modules()]
    assert torch.equal(loaded(**INPUTS).logits_per_video, bare(**INPUTS).logits_per_video)
    state = model.state_dict()
    assert list(state) == list(bare.state_dict())
    bare.load_state_dict(state)
    model.load_state_dict(bare.state_dict())
    xclip_fast.optimize(loaded)
    assert torch.equal(loaded(**INPUTS).logits_per_video, model(**INPUTS).logits_per_video)


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing(reentrant: bool) -> None:
    grads = []
    for model in pair():
        model.train()
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
        assert model.is_gradient_checkpointing
        INPUTS["pixel_values"].requires_grad_(reentrant)
        model(**INPUTS).logits_per_video.square().mean().backward()
        grads.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
        model.gradient_checkpointing_disable()
        assert not model.is_gradient_checkpointing
    INPUTS["pixel_values"].requires_grad_(False)
    expected, found = grads
    assert found.keys() == expected.keys()
    least = 1e-2 * max(grad.norm() for grad in expected.values())
    for name, grad in expected.items():
        assert (found[name] - grad).norm() <= 5 * LIMIT * max(grad.norm(), least), name


@pytest.mark.parametrize("recorded", [{}, *RECORDED[:2]], ids=["plain", "attentions", "hidden states"])
@pytest.mark.slow
def test_compiled_whole(recorded: dict[str, bool]) -> None:
    bare, model = pair("eager")
    torch.compiler.reset()
    with torch.no_grad():
        if recorded:
            # transformers puts its hooks on when it is first asked, which cannot be compiled
            model(**INPUTS, **recorded)
        expected = bare.vision_model(FRAMES, **recorded)
        compiled = torch.compile(model.vision_model, fullgraph=not recorded, backend="aot_eager")
        same(compiled(FRAMES, **recorded), expected)


@pytest.mark.slow
def test_exported() -> None:
    bare, model = pair()
    program = torch.export.export(model.vision_model, (FRAMES,))
    same(program.module()(FRAMES).last_hidden_state, bare.vision_model(FRAMES).last_hidden_state)


def test_training_overfits_as_without() -> None:
    curves = []
    texts = {"input_ids": INPUTS["input_ids"][:2], "pixel_values": INPUTS["pixel_values"]}
    for model in pair():
        model.train()
        optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
        losses = []
        for _ in range(8):
            optimizer.zero_grad()
            loss = model(**texts, return_loss=True).loss
            loss.backward()
            optimizer.step()
            losses.append(loss.detach())
        curves.append(torch.stack(losses))
    assert relative_error(curves[1], curves[0]) <= 1e-3
    assert curves[1][-1] < curves[1][0]
