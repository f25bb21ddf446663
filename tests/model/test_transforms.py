"""Function transforms, forward-mode derivatives, exported graphs, checkpointing: as on the reference, or refused."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from numerics import relative_error
from test_on_a_layer import TINY, inputs, pair
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.func import functional_call, grad, hessian, jacrev, jvp, vjp, vmap

import xclip_fast
from xclip_fast import layers, ops

VIDEO, TOKENS = inputs()
TANGENT = torch.randn(VIDEO.shape, generator=torch.Generator().manual_seed(1))


def weights(model: nn.Module) -> dict[str, Tensor]:
    return {name: parameter.detach() for name, parameter in model.named_parameters()}


def loss(model: nn.Module, parameters: dict[str, Tensor], video: Tensor) -> Tensor:
    return functional_call(model, parameters, (video, TOKENS)).square().mean()


def of_weights(model: nn.Module) -> Any:
    return tuple(grad(lambda parameters: loss(model, parameters, VIDEO))(weights(model)).values())


def of_weights_for_each_video(model: nn.Module) -> Any:
    one = grad(lambda parameters, video: loss(model, parameters, video[None]))
    return tuple(vmap(one, in_dims=(None, 0))(weights(model), VIDEO).values())


def along_pixels(model: nn.Module) -> Any:
    return jvp(lambda video: model(video, TOKENS), (VIDEO,), (TANGENT,))


def along_weights(model: nn.Module) -> Any:
    generator = torch.Generator().manual_seed(2)
    tangents = {name: torch.randn(x.shape, generator=generator) for name, x in weights(model).items()}
    run = lambda parameters: functional_call(model, parameters, (VIDEO, TOKENS))  # noqa: E731
    return jvp(run, (weights(model),), (tangents,))


def back(model: nn.Module) -> Any:
    output, pull = vjp(lambda video: model(video, TOKENS), VIDEO)
    return output, *pull(torch.ones_like(output))


def of_the_scale(model: nn.Module) -> Any:
    def run(scale: Tensor) -> Tensor:
        return functional_call(model, {"logit_scale": scale}, (VIDEO, TOKENS)).mean()

    scale = model.logit_scale.detach()
    return jacrev(run)(scale), hessian(run)(scale)


def of_a_gradient(model: nn.Module) -> Any:
    penalty = lambda video: grad(lambda x: model(x, TOKENS).square().mean())(video).square().sum()  # noqa: E731
    return (grad(penalty)(VIDEO),)


def dual_numbers(model: nn.Module) -> Any:
    with forward_ad.dual_level():
        output = model(forward_ad.make_dual(VIDEO, TANGENT), TOKENS)
        return (forward_ad.unpack_dual(output).tangent,)


TRANSFORMS = [
    of_weights,
    of_weights_for_each_video,
    along_pixels,
    along_weights,
    back,
    of_the_scale,
    of_a_gradient,
    dual_numbers,
]


@pytest.mark.parametrize("transform", TRANSFORMS, ids=lambda transform: transform.__name__)
def test_transforms_give_the_derivatives_of_the_reference(transform: Callable[[nn.Module], Any]) -> None:
    oracle, model = pair()
    expected, found = transform(oracle), transform(model)
    assert len(found) == len(expected)
    least = 1e-2 * max(part.norm() for part in expected)
    for one, other in zip(found, expected, strict=True):
        assert (one - other).norm() <= 1e-4 * max(other.norm(), least)
        assert other.norm() > 0 or one.norm() <= 1e-4 * least


@pytest.mark.parametrize(
    "transform", [of_weights, along_pixels, dual_numbers], ids=lambda transform: transform.__name__
)
@pytest.mark.parametrize("backend", ["triton", "extension"])
def test_a_backend_that_knows_no_transform_says_so(backend: str, transform: Callable[[nn.Module], Any]) -> None:
    _, model = pair()
    with ops.backend(backend), pytest.raises(ValueError, match=r"torch\.func .* plain torch alone; use backend="):
        transform(model)


def test_gradients_of_an_optimised_model() -> None:
    pytest.importorskip("transformers")
    from test_optimize import arguments, huggingface

    bare, given, found = huggingface(), arguments(), []
    model = copy.deepcopy(bare)
    xclip_fast.optimize(model)
    for one in (bare, model):
        run = lambda parameters, one=one: functional_call(one, parameters, (), given).logits_per_video.mean()  # noqa: E731
        found.append(grad(run)(weights(one)))
    least = 1e-2 * max(part.norm() for part in found[0].values())
    for name, expected in found[0].items():
        assert (found[1][name] - expected).norm() <= 1e-4 * max(expected.norm(), least), name


@pytest.mark.parametrize("recorded", [False, True], ids=["no_grad", "grad"])
def test_tangents_of_an_optimised_model_with_eager_attention(recorded: bool) -> None:
    pytest.importorskip("transformers")
    from test_optimize import arguments, huggingface

    bare = huggingface()
    bare.set_attn_implementation("eager")
    given, tangents = arguments(), []
    pixels = given["pixel_values"].flatten(0, 1)
    model = copy.deepcopy(bare)
    xclip_fast.optimize(model)
    for one in (bare, model):
        with torch.set_grad_enabled(recorded), forward_ad.dual_level():
            output = one.vision_model(forward_ad.make_dual(pixels, pixels.cos())).last_hidden_state
            tangents.append(forward_ad.unpack_dual(output).tangent)
    assert relative_error(tangents[1], tangents[0]) <= 1e-5


AUTO = torch.export.Dim.AUTO
DYNAMIC = {
    "videos": ({0: AUTO}, None, (5, 3), (3, 5)),
    "frames": ({1: AUTO}, None, (2, 7), (3, 5)),
    "fewer frames": ({1: AUTO}, None, (2, 2), (3, 5)),
    "texts": (None, {0: AUTO}, (2, 3), (9, 5)),
    "length of texts": (None, {1: AUTO}, (2, 3), (3, 11)),
    "all": ({0: AUTO, 1: AUTO}, {0: AUTO, 1: AUTO}, (4, 5), (2, 7)),
}


@pytest.mark.parametrize("strict", [False, True], ids=["traced", "strict"])
@pytest.mark.parametrize("case", DYNAMIC.values(), ids=DYNAMIC)
@pytest.mark.slow
def test_exported_graphs_take_other_sizes(case: Any, strict: bool) -> None:
    *dynamic, clip, texts = case
    oracle, model = pair()
    video, tokens = torch.randn(*clip, 3, 32, 32), torch.randint(0, 64, texts)
    program = torch.export.export(model, (VIDEO, TOKENS), dynamic_shapes=tuple(dynamic), strict=strict).module()
    assert relative_error(program(VIDEO, TOKENS), oracle(VIDEO, TOKENS)) <= 1e-5
    assert relative_error(program(video, tokens), oracle(video, tokens)) <= 1e-5


@pytest.mark.slow
def test_exported_graphs_take_bytes() -> None:
    oracle, model = pair()
    first, other = (
        torch.randint(0, 256, (batch, frames, 32, 32, 3), dtype=torch.uint8) for batch, frames in ((2, 3), (3, 6))
    )
    dynamic = {0: AUTO, 1: AUTO}, {0: AUTO}
    program = torch.export.export(model, (first, TOKENS), dynamic_shapes=dynamic).module()
    assert relative_error(program(other, TOKENS[:2]), oracle(other, TOKENS[:2])) <= 1e-5


@pytest.mark.parametrize("reentrant", [None, False, True])
def test_gradient_checkpointing_recomputes_each_block(reentrant: bool | None) -> None:
    _, model = pair()
    model.train()
    model(VIDEO, TOKENS).square().mean().backward()
    expected = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
    model.zero_grad()
    model.gradient_checkpointing_enable(None if reentrant is None else {"use_reentrant": reentrant})
    assert model.is_gradient_checkpointing
    calls = []
    blocks = [module for module in model.modules() if isinstance(module, layers.CrossFrameBlock)]
    for block in blocks:
        block.register_forward_pre_hook(lambda module, given: calls.append(module))
    video = VIDEO.clone().requires_grad_(bool(reentrant))
    model(video, TOKENS).square().mean().backward()
    assert len(calls) == 2 * TINY.vision_layers
    for name, parameter in model.named_parameters():
        assert relative_error(parameter.grad, expected[name]) <= 1e-4, name
    model.gradient_checkpointing_disable()
    assert not model.is_gradient_checkpointing
    assert torch.equal(model.eval()(VIDEO, TOKENS), pair()[1](VIDEO, TOKENS))


def test_checkpointing_keeps_less_for_the_backward_pass() -> None:
    kept = []
    for checkpointing in (False, True):
        _, model = pair()
        model.train()
        if checkpointing:
            model.gradient_checkpointing_enable()
        sizes: list[int] = []
        with torch.autograd.graph.saved_tensors_hooks(lambda x, sizes=sizes: sizes.append(x.numel()) or x, lambda x: x):
            model(VIDEO, TOKENS)
        kept.append(sum(sizes))
    assert kept[1] < 0.6 * kept[0]
