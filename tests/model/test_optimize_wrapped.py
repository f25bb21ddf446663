"""What others put on a model counts before and after optimize, which leaves nothing that they trip over."""

from __future__ import annotations

import copy
import io
import logging
import multiprocessing
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from numerics import relative_error
from test_on_a_layer import (
    backward_hook,
    backward_pre_hook,
    changed,
    forward_hook,
    other_forward,
    pre_hook,
    subclass,
    wrapper,
)
from test_optimize import arguments, huggingface
from torch import Tensor, nn
from torch.nn.utils import parametrize

import xclip_fast
from xclip_fast.patched import Patched

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
@pytest.mark.slow
def test_what_changes_a_module_counts_in_both_orders(put: Callable[[nn.Module, str], None]) -> None:
    # a wrapper has not the attributes by which Hugging Face's own code reads some modules
    read = ("self_attn", "message_attn", "mlp", "layers.0", "layers.1", "cross_attn") if put is wrapper else ()
    assert wrong(put, [name for name in NAMES if not name.endswith(read)]) == {}


@pytest.mark.parametrize("put", [backward_hook, backward_pre_hook], ids=lambda put: put.__name__)
@pytest.mark.slow
def test_what_changes_gradients_counts_in_both_orders(put: Callable[[nn.Module, str], None]) -> None:
    assert wrong(put, NAMES, moves=False) == {}


def logits(model: nn.Module) -> Tensor:
    with torch.no_grad():
        return model(**INPUTS).logits_per_video


def optimised() -> nn.Module:
    model = copy.deepcopy(BARE)
    xclip_fast.optimize(model)
    return model


def by_pickle(model: nn.Module) -> nn.Module:
    return pickle.loads(pickle.dumps(model))


def by_torch_save(model: nn.Module) -> nn.Module:
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


def by_cloudpickle(model: nn.Module) -> nn.Module:
    cloudpickle = pytest.importorskip("cloudpickle")
    return pickle.loads(cloudpickle.dumps(model))


COPIES = [copy.deepcopy, by_pickle, by_torch_save, by_cloudpickle]


@pytest.mark.parametrize("way", COPIES, ids=lambda way: way.__name__)
def test_copies_are_optimised_models_of_their_own(way: Callable[[nn.Module], nn.Module]) -> None:
    model = optimised()
    expected = logits(model)
    twin = way(model)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    assert torch.equal(logits(twin), expected)
    assert list(twin.state_dict()) == list(BARE.state_dict())
    assert xclip_fast.optimize(twin).replaced == {}
    assert xclip_fast.restore(twin) == 9
    assert [type(module) for module in twin.modules()] == [type(module) for module in BARE.modules()]
    assert torch.equal(logits(twin), logits(BARE))


def _send_logits(model: nn.Module, given: dict[str, Tensor], results: Any) -> None:
    with torch.no_grad():
        results.put(model(**given).logits_per_video.numpy())


@pytest.mark.slow
def test_a_spawned_process_takes_an_optimised_model() -> None:
    context = multiprocessing.get_context("spawn")
    results = context.Queue()
    model = optimised()
    process = context.Process(target=_send_logits, args=(model, INPUTS, results))
    process.start()
    found = torch.from_numpy(results.get(timeout=120))
    process.join(60)
    assert relative_error(found, logits(model)) <= LIMIT


def test_a_replica_runs_on_its_own_weights() -> None:
    block = optimised().vision_model.encoder.layers[0]
    replica = block._replicate_for_data_parallel()
    replica._modules = {name: copy.deepcopy(module) for name, module in block._modules.items()}
    x = torch.randn(4, 10, 128)
    with torch.no_grad():
        expected = block(x, None)
        for parameter in block.parameters():
            parameter.zero_()
        assert torch.equal(replica(x, None), expected)


