"""The one rule of the fused paths: a weight is read past its module only where that is exactly the plain module.

Whatever else somebody put there, an adapter, a hook, a quantised weight, a shard, runs by its own ``forward``.
"""

from __future__ import annotations

import logging
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch._subclasses.functional_tensor import FunctionalTensor
from torch.nn.modules import module as torch_module

from xclip_fast.reference.transformer import QuickGELU

_log = logging.getLogger("xclip_fast")
_told: weakref.WeakKeyDictionary[nn.Module, set[str]] = weakref.WeakKeyDictionary()

# the last two are what compilers trace with
_DENSE = (nn.Parameter, Tensor, FakeTensor, FunctionalTensor)


class Plain:
    """What a fused op takes a module for: its class, its parameters, its parts. Nothing else may change its answer.

    Args:
        classes: a subclass is another class, for it can compute anything.
        parameters: names of the parameters it has; others are absent or None. Without any, none of its own is read.
        twin: what ``forward`` computes; a class with a ``forward`` of that very code is taken too.
        parts: the modules in it that are read.
    """

    def __init__(
        self, *classes: type[nn.Module], parameters: str = "", twin: Callable[..., Tensor] | None = None, **parts: Plain
    ) -> None:
        self.names = " or ".join(cls.__name__ for cls in classes)
        self.forwards: dict[type, Any] = {cls: cls.forward for cls in classes}
        self.parameters, self.twin = frozenset(parameters.split()), twin
        self.parts = tuple(parts.items())

    def fits(self, module: nn.Module | None) -> bool:
        """Whether a module is that, and nothing more."""
        if module is None or not self.takes(type(module)) or _has_hooks(module) or _has_other_forward(module):
            return False
        if self.parameters and not self._has_its_parameters(module):
            return False
        found = module._modules
        return all(part.fits(found.get(name)) for name, part in self.parts)

    def takes(self, cls: type) -> bool:
        """Whether modules of a class can be that."""
        forward = self.forwards.get(cls)
        if forward is None and self.twin is not None and cls not in self.forwards:
            forward = cls.forward if _same_code(cls.forward, self.twin) else None  # type: ignore[attr-defined]
            self.forwards[cls] = forward
        return forward is not None and cls.forward is forward  # type: ignore[attr-defined]

    def refusals(self, module: nn.Module | None, name: str) -> Iterator[tuple[str, str]]:
        """The modules in a module that are not that, by name, and why."""
        if module is None:
            yield name, "missing"
        elif not self.takes(type(module)):
            replaced = type(module) in self.forwards and self.forwards[type(module)] is not None
            yield name, f"the forward of {self.names} was replaced" if replaced else f"a {_full(type(module))}"
        elif (reason := _put_on(module)) is not None:
            yield name, reason
        elif _has_global_hooks():
            yield name, "hooks on every module"
        elif self.parameters and not self._has_its_parameters(module):
            yield name, _described(module)
        else:
            for inner, part in self.parts:
                yield from part.refusals(module._modules.get(inner), f"{name}.{inner}")

    def _has_its_parameters(self, module: nn.Module) -> bool:
        device = None
        seen = 0
        for name, parameter in module._parameters.items():
            if parameter is None:
                continue
            if name not in self.parameters or not _is_dense(parameter):
                return False
            if device is not None and parameter.device != device:
                return False
            device = parameter.device
            seen += 1
        return seen == len(self.parameters)


LINEAR = Plain(nn.Linear, parameters="weight bias")
LINEAR_WITHOUT_BIAS = Plain(nn.Linear, parameters="weight")
NORM = Plain(nn.LayerNorm, parameters="weight bias")
QUICK_GELU = Plain(QuickGELU, twin=QuickGELU.forward)


