"""How an op is registered: once for everybody who traces, and a short way past that for everybody else.

A registered op goes through PyTorch's dispatcher, and through Python at each of its stations: 100 us, ten times what
the kernel needs. Only compilers, modes and tensor subclasses have a use for it. Other calls go straight to the
launcher, or to one ``torch.autograd.Function`` where a gradient is wanted, with the same forward and backward.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from importlib import import_module
from inspect import signature
from typing import Any

import torch
from torch import Tensor, nn
from torch.library import custom_op, infer_schema, register_autograd
from torch.utils.flop_counter import register_flop_formula

from xclip_fast.ops._backends import runs_kernels
from xclip_fast.ops._fake import register_fake

_TENSORS = frozenset((Tensor, nn.Parameter))
_ORDINARY = _TENSORS | {type(None), bool, int, float, str, list, torch.dtype}


def fused_op(
    name: str,
    *,
    launcher: str | Callable[..., Any] | None,
    fake: Callable[..., Any],
    save: Callable[..., None] | None = None,
    backward: Callable[..., Any] | None = None,
    flops: Callable[..., int] | None = None,
    refusal: Callable[..., str | None] | None = None,
) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Register ``torch.ops.xclip_fast.<name>``; decorates what it computes where its kernels do not run.

    The decorated function gives the op its signature, typed as a schema needs it, and becomes its call: arguments by
    position, the first a tensor. Outputs never alias inputs or each other.

    Args:
        name: of the op.
        launcher: full name of a function in ``xclip_fast.kernels``, of the same signature; or a function that calls
            some; or None where all its kernels are PyTorch's.
        fake: empty outputs, as a fake kernel of ``torch.library`` gives them.
        save, backward: ``setup_context`` and ``backward`` of ``torch.library.register_autograd``. A backward pass calls
            ops of its own, made here too.
        flops: operations of the GEMMs by the shapes of the arguments, as ``register_flop_formula`` takes it; none
            without.
        refusal: the reason why the kernels cannot serve these arguments, or None; its parameters are some of the op's.
    """

    def register(formulation: Callable[..., Any]) -> Callable[..., Any]:
        parameters = signature(formulation).parameters
        refused = None if refusal is None else picked(refusal, list(parameters))
        defaults = [parameter.default for parameter in parameters.values()]
        floats = [place for place, one in enumerate(parameters.values()) if one.annotation in (float, "float")]

        def run(*arguments: Any) -> Any:
            # as the dispatcher does it: a whole number is another argument to Triton
            if any(type(arguments[place]) is int for place in floats):
                arguments = tuple(float(x) if place in floats else x for place, x in enumerate(arguments))
            if launcher is None or not runs_kernels(arguments[0]) or (refused and refused(arguments) is not None):
                return formulation(*arguments)
            launch = _launcher(launcher) if isinstance(launcher, str) else launcher
            return launch(*arguments)

        def dispatched(*arguments: Any) -> Any:
            # the dispatcher leaves defaults out
            return run(*arguments, *defaults[len(arguments) :])

        qualified = f"xclip_fast::{name}"
        custom_op(qualified, dispatched, mutates_args=(), schema=infer_schema(formulation, mutates_args=()))
        register_fake(qualified)(fake)
        registered = getattr(torch.ops.xclip_fast, name).default
        register_flop_formula(registered.overloadpacket)(flops or _no_gemm)
        if backward is None or save is None:
            return _calls(run, None, registered)
        register_autograd(qualified, backward, setup_context=save)

        def forward(ctx: Any, *arguments: Any) -> Any:
            outputs = run(*arguments)
            save(ctx, arguments, outputs)
            return outputs

        parts = {"forward": staticmethod(forward), "backward": staticmethod(backward)}
        function: Any = type(name, (torch.autograd.Function,), parts)
        # without what ``apply`` does for transforms, which never come here
        return _calls(run, super(torch.autograd.Function, function).apply, registered)

    return register


def _calls(run: Callable[..., Any], with_gradient: Any, registered: Any) -> Callable[..., Any]:
    """The call of an op: past the dispatcher, unless somebody listens there."""

    def call(*arguments: Any) -> Any:
        first = arguments[0]
        # a negated view, which a gradient can be, has another sign in memory
        if torch.compiler.is_compiling() or _watched() or first.is_meta or first.is_neg():
            return registered(*arguments)
        # a tensor of another class, fake, sharded or quantised, has rules of its own
        if not _ORDINARY.issuperset(map(type, arguments)):
            return registered(*arguments)
        if torch.is_grad_enabled():
            for argument in arguments:
                if type(argument) in _TENSORS and argument.requires_grad:
                    # an op without a backward pass says so itself, when one is asked for
                    return (with_gradient or registered)(*arguments)
        return run(*arguments)

    return call


def _watched() -> bool:
    """Whether modes, transforms, a tracer or a profiler are to see the op."""
    return (
        torch._C._len_torch_dispatch_stack() > 0
        or torch._C._len_torch_function_stack() > 0
        or torch._C._are_functorch_transforms_active()
        or torch.autograd._profiler_enabled()
        or torch._C._get_tracing_state() is not None
    )


def picked(function: Callable[..., Any], names: list[str]) -> Callable[[tuple[Any, ...]], Any]:
    """A function of some of these names, called with the values of all of them."""
    places = [names.index(name) for name in signature(function).parameters]
    return lambda values: function(*[values[place] for place in places])


@cache
def _launcher(path: str) -> Callable[..., Any]:
    module, _, function = path.rpartition(".")
    # Triton is imported by the first call, not with the package
    found: Callable[..., Any] = getattr(import_module(module), function)
    return found


def _no_gemm(*args: object, **kwargs: object) -> int:
    return 0
