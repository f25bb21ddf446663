"""Dtypes that meet in one call: parameters in float32 beside half precision, any mix under autocast, each backend."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from harness import DEVICE, check_op, random
from numerics import TOLERANCES, assert_within

from xclip_fast import ops
from xclip_fast.bench.parity import doubled, floating, run_op
from xclip_fast.ops import inputs
from xclip_fast.ops._quantize_rows import quantize_rows
from xclip_fast.ops.inputs import Draw, Inputs

HALVES = pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["float16", "bfloat16"])
BACKENDS = pytest.mark.parametrize("backend", ["reference", "torch", "triton"])


@dataclass(frozen=True)
class Case:
    """An op, its arguments in one dtype, and those that may be in float32 beside half precision."""

    op: Callable[..., Any]
    draw: Callable[[Draw], Inputs]
    wide: tuple[str, ...]


NORM = "norm_weight", "norm_bias"
NORMS = "norm1_weight", "norm1_bias", "norm2_weight", "norm2_bias"
ALL = {
    "layer_norm": Case(ops.layer_norm, lambda on: inputs.layer_norm(on, 5, 64, residual=False), ("weight", "bias")),
    "layer_norm residual constant": Case(
        ops.layer_norm,
        lambda on: inputs.layer_norm(on, 5, 64, residual=True, constant=True),
        ("weight", "bias", "constant"),
    ),
    "mean_norm_over_frames": Case(
        ops.mean_norm_over_frames, lambda on: inputs.mean_norm_over_frames(on, 2, 3, 4, 64), ("weight", "bias")
    ),
    "mean_norm_over_frames residual": Case(
        ops.mean_norm_over_frames,
        lambda on: inputs.mean_norm_over_frames(on, 2, 3, 4, 64, residual=True),
        ("weight", "bias"),
    ),
    "clip_logits": Case(ops.clip_logits, lambda on: inputs.clip_logits(on, 2, 5, 64), ("alpha", "logit_scale")),
    "clip_logits residual": Case(
        ops.clip_logits,
        lambda on: inputs.clip_logits(on, 2, 5, 64, residual=True),
        ("alpha", "logit_scale"),
    ),
    "linear_quick_gelu": Case(ops.linear_quick_gelu, lambda on: inputs.linear_quick_gelu(on, 5, 32, 48), ("bias",)),
    "feed_forward": Case(ops.feed_forward, lambda on: inputs.feed_forward(on, 5, 32, 48), ("fc_bias", "proj_bias")),
    "message_attention": Case(ops.message_attention, lambda on: inputs.message_attention(on, 2, 3, 64, 2), NORM),
    "message_attention ragged": Case(
        ops.message_attention, lambda on: inputs.message_attention(on, 2, 3, 64, 2, ragged=True), NORM
    ),
    "message_key_value": Case(ops.message_key_value, lambda on: inputs.message_key_value(on, 5, 64), NORM),
    "temporal_block": Case(ops.temporal_block, lambda on: inputs.temporal_block(on, 2, 3, 64, 2), NORMS),
    "temporal_block pooled": Case(
        ops.temporal_block,
        lambda on: inputs.temporal_block(on, 2, 3, 64, 2, whole=True),
        NORMS,
    ),
    "patch_embed": Case(
        ops.patch_embed, lambda on: inputs.patch_embed(on, 2, 16, 8, 64), (*NORM, "class_embedding", "positions")
    ),
}

ATTENTIONS = {
    "frame_attention": Case(ops.frame_attention, lambda on: inputs.frame_attention(on, 2, 5, 64, 2), ()),
    "prompt_attention": Case(ops.prompt_attention, lambda on: inputs.prompt_attention(on, 2, 3, 4, 64, 2), ()),
}


@BACKENDS
@HALVES
@pytest.mark.parametrize("several", [True, False], ids=["all", "one"])
@pytest.mark.parametrize("name", ALL)
def test_parameters_in_float32_leave_the_result_in_half_precision(
    name: str, several: bool, dtype: torch.dtype, backend: str
) -> None:
    case = ALL[name]
    arguments = case.draw(Draw(dtype, DEVICE))
    for wide in case.wide if several else case.wide[:1]:
        arguments[wide] = arguments[wide].float()
    check_op(case.op, arguments, what=f"{name} float32", backend=backend, gradients=False)
    wanted = floating(arguments)
    truth = run_op(case.op, doubled(arguments), wanted, "reference", True)
    for result, found in run_op(case.op, arguments, wanted, backend, True).items():
        argument = arguments.get(result.removeprefix("d "))
        assert found.dtype == (dtype if argument is None else argument.dtype), result
        # torch rounds gradients in float32 to half precision on the way
        assert_within(found, truth[result], TOLERANCES[dtype].model, what=f"{name} {result}")


@BACKENDS
@pytest.mark.parametrize("first", [0, 1], ids=["wide", "half"])
@pytest.mark.parametrize("name", [*ALL, "frame_attention", "prompt_attention"])
def test_under_autocast_any_mix_is_taken(name: str, first: int, backend: str) -> None:
    dtypes = torch.float32, torch.bfloat16
    case = ALL.get(name) or ATTENTIONS[name]
    arguments = case.draw(Draw(torch.bfloat16, DEVICE))
    wanted = floating(arguments)
    for index, argument in enumerate(wanted):
        arguments[argument] = arguments[argument].to(dtypes[(first + index) % 2])
    summands = [arguments[name].dtype for name in ("x", "tokens", "residual") if name in arguments]
    sums = case.op in (ops.layer_norm, ops.mean_norm_over_frames)
    expected = torch.float32 if sums and torch.float32 in summands else torch.bfloat16
    truth = run_op(case.op, doubled(arguments), wanted, "reference", True)
    with torch.autocast(DEVICE, torch.bfloat16):
        found = run_op(case.op, arguments, wanted, backend, True)
    for result in truth:
        argument = arguments.get(result.removeprefix("d "))
        assert found[result].dtype == (expected if argument is None else argument.dtype), result
        assert_within(found[result], truth[result], TOLERANCES[torch.bfloat16].model, what=f"{name} {result}")


@pytest.mark.parametrize("part", ["text", "residual"])
def test_without_autocast_videos_and_texts_share_a_dtype(part: str) -> None:
    arguments = ALL["clip_logits residual"].draw(Draw(torch.float32, DEVICE))
    arguments[part] = arguments[part].bfloat16()
    with pytest.raises(ValueError, match=rf"{part} must be torch\.float32 .* found torch\.bfloat16"):
        ops.clip_logits(**arguments)


@HALVES
@pytest.mark.parametrize("backend", ["reference", "torch"])
def test_rows_in_float8_are_normed_without_a_rounding_to_half_precision(backend: str, dtype: torch.dtype) -> None:
    x, weight, bias = random(5, 64, dtype=dtype), random(64, dtype=torch.float32), random(64, dtype=torch.float32)
    quantized, scale, _ = quantize_rows(x, weight=weight, bias=bias, backend=backend)
    exact = torch.nn.functional.layer_norm(x.float(), (64,), weight, bias)
    assert torch.allclose(scale * 448, exact.abs().amax(-1, keepdim=True), rtol=1e-5)
    assert quantized.dtype == torch.float8_e4m3fn


def test_a_bias_in_another_dtype_is_refused() -> None:
    x, weight = torch.ones(2, 8), torch.ones(4, 8)
    with pytest.raises(
        ValueError, match=r"bias must be torch\.float32 like x, or torch\.float32, found torch\.float16"
    ):
        ops.linear_quick_gelu(x, weight, torch.ones(4, dtype=torch.float16))
