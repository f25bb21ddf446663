"""One check for every op: forward and gradients of the kernels against float64, by the rule of ``numerics``."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import product
from typing import Any

import pytest
import torch
from numerics import assert_parity, longest_sum, poisoned_memory
from torch import Tensor

from xclip_fast.bench.parity import Op, doubled, floating, run_op

ON_GPU = torch.cuda.is_available()
DEVICE = "cuda" if ON_GPU else "cpu"
KERNEL_DTYPES = [torch.float32, torch.float16, torch.bfloat16]
kernel_dtypes = pytest.mark.parametrize("dtype", KERNEL_DTYPES, ids=lambda dtype: str(dtype).removeprefix("torch."))


def each_tile(values: Iterable[Any]) -> list[tuple[Any, torch.dtype]]:
    """Values with dtypes: float32, and one of float16 and bfloat16 in turn.

    Kernels are cut by the bytes of an element: the two halves see the same tiles, and neighbours take one each.
    """
    halves = torch.float16, torch.bfloat16
    return [(value, dtype) for index, value in enumerate(values) for dtype in (torch.float32, halves[index % 2])]


def covering(first: Sequence[Any], second: Sequence[Any], third: Sequence[Any]) -> list[tuple[Any, Any, Any]]:
    """Every pair of values of three axes that choose nothing together, in as many cases as the first two have."""
    assert len(third) <= min(len(first), len(second)), "a longer axis comes first, else pairs are left out"
    return [(a, b, third[(i + j) % len(third)]) for (i, a), (j, b) in product(enumerate(first), enumerate(second))]


def random(*shape: int, dtype: torch.dtype, mean: float = 0.0, scale: float = 1.0) -> Tensor:
    """A normal tensor on the test device; drawn in float32, so that every dtype sees the same numbers, rounded."""
    return (torch.randn(*shape) * scale + mean).to(DEVICE, dtype)


@contextmanager
def saved_tensors() -> Iterator[tuple[list[Tensor], list[int]]]:
    """What is saved for backward passes inside the context, and the places in that list that they read, in order."""
    kept: list[Tensor] = []
    read: list[int] = []

    def keep(tensor: Tensor) -> int:
        kept.append(tensor.detach())
        return len(kept) - 1

    def give(place: int) -> Tensor:
        read.append(place)
        return kept[place]

    with torch.autograd.graph.saved_tensors_hooks(keep, give):
        yield kept, read


def check_op(
    op: Op,
    inputs: Mapping[str, object],
    *,
    what: str,
    backend: str = "triton",
    gradients: bool = True,
    fixed: tuple[str, ...] = (),
    ceiling: float | None = None,
    distance: float = 1.0,
) -> None:
    """Compare an op on a backend with its reference: outputs, and gradients of every floating point tensor.

    Args:
        op: called as ``op(**inputs, backend=...)``; returns a tensor or several.
        inputs: arguments by name; the layout of the tensors is kept.
        what: name of the op in the parity table.
        backend: the one under test.
        gradients: compare the gradients too.
        fixed: floating point inputs whose gradient a test of its own looks at.
        ceiling: see ``numerics.assert_parity``; eight times as much in bfloat16, whose steps are that much larger.
        distance: see ``xclip_fast.numerics.allowance``.
    """
    wanted = [name for name in floating(inputs) if name not in fixed]
    truth = run_op(op, doubled(inputs), wanted, "reference", gradients)
    plain = run_op(op, inputs, wanted, "reference", gradients)
    with poisoned_memory():
        found = run_op(op, inputs, wanted, backend, gradients)
    assert found.keys() == truth.keys()
    terms = longest_sum(inputs)
    for name in truth:
        assert found[name].dtype == plain[name].dtype, f"{name}: {found[name].dtype}, expected {plain[name].dtype}"
        limit = 8 * ceiling if ceiling and plain[name].dtype == torch.bfloat16 else ceiling
        assert_parity(
            found[name], plain[name], truth[name], what=f"{what} {name}", terms=terms, ceiling=limit, distance=distance
        )


def layouts(tensor: Tensor) -> dict[str, Tensor]:
    """The same values in layouts that trip kernels: offset storage, padded rows, transposed and channels-last-like."""
    flat = tensor.new_empty(tensor.numel() + 3)
    offset = flat[3:].view(tensor.shape).copy_(tensor)
    wide = tensor.new_empty(*tensor.shape[:-1], tensor.shape[-1] + 5)
    padded = wide[..., 2:-3].copy_(tensor)
    strided = tensor.new_empty(*tensor.shape[:-1], 2 * tensor.shape[-1])[..., ::2].copy_(tensor)
    transposed = tensor.transpose(0, -1).contiguous().transpose(0, -1)
    return {"offset": offset, "padded": padded, "strided": strided, "transposed": transposed}
