"""Intra-frame attention by one program a head: the same contract as ``test_frame_attention``, by its own kernel."""

from __future__ import annotations

from collections.abc import Iterator
from unittest.mock import patch

import pytest
import torch
from harness import DEVICE, check_op, layouts
from numerics import assert_within, poisoned_memory
from pointer_check import Launches
from test_frame_attention import arguments, run
from torch import Tensor

from xclip_fast.kernels import frame_attention as kernels
from xclip_fast.ops import frame_attention
from xclip_fast.tuning import override

HALVES = [torch.float16, torch.bfloat16]


@pytest.fixture(autouse=True)
def kept() -> Iterator[None]:
    """Every launch in here that can keep its keys does."""
    with override("frame_attention", rows=64, columns=0, num_warps=4, num_stages=2):
        yield


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("tokens", [64, 65, 127, 197, 257, 320])
def test_parity(tokens: int, dtype: torch.dtype) -> None:
    check_op(frame_attention, arguments((1, tokens, 2, 64), dtype), what="frame_attention head")


@pytest.mark.parametrize("layout", ["offset", "padded", "strided", "transposed"])
@pytest.mark.parametrize("name", ["qkv", "message_kv"])
def test_layouts(name: str, layout: str) -> None:
    inputs = arguments((2, 66, 2, 64), torch.float16)
    inputs[name] = layouts(inputs[name])[layout]
    check_op(frame_attention, inputs, what="frame_attention head layouts", gradients=False)


@pytest.mark.parametrize("tokens", [64, 70, 128])
def test_what_lies_between_the_rows_is_not_read(tokens: int) -> None:
    inputs = arguments((3, tokens, 1, 64), torch.float16)
    apart = dict(inputs)
    rows = torch.full((3, tokens + 64, 192 + 8), float("nan"), dtype=torch.float16, device=DEVICE)
    messages = torch.full((3, 5, 128), float("nan"), dtype=torch.float16, device=DEVICE)
    apart["qkv"] = rows[:, :tokens, :192].copy_(inputs["qkv"])
    apart["message_kv"] = messages[:, 2].copy_(inputs["message_kv"])
    with poisoned_memory():
        assert torch.equal(frame_attention(**apart, backend="triton"), frame_attention(**inputs, backend="triton"))


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize(
    ("name", "index"),
    [
        ("qkv", (1, 3, 5)),  # a query of a whole block
        ("qkv", (1, 65, 5)),  # a query of the masked block
        ("qkv", (1, 3, 128 + 5)),  # a key of the first piece
        ("qkv", (1, 40, 128 + 5)),  # a key of the second piece
        ("qkv", (1, 65, 128 + 5)),  # a key of the tail
        ("qkv", (1, 3, 256 + 5)),  # a value of the first piece
        ("qkv", (1, 65, 256 + 5)),  # a value of the tail
        ("message_kv", (1, 5)),  # the message's key
        ("message_kv", (1, 128 + 5)),  # the message's value
    ],
)
def test_bad_numbers_as_in_torch(name: str, index: tuple[int, ...], bad: float) -> None:
    inputs = arguments((3, 66, 2, 64), torch.float16)
    inputs[name][index] = bad
    exact = {name: x.float() if isinstance(x, Tensor) else x for name, x in inputs.items()}
    found, expected = frame_attention(**inputs, backend="triton"), frame_attention(**exact, backend="reference")
    assert torch.equal(found.isfinite(), expected.isfinite())
    assert found[0].isfinite().all()
    assert found[2].isfinite().all()
    assert found[1, :, 64:].isfinite().all(), "the other head"


def test_a_row_without_a_finite_score_is_nan_as_in_torch() -> None:
    inputs = arguments((1, 66, 1, 64), torch.float16)
    inputs["qkv"][0, 2, :64] = 0.0
    inputs["qkv"][0, 2, 0] = float("-inf")
    inputs["qkv"][..., 64] = inputs["message_kv"][..., 0] = 1.0
    found = frame_attention(**inputs, backend="triton")
    assert found[0, 2].isnan().all()
    assert found.isfinite().sum() == 65 * 64


def test_padding_has_no_weight_where_all_scores_are_low() -> None:
    inputs = arguments((1, 66, 1, 64), torch.float16)
    inputs["qkv"][..., 0] = -40.0
    inputs["qkv"][..., 64] = inputs["message_kv"][..., 0] = 60.0
    check_op(frame_attention, inputs, what="frame_attention head low scores", gradients=False, ceiling=1e-2)


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("tokens", [64, 197])
def test_log_sum_exp_is_that_of_the_streamed_keys(tokens: int, dtype: torch.dtype) -> None:
    inputs = arguments((2, tokens, 2, 64), dtype)
    out, lse = kernels.frame_attention_fwd(*inputs.values(), True)
    with override("frame_attention"):
        _, expected = kernels.frame_attention_fwd(*inputs.values(), True)
    # it is of weights that were rounded before they were summed, as those of the values are
    assert_within(lse, expected, torch.finfo(dtype).eps / 4, what="frame_attention head lse")
    without, nothing = kernels.frame_attention_fwd(*inputs.values(), False)
    assert torch.equal(without, out)
    assert nothing.numel() == 0


def test_repeats_are_bit_equal() -> None:
    inputs = arguments((2, 66, 1, 64), torch.float16)
    first, second = run(inputs), run(inputs)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize(
    ("head_dim", "dtype", "name"),
    [
        (64, torch.float16, "_frame_attention_head_kernel"),
        (64, torch.float32, "_frame_attention_fwd_kernel"),
        (32, torch.float16, "_frame_attention_fwd_kernel"),
    ],
)
def test_where_keys_cannot_be_kept_they_are_streamed(
    head_dim: int, dtype: torch.dtype, name: str, launches: Launches | None
) -> None:
    if launches is None:
        pytest.skip("launches are counted in the interpreter")
    inputs = arguments((1, 64, 1, head_dim), dtype)
    frame_attention(**inputs, backend="triton")
    assert launches.names == [name]


@pytest.mark.parametrize(("capability", "kept"), [((8, 0), False), ((9, 0), True), ((10, 0), False), ((12, 0), False)])
def test_gpus_that_can_keep_keys(capability: tuple[int, int], kept: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "multiprocessors", lambda device: 132)
    with patch.object(kernels, "compute_capability", lambda index: capability):
        assert kernels._can_keep(torch.device("cuda"), 264) == kept
        # of few heads each is cut up
        assert not kernels._can_keep(torch.device("cuda"), 263)
