"""Every op with a norm adds the eps it is given to the variance, on each backend, forward and back."""

from __future__ import annotations

import inspect

import pytest
import torch
from harness import DEVICE, check_op, random
from numerics import EXACT, assert_within
from test_dtypes import ALL
from test_folded_message import parameters

from xclip_fast.ops import message_attention, message_key_value
from xclip_fast.ops._folded_message import fold, folded_message
from xclip_fast.ops.inputs import Draw

WITH_EPS = [name for name, case in ALL.items() if "eps" in inspect.signature(case.op).parameters]


def test_there_are_such_ops() -> None:
    assert len({ALL[name].op for name in WITH_EPS}) >= 6


@pytest.mark.parametrize("backend", ["torch", "triton"])
@pytest.mark.parametrize("name", WITH_EPS)
def test_eps_counts(name: str, backend: str) -> None:
    # as large as a variance: what ignores it is off by tens of per cent
    arguments = ALL[name].draw(Draw(torch.float32, DEVICE)) | {"eps": 0.7}
    check_op(ALL[name].op, arguments, what=f"{name} eps", backend=backend)


@pytest.mark.parametrize("backend", ["reference", "torch", "triton"])
def test_a_folded_message_has_two(backend: str) -> None:
    steps = parameters(64)
    tokens = random(2, 5, 64, dtype=torch.float64).cpu()
    attention = [x for name in ("fc", "norm", "in_proj", "out") for x in steps[name]]
    messages = message_attention(tokens, *attention, 2, eps=0.3, backend="reference")
    truth = message_key_value(messages, *steps["pair_norm"], *steps["pair"], eps=0.9, backend="reference")
    if backend != "triton":
        found = folded_message(tokens, fold(**steps), 2, eps=0.3, pair_eps=0.9, backend=backend)
        assert_within(found, truth, EXACT, what="folded message: eps")
        return
    weights = fold(*(tuple(x.to(DEVICE, torch.float32) for x in pair) for pair in steps.values()))
    found = folded_message(tokens.to(DEVICE, torch.float32), weights, 2, eps=0.3, pair_eps=0.9, backend=backend)
    assert_within(found.cpu(), truth, 1e-5, what="folded message: eps")