def test_classes_keep_their_names_and_their_kind() -> None:
    model = optimised()
    for ours, theirs in zip(model.modules(), BARE.modules(), strict=True):
        assert isinstance(ours, type(theirs))
        assert (type(ours).__name__, type(ours).__module__) == (type(theirs).__name__, type(theirs).__module__)
        assert vars(ours).keys() == vars(theirs).keys()
    assert repr(model) == repr(BARE)


def test_another_forward_on_an_instance_runs_before_during_and_after() -> None:
    calls = []

    def watch(module: nn.Module) -> None:
        inner = module.forward
        module.forward = lambda *given, **options: calls.append(module) or inner(*given, **options)

    model = copy.deepcopy(BARE)
    first, second = model.vision_model.encoder.layers
    watch(first)
    report = xclip_fast.optimize(model)
    assert report.kept["vision_model.encoder.layers.0"] == "it has a forward of its own"
    watch(second)
    watch(second.mlp)
    before = first.forward, second.forward, second.mlp.forward
    assert relative_error(logits(model), logits(BARE)) <= LIMIT
    assert calls == [first, second, second.mlp]
    xclip_fast.restore(model)
    assert (first.forward, second.forward, second.mlp.forward) == before
    assert torch.equal(logits(model), logits(BARE))
    assert calls == 2 * [first, second, second.mlp]


def test_a_forward_that_a_class_was_given_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    model = optimised()
    cls = type(BARE.vision_model.encoder.layers[0].mlp)
    inner = cls.forward
    monkeypatch.setattr(cls, "forward", lambda self, x: changed(inner(self, x)))
    assert relative_error(logits(model), logits(BARE)) <= LIMIT
    late = copy.deepcopy(BARE)
    report = xclip_fast.optimize(late)
    assert "has another forward" in report.kept["vision_model.encoder.layers.0.mlp"]
    assert relative_error(logits(late), logits(BARE)) <= LIMIT


def test_a_class_that_a_model_was_given_since_keeps_its_part() -> None:
    model = optimised()
    mlp = model.vision_model.encoder.layers[0].mlp
    parametrize.register_parametrization(mlp.fc1, "weight", nn.Identity())
    wrap = type("Wrapped", (Outer, type(mlp)), {})
    mlp.__class__ = wrap
    expected = logits(model)
    xclip_fast.restore(model)
    assert isinstance(mlp, Outer)
    assert not isinstance(mlp, Patched)
    assert relative_error(logits(model), expected) <= LIMIT


class Outer(nn.Module):
    """What another library puts before the class of a module."""


def test_the_report_and_the_log_say_what_runs_by_itself(caplog: pytest.LogCaptureFixture) -> None:
    model = copy.deepcopy(BARE)
    forward_hook(model, "vision_model.encoder.layers.0.self_attn.q_proj")
    wrapper(model, "vision_model.encoder.layers.1.mlp.fc1")
    report = xclip_fast.optimize(model)
    assert report.kept == {
        "vision_model.encoder.layers.0.self_attn.q_proj": "hooks",
        "vision_model.encoder.layers.1.mlp.fc1": "a test_on_a_layer.Wrapped",
    }
    assert "1 x runs by itself, hooks: vision_model.encoder.layers.0.self_attn.q_proj" in str(report)
    with caplog.at_level(logging.INFO, logger="xclip_fast"):
        for _ in range(3):
            logits(model)
    assert [record.getMessage() for record in caplog.records] == [
        "XCLIPVisionEncoderLayer: self_attn.q_proj runs by itself: hooks",
        "XCLIPMLP: fc1 runs by itself: a test_on_a_layer.Wrapped",
    ]


def test_a_hook_counts_from_when_it_is_put_on_to_when_it_is_taken_off() -> None:
    model = optimised()
    expected = logits(model)
    handle = model.vision_model.encoder.layers[1].mlp.fc1.register_forward_hook(lambda module, given, x: changed(x))
    assert relative_error(logits(model), expected) > 1e-4
    handle.remove()
    assert torch.equal(logits(model), expected)