def is_plain(owner: nn.Module, **parts: Plain) -> bool:
    """Whether the parts of a module, given by name, are what a fused op takes them for; else the log says why once.

    Asked at each call, for hooks and adapters come and go; inside of a compiled graph it is settled while tracing.
    """
    modules = owner._modules
    if not _has_global_hooks():
        for name, part in parts.items():
            if not part.fits(modules.get(name)):
                break
        else:
            return True
    if not torch.compiler.is_compiling():
        _tell(owner, parts)
    return False


def refusals(owner: nn.Module, parts: dict[str, Plain]) -> dict[str, str]:
    """The modules in a module that are not what a fused op takes them for, by name, and why."""
    return {
        name: reason for part, plain in parts.items() for name, reason in plain.refusals(owner._modules.get(part), part)
    }


def first_oddity(model: nn.Module, is_known: Callable[[str, type], bool]) -> tuple[str, str] | None:
    """The first module of a model whose class is not known at its place, or that has something put on it, and what."""
    for name, module in model.named_modules():
        if module is not model and not is_known(name, type(module)):
            return name, f"a {_full(type(module))}"
        if (reason := _put_on(module)) is not None:
            return name, reason
        if not all(parameter is None or _is_dense(parameter) for parameter in module._parameters.values()):
            return name, _described(module)
    return None


def _put_on(module: nn.Module) -> str | None:
    if _has_other_forward(module):
        return "a forward of its own"
    return "hooks" if _has_hooks(module) else None


def _is_dense(parameter: Tensor) -> bool:
    return type(parameter) in _DENSE and parameter.layout is torch.strided


def _tell(owner: nn.Module, parts: dict[str, Plain]) -> None:
    told = _told.setdefault(owner, set())
    for name, reason in refusals(owner, parts).items():
        if name not in told:
            told.add(name)
            _log.info("%s: %s runs by itself: %s", type(owner).__name__, name, reason)


def _has_other_forward(module: nn.Module) -> bool:
    forward = module.__dict__.get("forward")
    if forward is None:
        return False
    # what remains where a wrapper was removed
    own = getattr(forward, "__func__", None) is type(module).forward and forward.__self__ is module
    return not own


def _has_hooks(module: nn.Module) -> bool:
    if module._forward_hooks and not all(map(_is_idle, module._forward_hooks.values())):
        return True
    return bool(module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks)


def _has_global_hooks() -> bool:
    if torch_module._global_backward_hooks or torch_module._global_backward_pre_hooks:
        return True
    if not torch_module._global_forward_hooks and not torch_module._global_forward_pre_hooks:
        return False
    hooks = [*torch_module._global_forward_hooks.values(), *torch_module._global_forward_pre_hooks.values()]
    return not all(map(_takes_notes, hooks))


def _takes_notes(hook: Any) -> bool:
    """Whether a hook on every module only notes which one runs, as PyTorch's FLOP counter does."""
    return getattr(hook, "__module__", None) == "torch.utils.module_tracker"


def _is_idle(hook: Any) -> bool:
    """Whether a hook is one that transformers leaves in place to record outputs, while nothing is recorded."""
    if getattr(hook, "__module__", None) != "transformers.utils.output_capturing":
        return False
    from transformers.utils.output_capturing import _active_collector

    return not _active_collector.get()


def _same_code(function: Any, twin: Any) -> bool:
    parts = ("co_code", "co_consts", "co_names", "co_argcount")
    theirs = getattr(function, "__code__", None)
    return theirs is not None and all(getattr(theirs, part) == getattr(twin.__code__, part) for part in parts)


def _full(cls: type) -> str:
    return f"{cls.__module__}.{cls.__qualname__}"


def _described(module: nn.Module) -> str:
    present = {name: parameter for name, parameter in module._parameters.items() if parameter is not None}
    odd = [
        f"its {name} is a {type(parameter).__name__} ({str(parameter.layout).removeprefix('torch.')})"
        for name, parameter in present.items()
        if not _is_dense(parameter)
    ]
    return ", ".join(odd) or f"its parameters are {', '.join(present) or 'none'}"
