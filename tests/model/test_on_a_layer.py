"""Whatever is put on a module of the library's own layers counts there as it does on the reference."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from numerics import randomise_parameters, relative_error
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_hook

import xclip_fast
from xclip_fast import XCLIPConfig, reference

TINY = XCLIPConfig(
    image_size=32,
    patch_size=16,
    vision_width=64,
    vision_layers=2,
    embed_dim=64,
    vocab_size=64,
    text_width=64,
    text_layers=2,
    frames=3,
    mit_layers=2,
    prompt_layers=2,
)
LIMIT = 1e-5
ORACLE = randomise_parameters(reference.XCLIP(TINY)).eval()
NAMES = [name for name, module in ORACLE.named_modules() if not isinstance(module, nn.ModuleList)]
LINEARS = [name for name, module in ORACLE.named_modules() if isinstance(module, nn.Linear)]
NORMS = [name for name, module in ORACLE.named_modules() if isinstance(module, nn.LayerNorm)]


def pair() -> tuple[nn.Module, nn.Module]:
    """The same weights in the oracle and in the fused model."""
    model = xclip_fast.create_model(TINY)
    model.load_state_dict(ORACLE.state_dict())
    return copy.deepcopy(ORACLE), model


def inputs() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    video = torch.randn(2, 3, 3, 32, 32, generator=generator)
    return video, torch.randint(0, 64, (3, 5), generator=generator)


def run(model: nn.Module) -> tuple[Tensor, dict[str, Tensor]]:
    """Logits and all gradients."""
    model.zero_grad()
    logits = model(*inputs())
    logits.square().mean().backward()
    return logits.detach(), {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def wrong(put: Callable[[nn.Module, str], Any], names: list[str], *, moves: bool = True) -> dict[str, str]:
    """Where the fused model answers otherwise than the oracle with the same put on the same module."""
    bare = ORACLE(*inputs())
    found = {}
    for name in names:
        (expected, truth), (logits, grads) = (run(put(model, name) or model) for model in pair())
        worst = max((relative_error(grads[key], truth[key]), key) for key in truth if key in grads)
        if moves and relative_error(bare, expected) < 1e-4:
            found[name] = "no effect on the oracle"
        elif relative_error(logits, expected) > LIMIT:
            found[name] = f"logits err {relative_error(logits, expected):.2g}"
        elif grads.keys() != truth.keys() or worst[0] > 5 * LIMIT:
            found[name] = f"gradients err {worst}, missing {sorted(truth.keys() ^ grads.keys())}"
    return found


def replace(model: nn.Module, name: str, module: nn.Module) -> None:
    owner, _, last = name.rpartition(".")
    setattr(model.get_submodule(owner), last, module)


def changed(output: Any) -> Any:
    """Other numbers, which no norm undoes."""
    if isinstance(output, tuple):
        return tuple(None if part is None else changed(part) for part in output)
    return 1.25 * output + 0.3 * torch.linspace(-1, 1, output.shape[-1]) ** 3


def forward_hook(model: nn.Module, name: str) -> None:
    model.get_submodule(name).register_forward_hook(lambda module, given, output: changed(output))


def pre_hook(model: nn.Module, name: str) -> None:
    def shift(module: nn.Module, given: tuple[Any, ...], options: dict[str, Any]) -> tuple[Any, ...]:
        def shifted(x: Tensor) -> Tensor:
            return changed(x) if x.is_floating_point() else x.flip(-1)

        if given:
            return (shifted(given[0]), *given[1:]), options
        first = next(iter(options))
        return given, options | {first: shifted(options[first])}

    model.get_submodule(name).register_forward_pre_hook(shift, with_kwargs=True)


def backward_hook(model: nn.Module, name: str) -> None:
    def double(module: nn.Module, grad_input: Any, grad_output: Any) -> Any:
        return tuple(None if grad is None else 2 * grad for grad in grad_input)

    model.get_submodule(name).register_full_backward_hook(double)


def backward_pre_hook(model: nn.Module, name: str) -> None:
    def double(module: nn.Module, grad_output: Any) -> Any:
        return tuple(None if grad is None else 2 * grad for grad in grad_output)

    model.get_submodule(name).register_full_backward_pre_hook(double)


def other_forward(model: nn.Module, name: str) -> None:
    module = model.get_submodule(name)
    module.forward = lambda *given, inner=module.forward, **options: changed(inner(*given, **options))


class Wrapped(nn.Module):
    """A module that stands for another, and has none of its attributes."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, *given: Any, **options: Any) -> Any:
        return changed(self.inner(*given, **options))


def wrapper(model: nn.Module, name: str) -> None:
    if name:
        replace(model, name, Wrapped(model.get_submodule(name)))
    else:
        other_forward(model, name)


def subclass(model: nn.Module, name: str) -> None:
    module = model.get_submodule(name)
    base = type(module)

    class Changed(base):  # type: ignore[valid-type, misc]
        def forward(self, *given: Any, **options: Any) -> Any:
            return changed(super().forward(*given, **options))

    module.__class__ = Changed


PUTS = [forward_hook, pre_hook, other_forward, wrapper, subclass]


@pytest.mark.parametrize("put", PUTS, ids=lambda put: put.__name__)
@pytest.mark.slow
def test_what_changes_a_module_counts_on_each_of_them(put: Callable[[nn.Module, str], None]) -> None:
    assert wrong(put, NAMES) == {}


@pytest.mark.parametrize("put", [backward_hook, backward_pre_hook], ids=lambda put: put.__name__)
@pytest.mark.slow
def test_what_changes_gradients_counts(put: Callable[[nn.Module, str], None]) -> None:
    assert wrong(put, [name for name in NAMES if name], moves=False) == {}


@pytest.mark.parametrize(
    "way", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))], ids=["deepcopy", "pickle"]
)
def test_copies_run_on_their_own_weights(way: Callable[[nn.Module], nn.Module]) -> None:
    _, model = pair()
    twin, expected = way(model), model(*inputs())
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    assert torch.equal(twin(*inputs()), expected)


def recorded(model: nn.Module, names: list[str]) -> dict[str, Any]:
    seen: dict[str, Any] = {}
    for name in names:
        hook = lambda module, given, output, name=name: seen.__setitem__(name, output)  # noqa: E731
        model.get_submodule(name).register_forward_hook(hook)
    with torch.no_grad():
        model(*inputs())
    return seen


@pytest.mark.parametrize("together", [False, True], ids=["one", "all"])
@pytest.mark.slow
def test_hooks_see_what_they_see_on_the_reference(together: bool) -> None:
    differing = []
    for names in [NAMES] if together else [[name] for name in NAMES]:
        expected, found = (recorded(model, names) for model in pair())
        assert list(expected) == list(found)
        for name in names:
            ours, theirs = (
                torch.cat([part.flatten(-1) for part in x], -1) if isinstance(x, tuple) and name != "visual" else x
                for x in (found[name], expected[name])
            )
            ours, theirs = (x[0] if isinstance(x, tuple) else x for x in (ours, theirs))
            if ours.shape != theirs.shape or relative_error(ours, theirs) > LIMIT:
                differing.append(name)
    assert differing == []


def test_hooks_on_every_module_are_heard_everywhere() -> None:
    calls = []
    for model in pair():
        names = {module: name for name, module in model.named_modules()}
        seen: list[str] = []
        handle = register_module_forward_hook(
            lambda module, given, output, seen=seen, names=names: seen.append(names[module])
        )
        try:
            with torch.no_grad():
                model(*inputs())
        finally:
            handle.remove()
        calls.append(seen)
    assert sorted(calls[0]) == sorted(calls[1])
