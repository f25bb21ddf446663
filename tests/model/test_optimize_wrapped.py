"""What others put on a model counts before and after optimize, which leaves nothing that they trip over."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
from numerics import relative_error
from test_on_a_layer import (
    backward_hook,
    backward_pre_hook,
    forward_hook,
    other_forward,
    pre_hook,
    subclass,
    wrapper,
)
from test_optimize import arguments, huggingface
from torch import Tensor, nn

import xclip_fast

transformers = pytest.importorskip("transformers")

LIMIT = 1e-5
BARE = huggingface()
INPUTS = arguments()
PARTS = (
    "message_fc",
    "message_ln",
    "message_attn",
    "message_attn.q_proj",
    "message_attn.out_proj",
    "self_attn",
    "self_attn.k_proj",
    "self_attn.v_proj",
    "self_attn.out_proj",
    "layer_norm1",
    "layer_norm2",
    "mlp",
    "mlp.fc1",
    "mlp.activation_fn",
    "mlp.fc2",
    "drop_path",
    "",
)
# the class tokens of all frames are one before the first block, whose messages no query moves
NAMES = [f"vision_model.encoder.layers.1.{part}".rstrip(".") for part in PARTS]
NAMES += [
    "vision_model.encoder.layers.0",
    "vision_model.encoder.layers.0.mlp",
    "vision_model.encoder.layers.0.layer_norm1",
    "vision_model.encoder.layers.0.self_attn.v_proj",
    "vision_model.pre_layernorm",
    "text_model.encoder.layers.0.mlp.fc2",
    "text_model.encoder.layers.1.self_attn.q_proj",
    "mit.encoder.layers.0.mlp.fc1",
    "mit.encoder.layers.0.mlp",
    *(f"prompts_generator.decoder.1.cross_attn.{part}" for part in ("q_proj", "k_proj", "v_proj", "proj", "proj_drop")),
    "prompts_generator.decoder.0.cross_attn",
    "prompts_generator.decoder.0.mlp.1",
    "prompts_generator.decoder.0",
]
LINEARS = [name for name in NAMES if isinstance(BARE.get_submodule(name), nn.Linear)]


def run(model: nn.Module) -> tuple[Tensor, dict[str, Tensor]]:
    """Logits and all gradients."""
    model.zero_grad()
    logits = model(**INPUTS).logits_per_video
    logits.square().mean().backward()
    return logits.detach(), {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def differs(
    expected: tuple[Tensor, dict[str, Tensor]], found: tuple[Tensor, dict[str, Tensor]], limit: float = LIMIT
) -> str:
    """What differs between two runs, in words, or an empty string."""
    if relative_error(found[0], expected[0]) > limit:
        return f"logits err {relative_error(found[0], expected[0]):.2g}"
    if found[1].keys() != expected[1].keys():
        return f"gradients of {sorted(found[1].keys() ^ expected[1].keys())}"
    # some gradients are nothing but rounding: a bias of the keys moves no softmax
    least = 1e-2 * max(grad.norm() for grad in expected[1].values())
    errors = {
        name: ((found[1][name] - grad).norm() / max(grad.norm(), least)).item() for name, grad in expected[1].items()
    }
    worst = max(errors, key=errors.__getitem__)
    return f"gradient of {worst} errs {errors[worst]:.2g}" if errors[worst] > 5 * limit else ""


def wrong(put: Callable[[nn.Module, str], Any], names: list[str], *, moves: bool = True) -> dict[str, str]:
    """Where an optimised model answers otherwise, with something put on a module before or after optimize."""
    bare, found = run(BARE), {}
    for name in names:
        plain = copy.deepcopy(BARE)
        put(plain, name)
        expected = run(plain)
        if moves and relative_error(bare[0], expected[0]) < 1e-4:
            found[name] = "no effect"
        before = copy.deepcopy(BARE)
        put(before, name)
        xclip_fast.optimize(before)
        after = copy.deepcopy(BARE)
        xclip_fast.optimize(after)
        put(after, name)
        for order, model in (("before", before), ("after", after)):
            if difference := differs(expected, run(model)):
                found[f"{name}, put on {order}"] = difference
    return found


@pytest.mark.parametrize(
    "put", [forward_hook, pre_hook, other_forward, wrapper, subclass], ids=lambda put: put.__name__
)
def test_what_changes_a_module_counts_in_both_orders(put: Callable[[nn.Module, str], None]) -> None:
    # a wrapper has not the attributes by which Hugging Face's own code reads some modules
    read = ("self_attn", "message_attn", "mlp", "layers.0", "layers.1", "cross_attn") if put is wrapper else ()
    assert wrong(put, [name for name in NAMES if not name.endswith(read)]) == {}


@pytest.mark.parametrize("put", [backward_hook, backward_pre_hook], ids=lambda put: put.__name__)
def test_what_changes_gradients_counts_in_both_orders(put: Callable[[nn.Module, str], None]) -> None:
    assert wrong(put, NAMES, moves=False) == {}
