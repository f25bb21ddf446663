"""One check for every op: forward and gradients of the kernels against float64, by the rule of ``numerics``."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import pytest
import torch
from numerics import assert_parity, poisoned_memory
from torch import Tensor

ON_GPU = torch.cuda.is_available()
DEVICE = "cuda" if ON_GPU else "cpu"
# the interpreter that stands in for a GPU computes bfloat16 wrongly
KERNEL_DTYPES = [torch.float32, torch.float16] + ([torch.bfloat16] if ON_GPU else [])
kernel_dtypes = pytest.mark.parametrize("dtype", KERNEL_DTYPES, ids=lambda dtype: str(dtype).removeprefix("torch."))

Inputs = Mapping[str, object]
Op = Callable[..., object]


def random(*shape: int, dtype: torch.dtype, mean: float = 0.0, scale: float = 1.0) -> Tensor:
    """A normal tensor on the test device; drawn in float32, so that every dtype sees the same numbers, rounded."""
    return (torch.randn(*shape) * scale + mean).to(DEVICE, dtype)


def check_op(
    op: Op,
    inputs: Inputs,
    *,
    what: str,
    backend: str = "triton",
    gradients: bool = True,
    fixed: tuple[str, ...] = (),
    ceiling: float | None = None,
) -> None:
    """Compare an op on a backend with its reference: outputs, and gradients of every floating point tensor.

    Args:
        op: called as ``op(**inputs, backend=...)``; returns a tensor or several.
        inputs: arguments by name; the layout of the tensors is kept.
        what: name of the op in the parity table.
        backend: the one under test.
        gradients: compare the gradients too.
        fixed: floating point inputs whose gradient a test of its own looks at.
        ceiling: see ``numerics.assert_parity``.
    """
    wanted = [n for n, x in inputs.items() if isinstance(x, Tensor) and x.is_floating_point() and n not in fixed]
    truth = _run(op, _doubled(inputs), wanted, "reference", gradients)
    plain = _run(op, inputs, wanted, "reference", gradients)
    with poisoned_memory():
        found = _run(op, inputs, wanted, backend, gradients)
    assert found.keys() == truth.keys()
    for name in truth:
        assert found[name].dtype == plain[name].dtype, f"{name}: {found[name].dtype}, expected {plain[name].dtype}"
        assert_parity(found[name], plain[name], truth[name], what=f"{what} {name}", ceiling=ceiling)


def _doubled(inputs: Inputs) -> Inputs:
    return {n: x.double() if isinstance(x, Tensor) and x.is_floating_point() else x for n, x in inputs.items()}


def _run(op: Op, inputs: Inputs, wanted: list[str], backend: str, gradients: bool) -> dict[str, Tensor]:
    arguments = {n: x.detach() if isinstance(x, Tensor) else x for n, x in inputs.items()}
    leaves = [arguments[name].requires_grad_(gradients) for name in wanted]  # type: ignore[union-attr]
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


def layouts(tensor: Tensor) -> dict[str, Tensor]:
    """The same values in layouts that trip kernels: offset storage, padded rows, transposed and channels-last-like."""
    flat = tensor.new_empty(tensor.numel() + 3)
    offset = flat[3:].view(tensor.shape).copy_(tensor)
    wide = tensor.new_empty(*tensor.shape[:-1], tensor.shape[-1] + 5)
    padded = wide[..., 2:-3].copy_(tensor)
    strided = tensor.new_empty(*tensor.shape[:-1], 2 * tensor.shape[-1])[..., ::2].copy_(tensor)
    transposed = tensor.transpose(0, -1).contiguous().transpose(0, -1)
    return {"offset": offset, "padded": padded, "strided": strided, "transposed": transposed}
