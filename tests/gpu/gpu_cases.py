"""What the tests in this folder share: production shapes on a GPU, tiny ones in the interpreter elsewhere."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from numerics import assert_parity, longest_sum, poisoned_memory
from torch import Tensor

from xclip_fast.bench.parity import doubled, floating, run_op
from xclip_fast.ops.cases import OPS, Load, config_of, find_op
from xclip_fast.ops.inputs import Draw, Inputs

ON_GPU = torch.cuda.is_available()
DEVICE = "cuda" if ON_GPU else "cpu"
# without a GPU these tests run once, so that they do not rot: what they look at there, tests/ops does in every dtype
DTYPES = ["float32", "float16", "bfloat16"] if ON_GPU else ["bfloat16"]
VARIANTS = ["B/32", "B/16", "L/14", "L/14-336"] if ON_GPU else ["tiny"]
# these see the frames of a clip together; to the others 32 frames are four times 8
OF_CLIPS = ["mean_norm_over_frames", "message_attention", "message_key_value", "temporal_block"]

needs_gpu = pytest.mark.skipif(not ON_GPU, reason="only a GPU has this")


def inputs_of(op: str, variant: str, dtype: str, frames: int | None = None, batch: int = 1) -> Inputs:
    """The arguments that a model gives an op."""
    load = Load(config_of(variant, frames), batch, 400 if ON_GPU else 5)
    return OPS[op].arguments(Draw(getattr(torch, dtype), DEVICE), load)


def check(op: str, inputs: Inputs, dtype: str, what: str, backend: str = "triton") -> None:
    """Outputs and gradients of an op against float64, by the rule of ``numerics``."""
    function, wanted = find_op(op), floating(inputs)
    ceiling = OPS[op].ceiling(getattr(torch, dtype))
    truth = run_op(function, doubled(inputs), wanted, "reference", True)
    plain = run_op(function, inputs, wanted, "reference", True)
    with poisoned_memory():
        found = run_op(function, inputs, wanted, backend, True)
    terms = longest_sum(inputs)
    for name, exact in truth.items():
        assert_parity(found[name], plain[name], exact, what=f"{op} {what} {name}", terms=terms, ceiling=ceiling)


def forward_and_backward(op: str, inputs: Inputs, backend: str = "triton") -> Callable[[], list[Tensor]]:
    """A call that gives outputs and gradients, for the same upstream gradients each time."""
    function: Callable[..., Any] = find_op(op)
    leaves = {name: inputs[name].detach().requires_grad_() for name in floating(inputs)}
    upstream: list[Tensor] = []

    def run() -> list[Tensor]:
        result = function(**(inputs | leaves), backend=backend)
        outputs = [result] if isinstance(result, Tensor) else [x for x in result if x.requires_grad]
        if not upstream:
            upstream.extend(torch.randn_like(x) for x in outputs)
        grads = torch.autograd.grad(outputs, list(leaves.values()), upstream)
        return [x.detach() for x in (*outputs, *grads)]

    return run


def copies(tensors: list[Tensor]) -> list[Tensor]:
    return [x.clone() for x in tensors]


def equal(one: list[Tensor], other: list[Tensor]) -> bool:
    """Whether all bits are."""
    return len(one) == len(other) and all(map(torch.equal, one, other))
