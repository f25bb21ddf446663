"""Rows in float8: half a step from float64 at most, in every shape and mode; bad, tiny and huge rows; the registry."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from harness import DEVICE, KERNEL_DTYPES, ON_GPU, covering, kernel_dtypes, layouts, random
from torch import Tensor
from torch.nn.functional import gelu, layer_norm, silu

from xclip_fast.ops import _quantize_rows, explain
from xclip_fast.ops._quantize_rows import quantize_rows, quantize_rows_ref

pytestmark = pytest.mark.skipif(ON_GPU and torch.cuda.get_device_capability() < (8, 9), reason="no float8 on this GPU")

WIDTHS = [1, 2, 3, 31, 64, 127, 128, 129, 512, 767, 768, 769, 1024, 1025, 3072]
MODES = ["plain", "norm", "constant", "residual", "both", "silu", "quick_gelu", "gelu"]
NAMES = "x", "weight", "bias", "residual", "constant"
ACTIVATIONS = {"silu": silu, "quick_gelu": lambda x: x * torch.sigmoid(1.702 * x), "gelu": gelu}


@pytest.fixture(autouse=True)
def right_rounding(monkeypatch: pytest.MonkeyPatch) -> None:
    """The interpreter drops the carry when it rounds to float8: here PyTorch rounds for it, and the op is told."""
    if ON_GPU:
        return
    from triton import language
    from triton.runtime import interpreter

    original = interpreter._convert_float

    def convert(numbers: Any, source: Any, target: Any, rounding: Any) -> Any:
        if target != language.float8e4nv:
            return original(numbers, source, target, rounding)
        assert source == language.float32
        return torch.from_numpy(numbers).to(torch.float8_e4m3fn).view(torch.uint8).numpy()

    monkeypatch.setattr(interpreter, "_convert_float", convert)
    monkeypatch.setattr(_quantize_rows, "interpreting", lambda: False)


def arguments(shape: tuple[int, ...], dtype: torch.dtype, mode: str, mean: float = 0.0) -> dict[str, Any]:
    found: dict[str, Any] = {"x": random(*shape, dtype=dtype, mean=mean, scale=3.0)}
    if mode in ("norm", "constant", "residual", "both"):
        found |= {"weight": random(shape[-1], dtype=dtype, mean=1.0), "bias": random(shape[-1], dtype=dtype)}
    if mode in ("residual", "both"):
        found["residual"] = random(*shape, dtype=dtype, scale=2.0)
    if mode in ("constant", "both"):
        found["constant"] = random(shape[-1], dtype=dtype)
    if mode in ACTIVATIONS:
        found["activation"] = mode
    return found


def exact(inputs: dict[str, Any], dtype: torch.dtype) -> Tensor:
    """The rows that are quantised, by PyTorch in this dtype."""
    x, weight, bias, residual, constant = (
        None if inputs.get(name) is None else inputs[name].cpu().to(dtype) for name in NAMES
    )
    x = x if residual is None else x + residual
    x = x if constant is None else x + constant
    if weight is not None:
        return layer_norm(x, x.shape[-1:], weight, bias, inputs.get("eps", 1e-5))
    return ACTIVATIONS[inputs["activation"]](x) if "activation" in inputs else x


def check(inputs: dict[str, Any], backend: str = "triton") -> None:
    """Scales and numbers are the nearest there are, but for what float32 itself errs in front of them."""
    quantized, scale, stream = quantize_rows(**inputs, backend=backend)
    shape = inputs["x"].shape
    check_stream(stream, inputs)
    assert (quantized.dtype, scale.dtype) == (torch.float8_e4m3fn, torch.float32)
    assert (quantized.shape, scale.shape) == (shape, (*shape[:-1], 1))
    assert quantized.is_contiguous()
    truth = exact(inputs, torch.float64)
    error = 2 * (exact(inputs, torch.float32) - truth).abs().amax(-1, keepdim=True)
    found, scale = quantized.cpu().double(), scale.cpu().double()
    largest = truth.abs().amax(-1, keepdim=True)
    assert ((448 * scale - largest).abs() <= error + 1e-6 * largest).all()
    scaled = truth / scale
    # three bits behind the leading one, down to steps of 2 ** -9
    half_step = torch.exp2(scaled.abs().mul(1 + 1e-5).log2().floor().clamp(min=-6) - 4)
    assert ((found - scaled).abs() <= 1.0001 * half_step + error / scale).all()
    assert (found.abs().amax(-1) == 448).all()


def check_stream(stream: Tensor, inputs: dict[str, Any]) -> None:
    """The sum is rounded once; without a residual the rows are given back as they are."""
    x, residual = inputs["x"], inputs.get("residual")
    if residual is None:
        assert stream is x
        return
    wide = torch.promote_types(x.dtype, torch.float32)
    assert stream.dtype is x.dtype
    assert torch.equal(stream, (x.to(wide) + residual.to(wide)).to(x.dtype))
    assert stream.data_ptr() not in (x.data_ptr(), residual.data_ptr())


def step_of(quantized: Tensor) -> Tensor:
    """The numbers of e4m3 counted from zero."""
    bits = quantized.view(torch.uint8).int()
    return torch.where(bits < 128, bits, 128 - bits)


# the tile follows from the width alone; each of its widths meets each mode and each dtype, not all at once
@pytest.mark.parametrize(("mode", "width", "dtype"), covering(MODES, WIDTHS, KERNEL_DTYPES), ids=str)
def test_within_half_a_step(mode: str, width: int, dtype: torch.dtype) -> None:
    for rows in (1, 2, 5):
        # norm and activation take so few numbers to nothing but rounding
        if width > 3 or mode == "plain":
            check(arguments((rows, width), dtype, mode))


@pytest.mark.parametrize(
    ("mode", "shape", "dtype"), covering(MODES, [(3, 5, 48), (2, 1, 1, 769), (70,), (33, 64)], KERNEL_DTYPES), ids=str
)
def test_shapes(shape: tuple[int, ...], mode: str, dtype: torch.dtype) -> None:
    check(arguments(shape, dtype, mode))


@kernel_dtypes
@pytest.mark.parametrize("mode", MODES)
def test_agrees_with_torch_but_for_ties(mode: str, dtype: torch.dtype) -> None:
    inputs = arguments((64, 257), dtype, mode)
    (found, scale, _), (wanted, wanted_scale, _) = (
        quantize_rows(**inputs, backend=name) for name in ("triton", "torch")
    )
    assert torch.allclose(scale, wanted_scale, rtol=1e-6, atol=0)
    steps = (step_of(found) - step_of(wanted)).abs()
    assert steps.max() <= 1
    assert (steps > 0).double().mean() <= (0.0 if mode == "plain" else 1e-3)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_norm_and_activation_are_not_rounded_between(mode: str, dtype: torch.dtype) -> None:
    inputs = arguments((64, 257), dtype, mode)
    check(inputs, backend="torch")
    stored = exact(inputs, torch.float64).to(dtype).double()
    truth, (quantized, scale, _) = exact(inputs, torch.float64), quantize_rows(**inputs, backend="torch")
    largest = stored.abs().amax(-1, keepdim=True)
    rounded = (stored / largest * 448).float().to(torch.float8_e4m3fn).double() * largest / 448
    assert (quantized.cpu().double() * scale.cpu() - truth).norm() <= (rounded - truth).norm() * 1.0001


@pytest.mark.parametrize("backend", ["reference", "torch", "triton"])
def test_eps_counts(backend: str) -> None:
    check(arguments((5, 48), torch.float32, "both") | {"eps": 4.0}, backend)


@kernel_dtypes
@pytest.mark.parametrize("mean", [3.0, 100.0, 1e4])
def test_mean_far_from_zero(mean: float, dtype: torch.dtype) -> None:
    # 768 is padded to 1024 lanes: padding that entered the variance would show here
    check(arguments((4, 768), dtype, "constant", mean=mean))


@pytest.mark.parametrize(
    ("layout", "name", "dtype"),
    covering(["offset", "padded", "strided", "transposed"], ["x", "weight", "residual", "constant"], KERNEL_DTYPES),
    ids=str,
)
@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_layouts(name: str, layout: str, dtype: torch.dtype, backend: str) -> None:
    inputs = arguments((6, 5, 40), dtype, "both")
    inputs[name] = layouts(inputs[name])[layout]
    check(inputs, backend)


@kernel_dtypes
@pytest.mark.parametrize("backend", ["reference", "torch", "triton"])
def test_residual_is_read_alone_and_may_be_the_rows(backend: str, dtype: torch.dtype) -> None:
    inputs = arguments((6, 40), dtype, "both")
    inputs["residual"] = inputs["x"]
    kept = inputs["x"].clone()
    check(inputs, backend)
    assert torch.equal(inputs["x"], kept)


@pytest.mark.parametrize("backend", ["reference", "torch", "triton"])
def test_norm_sees_the_sum_before_it_is_rounded(backend: str) -> None:
    # beside 1024 a half-precision sum loses every part of the residual, which is all that the norm leaves
    x, residual = torch.full((3, 40), 1024.0, device=DEVICE).half(), random(3, 40, dtype=torch.float16, scale=0.05)
    inputs = {"x": x, "residual": residual, "weight": torch.ones_like(x[0]), "bias": torch.zeros_like(x[0])}
    check(inputs, backend)
    assert torch.equal(quantize_rows(**inputs, backend=backend)[2], x)


def test_norm_in_float32_behind_half_precision() -> None:
    inputs = arguments((5, 40), torch.float16, "constant")
    check(inputs | {name: inputs[name].float() for name in ("weight", "bias", "constant")})


@pytest.mark.parametrize(
    ("mode", "backend", "shape"), covering(MODES, ["reference", "torch", "triton"], [(0, 16), (3, 0, 16)]), ids=str
)
def test_empty(shape: tuple[int, ...], mode: str, backend: str) -> None:
    quantized, scale, stream = quantize_rows(**arguments(shape, torch.float32, mode), backend=backend)
    assert quantized.shape == stream.shape == shape
    assert scale.shape == (*shape[:-1], 1)


@pytest.mark.parametrize(
    ("mode", "bad", "backend"),
    covering(MODES, [float("nan"), float("inf"), float("-inf")], ["torch", "triton"]),
    ids=str,
)
def test_bad_numbers_stay_in_their_row(bad: float, mode: str, backend: str) -> None:
    inputs = arguments((9, 70), torch.float32, mode)
    clean = [x.clone() for x in quantize_rows(**inputs, backend=backend)]
    inputs["residual" if "residual" in inputs else "x"][4, 3] = bad
    spoiled = quantize_rows(**inputs, backend=backend)
    others = torch.arange(9) != 4
    for found, wanted in zip(spoiled, clean, strict=True):
        assert torch.equal(found.cpu()[others].float(), wanted.cpu()[others].float())
    assert (spoiled[0][4].float() * spoiled[1][4]).isnan().any()


@pytest.mark.parametrize("backend", ["reference", "torch", "triton"])
def test_rows_of_zeros_tiny_and_huge_numbers(backend: str) -> None:
    x = random(6, 40, dtype=torch.float32)
    factors = [0.0, 1e-42, 1e-31, 1e-28, 1e30, 3e38]
    x = x / x.abs().amax(-1, keepdim=True) * torch.tensor(factors, device=DEVICE)[:, None]
    quantized, scale, _ = quantize_rows(x, backend=backend)
    found = quantized.double() * scale
    assert found.isfinite().all()
    assert scale[:3].flatten().tolist() == [1, 1, 1]
    assert not found[:3].any()
    assert (quantized[3:].float().abs().amax(-1) == 448).all()
    assert ((found[3:] - x[3:]).norm(dim=-1) < 0.05 * x[3:].double().norm(dim=-1)).all()


@kernel_dtypes
@pytest.mark.parametrize("mode", MODES)
def test_one_launch(mode: str, dtype: torch.dtype, launches: Any) -> None:
    quantize_rows(**arguments((70, 96), dtype, mode), backend="triton")
    if launches is not None:
        assert launches.names == ["_quantize_rows_fwd_kernel"]


@pytest.mark.parametrize("mode", MODES)
def test_repeats_are_bit_equal(mode: str) -> None:
    inputs = arguments((70, 96), torch.float32, mode)
    first, second = (quantize_rows(**inputs, backend="triton") for _ in range(2))
    assert torch.equal(first[0].view(torch.uint8), second[0].view(torch.uint8))
    assert torch.equal(first[1], second[1])


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_inputs_are_left_as_they_are(backend: str) -> None:
    for mode in MODES:
        inputs = arguments((7, 40), torch.float32, mode)
        before = {name: x.clone() for name, x in inputs.items() if isinstance(x, Tensor)}
        quantize_rows(**inputs, backend=backend)
        assert all(torch.equal(inputs[name], x) for name, x in before.items())


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("shape", [(5, 40), (3, 2, 33)])
def test_registered_op(mode: str, shape: tuple[int, ...]) -> None:
    inputs = arguments(shape, torch.float32, mode)
    tensors = [inputs.get(name) for name in NAMES]
    torch.library.opcheck(torch.ops.xclip_fast.quantize_rows, (*tensors, 1e-5, inputs.get("activation")))


@pytest.mark.parametrize("mode", MODES)
def test_registered_op_without_kernels(mode: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    inputs = {n: x.cpu() if isinstance(x, Tensor) else x for n, x in arguments((5, 40), torch.bfloat16, mode).items()}
    tensors = [inputs.get(name) for name in NAMES]
    found = torch.ops.xclip_fast.quantize_rows(*tensors, 1e-5, inputs.get("activation"))
    wanted = quantize_rows(**inputs, backend="torch")[: 3 if "residual" in inputs else 2]
    assert found[2].numel() == inputs.get("residual", found[2]).numel()
    assert all(torch.equal(one.float(), other.float()) for one, other in zip(found, wanted, strict=False))


@pytest.mark.parametrize("mode", MODES)
def test_definition(mode: str) -> None:
    inputs = arguments((6, 40), torch.float64, mode)
    check(inputs, backend="reference")
    check(inputs, backend="torch")


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_compiles_whole(backend: str) -> None:
    def call(x: Tensor, weight: Tensor, bias: Tensor, residual: Tensor) -> tuple[Tensor, ...]:
        return quantize_rows(x, weight=weight, bias=bias, residual=residual, backend=backend)

    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    args = list(arguments((4, 32), torch.float32, "residual").values())
    with torch.inference_mode():
        for found, wanted in zip(compiled(*args), call(*args), strict=True):
            assert torch.equal(found.float(), wanted.float())


def test_there_is_no_backward_pass() -> None:
    x = random(3, 40, dtype=torch.float32).requires_grad_()
    _, scale, _ = quantize_rows(x, backend="triton")
    with pytest.raises(RuntimeError, match="quantize_rows"):
        scale.sum().backward()


def test_wrong_arguments_are_named() -> None:
    x, weight, bias, constant = (random(*shape, dtype=torch.float32) for shape in ((2, 8), (8,), (8,), (8,)))
    for wrong, said in [
        ({"weight": weight}, "weight and bias of the norm must be given together"),
        ({"constant": constant}, "constant is added in front of a norm: it needs weight and bias"),
        ({"residual": x}, "residual is added in front of a norm: it needs weight and bias"),
        (
            {"weight": weight, "bias": bias, "residual": x.half()},
            r"residual must be torch.float32 \(2, 8\) like x, found torch.float16 \(2, 8\)",
        ),
        ({"weight": weight, "bias": bias, "residual": x[:1]}, r"like x, found torch.float32 \(1, 8\)"),
        ({"weight": weight, "bias": bias, "activation": "silu"}, "not both"),
        ({"weight": weight[:7], "bias": bias}, r"weight must have shape \(8,\) to fit x, found \(7,\)"),
        ({"activation": "relu"}, "unknown activation 'relu': choose one of silu, quick_gelu, gelu"),
        ({"backend": "cuda"}, "unknown backend 'cuda'"),
    ]:
        with pytest.raises(ValueError, match=said):
            quantize_rows(x, **wrong)
    with pytest.raises(ValueError, match="x must be a floating point"):
        quantize_rows(x.int())


def test_explains_what_the_kernels_cannot_take(monkeypatch: pytest.MonkeyPatch) -> None:
    x = random(2, 8, dtype=torch.float32)
    assert explain("quantize_rows", x)["triton"] is None
    assert "float64" in explain("quantize_rows", x.double())["triton"]
    with pytest.raises(ValueError, match="up to 8192 numbers, found 9000"):
        quantize_rows(torch.empty(1, 9000, device=DEVICE), backend="triton")
    monkeypatch.setattr(_quantize_rows, "compute_capability", lambda index: (8, 0))
    on_ampere = type("Rows", (), {"device": torch.device("cuda"), "get_device": lambda self: 0})()
    assert "needs compute capability 8.9" in _quantize_rows._float8_refusal(on_ampere)


@pytest.mark.skipif(ON_GPU, reason="about the interpreter")
def test_the_interpreter_is_refused_outside_these_tests(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_quantize_rows, "interpreting", lambda: True)
    x = random(3, 40, dtype=torch.float32)
    with pytest.raises(ValueError, match="Triton's interpreter rounds float8 wrongly"):
        quantize_rows(x, backend="triton")
    found, wanted = quantize_rows(x), quantize_rows_ref(x, *[None] * 4, 1e-5, None)
    assert torch.equal(found[0].float(), wanted[0].float())
