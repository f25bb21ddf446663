"""When a formulation in PyTorch's operators may have a backward pass of its own, which makes again what is cheap."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from xclip_fast.ops._backends import is_transformed

_PLAIN = (Tensor, nn.Parameter)


def keeps_less(*tensors: Tensor | None) -> bool:
    """Whether ``torch.autograd.Function`` is seen by nobody who needs the single operators.

    Compilers choose by themselves what to keep, a tracer cannot look inside, transforms and forward-mode derivatives
    know PyTorch's operators alone, and tensors of other classes have rules of their own.
    """
    if torch.compiler.is_compiling() or torch._C._get_tracing_state() is not None or is_transformed():
        return False
    return all(tensor is None or type(tensor) in _PLAIN for tensor in tensors)


def differentiable_gradients(
    formula: Callable[..., Tensor], tensors: Sequence[Tensor], grad: Tensor
) -> tuple[Tensor | None, ...]:
    """Gradients of a formula that have gradients themselves, for ``create_graph=True``: None where none is recorded."""
    recorded = [tensor for tensor in tensors if tensor.requires_grad]
    found = iter(torch.autograd.grad(formula(*tensors), recorded, grad, create_graph=True))
    return tuple(next(found) if tensor.requires_grad else None for tensor in tensors)
