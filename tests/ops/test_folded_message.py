"""Key and value of messages from folded weights: the fold in float64, parity, errors, bad numbers, registration."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from harness import DEVICE, ON_GPU, check_op, each_tile, kernel_dtypes, layouts, random
from numerics import EXACT, assert_within
from pointer_check import Launches
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from xclip_fast.kernels import folded_message as kernels
from xclip_fast.ops import explain, message_attention, message_key_value
from xclip_fast.ops._folded_message import Folded, fold, folded_message
from xclip_fast.ops._folded_message import launches as expected_launches

# two products with an attention between
CEILING = 1e-2
EPS = {"eps": 1e-5, "pair_eps": 1e-6}
VECTORS = "shift", "out_bias", "pair_shift"


def parameters(width: int, mean: float = 0.0) -> dict[str, tuple[Tensor, Tensor]]:
    """Float64 weight and bias of each step, by the names of ``fold``; messages are about ``mean``."""

    def pair(rows: int, *columns: int, scale: float = 0.3, mean: float = 0.0) -> tuple[Tensor, Tensor]:
        weight = torch.randn(rows, *columns, dtype=torch.float64)
        weight = weight * width**-0.5 if columns else 1 + scale * weight
        return weight, mean + 0.3 * torch.randn(rows, dtype=torch.float64)

    return {
        "fc": pair(width, width, mean=mean),
        "norm": pair(width),
        "in_proj": pair(3 * width, width),
        "out": pair(width, width),
        "pair_norm": pair(width),
        "pair": pair(2 * width, width),
    }


def unfolded(class_tokens: Tensor, steps: dict[str, tuple[Tensor, Tensor]], heads: int, **options: Any) -> Tensor:
    """The same by the ops of the layers, with the steps in the dtype of the class tokens."""
    weights = {name: [x.to(class_tokens.device, class_tokens.dtype) for x in pair] for name, pair in steps.items()}
    attention = [x for name in ("fc", "norm", "in_proj", "out") for x in weights[name]]
    messages = message_attention(class_tokens, *attention, heads, eps=EPS["eps"], **options)
    return message_key_value(messages, *weights["pair_norm"], *weights["pair"], eps=EPS["pair_eps"], **options)


def cast(folded: Folded, dtype: torch.dtype, device: str = DEVICE) -> Folded:
    """As the engine keeps them: vectors that no product adds in float32."""
    wide = torch.promote_types(dtype, torch.float32)
    return Folded(**{n: x.to(device, wide if n in VECTORS else dtype) for n, x in folded._asdict().items()})


def arguments(
    clips: int, frames: int, heads: int = 1, head_dim: int = 32, dtype: torch.dtype = torch.float32
) -> dict[str, Any]:
    width = heads * head_dim
    weights = cast(fold(**parameters(width)), dtype)
    return {"class_tokens": random(clips, frames, width, dtype=dtype), "heads": heads, **weights._asdict()}


def op(class_tokens: Tensor, heads: int, *, backend: str | None = None, **weights: Tensor) -> Tensor:
    return folded_message(class_tokens, Folded(**weights), heads, **EPS, backend=backend)


def tensors_of(inputs: dict[str, Any]) -> list[Tensor]:
    return [inputs["class_tokens"], *(inputs[name] for name in Folded._fields)]


@pytest.mark.parametrize("mean", [0.0, 30.0])
@pytest.mark.parametrize("size", [(1, 1, 1, 32), (2, 5, 3, 16), (3, 70, 2, 32)], ids=str)
def test_fold_is_exact(size: tuple[int, int, int, int], mean: float) -> None:
    clips, frames, heads, head_dim = size
    steps = parameters(heads * head_dim, mean)
    tokens = torch.randn(clips, frames, heads * head_dim, dtype=torch.float64)
    truth = unfolded(tokens, steps, heads, backend="reference")
    for backend in ("reference", "torch"):
        found = folded_message(tokens, fold(**steps), heads, **EPS, backend=backend)
        assert_within(found, truth, EXACT * max(1, mean), what="folded message: fold")


SIZES = [
    (1, 1, 1, 32),
    (1, 8, 2, 64),
    (3, 7, 2, 32),
    (2, 16, 1, 128),
    (1, 17, 3, 32),
    (2, 33, 1, 64),
    (1, 64, 1, 32),
    (1, 70, 2, 32),
    (40, 4, 1, 32),
]


@pytest.mark.parametrize(("size", "dtype"), each_tile(SIZES), ids=str)
def test_parity(size: tuple[int, int, int, int], dtype: torch.dtype) -> None:
    check_op(op, arguments(*size, dtype=dtype), what="folded message", ceiling=CEILING, gradients=False)


@pytest.mark.slow
def test_production_width() -> None:
    inputs = arguments(1, 8, 12, 64, torch.float16)
    check_op(op, inputs, what="folded message production", ceiling=CEILING, gradients=False)


def test_more_heads_than_are_unrolled(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "FUSED_HEADS", 1)
    check_op(op, arguments(2, 5, 2), what="folded message heads", ceiling=CEILING, gradients=False)


@pytest.mark.parametrize("case", ["plain", "far from mean zero", "outlying channels", "outliers a norm hides", "alike"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.slow
def test_errs_less_than_weights_that_are_not_folded(case: str, dtype: torch.dtype) -> None:
    width, heads = 128, 4
    steps = parameters(width, mean=20.0 if case == "far from mean zero" else 0.0)
    tokens = torch.randn(4, 8, width, dtype=torch.float64)
    if case == "outlying channels":
        tokens[..., [5, 77]] += 60
    if case == "outliers a norm hides":
        for x in steps["fc"]:
            x[[3, 99]] *= 50
        for name in ("norm", "pair_norm"):
            steps[name][0][[3, 99]] = 0.02
    if case == "alike":
        tokens = tokens[:, :1] + 0.02 * tokens
    tokens = tokens.to(dtype)
    truth = unfolded(tokens.double(), steps, heads, backend="reference")
    apart = unfolded(tokens.to(DEVICE), steps, heads, backend="triton")
    found = folded_message(tokens.to(DEVICE), cast(fold(**steps), dtype), heads, **EPS, backend="triton")
    # in the Euclidean norm: the largest number's error is a matter of luck
    error, others = ((x.cpu().double() - truth).norm() for x in (found, apart))
    assert error < 0.9 * others


@pytest.mark.parametrize("layout", ["offset", "padded", "strided", "transposed"])
@pytest.mark.parametrize("name", ["class_tokens", "weight", "out_weight", "out_bias", "shift", "bias"])
def test_layouts(name: str, layout: str) -> None:
    inputs = arguments(2, 5, heads=2)
    inputs[name] = layouts(inputs[name])[layout]
    check_op(op, inputs, what="folded message layouts", ceiling=CEILING, gradients=False)


@kernel_dtypes
@pytest.mark.parametrize("clips", [2, 40])
def test_class_tokens_as_a_view(clips: int, dtype: torch.dtype) -> None:
    inputs = arguments(clips, 4, heads=2, dtype=dtype)
    inputs["class_tokens"] = random(clips, 4, 7, 64, dtype=dtype)[:, :, 0]
    check_op(op, inputs, what="folded message class tokens", ceiling=CEILING, gradients=False)


@pytest.mark.parametrize("size", [(2, 8), (40, 4), (1, 70)], ids=str)
def test_launches_are_told(size: tuple[int, int], launches: Launches | None) -> None:
    inputs = arguments(*size, heads=2)
    op(**inputs, backend="triton")
    meta = [x.to("meta") for x in tensors_of(inputs)]
    expected = expected_launches(*meta, 2, *EPS.values())
    # PyTorch's products are not among those seen
    products = 2 if size[0] * size[1] > 128 else 0
    if launches is not None:
        assert len(launches.names) + products == expected == (5 if size[1] > 64 else 4)


@pytest.mark.parametrize("shape", [(0, 3), (2, 0), (0, 0)])
@pytest.mark.parametrize("backend", ["reference", "torch", "triton"])
def test_empty(shape: tuple[int, int], backend: str) -> None:
    inputs = arguments(*shape)
    assert op(**inputs, backend=backend).shape == (*shape, 64)
    assert expected_launches(*tensors_of(inputs), 1, *EPS.values()) == 0


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("frames", [5, 70])
def test_bad_numbers_stay_in_their_clip(frames: int, bad: float) -> None:
    inputs = arguments(3, frames)
    inputs["class_tokens"][1, 2, 3] = bad
    found = op(**inputs, backend="triton")
    assert found[1].isnan().all()
    assert found[[0, 2]].isfinite().all()


def test_zero_eps_with_padded_frames() -> None:
    inputs = arguments(1, 5)
    weights = Folded(*tensors_of(inputs)[1:])
    found = folded_message(inputs["class_tokens"], weights, 1, eps=0.0, pair_eps=0.0, backend="triton")
    assert found.isfinite().all()


@pytest.mark.slow
def test_inputs_are_left_as_they_are_and_repeats_are_bit_equal() -> None:
    for size in ((3, 10), (40, 4)):
        inputs = arguments(*size)
        before = [x.clone() for x in tensors_of(inputs)]
        first, second = (op(**inputs, backend="triton") for _ in range(2))
        assert torch.equal(first, second)
        assert all(torch.equal(x, y) for x, y in zip(tensors_of(inputs), before, strict=True))


@pytest.mark.parametrize("size", [(2, 3), (2, 70), (0, 3)], ids=str)
def test_registered_op(size: tuple[int, int]) -> None:
    inputs = arguments(*size, heads=2)
    torch.library.opcheck(torch.ops.xclip_fast.folded_message, (*tensors_of(inputs), 2, *EPS.values()))


def test_registered_op_without_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    inputs = {name: x.cpu() if isinstance(x, Tensor) else x for name, x in arguments(2, 5, dtype=torch.half).items()}
    found = torch.ops.xclip_fast.folded_message(*tensors_of(inputs), 1, *EPS.values())
    assert torch.equal(found, op(**inputs, backend="torch"))


def test_floating_point_operations() -> None:
    inputs = arguments(2, 5, heads=2)
    with FlopCounterMode(display=False) as counter:
        torch.ops.xclip_fast.folded_message(*tensors_of(inputs), 2, *EPS.values())
    assert counter.get_total_flops() == 10 * (18 * 64**2 + 4 * 5 * 64)


def test_wrong_arguments_are_named() -> None:
    inputs = arguments(2, 5)
    for wrong, said in [
        ({"class_tokens": inputs["class_tokens"][0]}, r"class_tokens must be \(B, T, D\), found \(5, 32\)"),
        ({"heads": 3}, "heads must divide the width 32, found 3"),
        ({"weight": inputs["weight"][:-1]}, r"weight must be torch.float32 \(192, 32\) to fit class_tokens, found"),
        ({"bias": inputs["bias"].half()}, r"bias must be torch.float32 \(192,\)"),
        ({"shift": inputs["shift"].half()}, r"shift must be torch.float32 \(96,\)"),
    ]:
        with pytest.raises(ValueError, match=said):
            op(**(inputs | wrong))


@pytest.mark.skipif(ON_GPU, reason="about the interpreter")
def test_explains_what_the_kernels_cannot_take() -> None:
    inputs = arguments(2, 5, 2, 16)
    weights = Folded(*tensors_of(inputs)[1:])
    assert "heads hold 32, 64, 128" in str(explain("folded_message", inputs["class_tokens"], weights, 2)["triton"])
    assert explain("folded_message", inputs["class_tokens"], weights, 1)["triton"] is None
