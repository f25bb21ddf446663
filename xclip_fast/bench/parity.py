"""One comparison for every op: outputs and gradients of a backend against float64, beside plain torch's own error."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from xclip_fast.numerics import allowance, exact_float32, longest_sum, parity_error, poisoned_memory

Op = Callable[..., object]


@dataclass(frozen=True)
class Comparison:
    """One output or gradient: its relative error, that of plain torch in the same dtype, and what is allowed."""

    name: str
    error: float
    torch_error: float
    allowance: float

    @property
    def passed(self) -> bool:
        """Whether the error is allowed; one that is not a number is not."""
        return self.error <= self.allowance


def compare(
    op: Op, inputs: Mapping[str, object], backend: str, *, gradients: bool, ceiling: float | None = None
) -> Iterator[Comparison]:
    """Outputs of an op on a backend, and gradients of all its floating point tensors, against its reference.

    float32 is float32 in all three, without TF32.

    Args:
        op: called as ``op(**inputs, backend=...)``; returns a tensor or several.
        inputs: arguments by name; the layout of the tensors is kept. Memory of outputs is filled with NaN first.
        backend: the one under test; the reference runs in the same dtype and in float64 beside it.
        gradients: compare the gradients too.
        ceiling: see ``numerics.allowance``.
    """
    wanted = floating(inputs)
    with exact_float32():
        truth = run_op(op, doubled(inputs), wanted, "reference", gradients)
        plain = run_op(op, inputs, wanted, "reference", gradients)
        with poisoned_memory():
            found = run_op(op, inputs, wanted, backend, gradients)
    for name, exact in truth.items():
        torch_error = parity_error(plain[name], exact)
        allowed = allowance(torch_error, plain[name].dtype, longest_sum(inputs), ceiling)
        # a result of another dtype is a fault whatever its numbers
        error = parity_error(found[name], exact) if found[name].dtype == plain[name].dtype else float("nan")
        yield Comparison(name, error, torch_error, allowed)


def same_bits(first: Mapping[str, Tensor], second: Mapping[str, Tensor]) -> bool:
    """Whether two runs gave the same results, every bit of them."""
    return all(torch.equal(result, second[name]) for name, result in first.items())


def floating(inputs: Mapping[str, object]) -> list[str]:
    """Names of the arguments that have gradients."""
    return [name for name, x in inputs.items() if isinstance(x, Tensor) and x.is_floating_point()]


def doubled(inputs: Mapping[str, object]) -> dict[str, object]:
    """The same arguments with their floating point tensors in float64."""
    return {name: _double(x) for name, x in inputs.items()}


def _double(x: Any) -> Any:
    if isinstance(x, tuple) and hasattr(x, "_fields"):
        # weights by name
        return type(x)(*map(_double, x))
    return x.double() if isinstance(x, Tensor) and x.is_floating_point() else x


def run_op(op: Op, inputs: Mapping[str, object], wanted: list[str], backend: str, gradients: bool) -> dict[str, Tensor]:
    """Outputs by number, and gradients of the ``wanted`` arguments, of one call on one backend."""
    arguments = {n: x.detach() if isinstance(x, Tensor) else x for n, x in inputs.items()}
    leaves = [arguments[name].requires_grad_(gradients) for name in wanted]  # type: ignore[attr-defined]
    result = op(**arguments, backend=backend)
    outputs = [result] if isinstance(result, Tensor) else list(result)  # type: ignore[call-overload]
    found = {f"output {index}": output for index, output in enumerate(outputs)}
    if gradients:
        # the same upstream gradients for every run: numbers that float16 and bfloat16 hold exactly
        generator = torch.Generator().manual_seed(1)
        upstream = [
            (torch.randn(output.shape, generator=generator) * 16).round().div(16).to(output.device, output.dtype)
            for output in outputs
        ]
        grads = torch.autograd.grad(outputs, leaves, upstream)
        found |= {f"d {name}": grad for name, grad in zip(wanted, grads, strict=True)}
    return {name: tensor.detach() for name, tensor in found.items()}
