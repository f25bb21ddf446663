"""Layer norm: parity in every shape, layout and mean; what autograd, the compiler and the registry need of it."""

from __future__ import annotations

import pytest
import torch
from harness import DEVICE, KERNEL_DTYPES, check_op, covering, kernel_dtypes, layouts, random

from xclip_fast.ops import explain, layer_norm

WIDTHS = [1, 2, 3, 31, 64, 127, 128, 129, 512, 767, 768, 769, 1024, 1025]
ROWS = [1, 2, 5, 33]


def arguments(
    shape: tuple[int, ...], dtype: torch.dtype, *, mean: float = 0.0, residual: bool = False, constant: bool = False
) -> dict[str, object]:
    width = shape[-1]
    found: dict[str, object] = {
        "x": random(*shape, dtype=dtype, mean=mean),
        "weight": random(width, dtype=dtype, mean=1.0),
        "bias": random(width, dtype=dtype),
    }
    if residual:
        found["residual"] = random(*shape, dtype=dtype)
    if constant:
        found["constant"] = random(2 * width, dtype=dtype)[::2]
    return found


# the tile follows from the width alone; each width meets each number of rows and each dtype, not all at once
@pytest.mark.parametrize(("rows", "width", "dtype"), covering(ROWS, WIDTHS, KERNEL_DTYPES), ids=str)
def test_parity(rows: int, width: int, dtype: torch.dtype) -> None:
    # one or two numbers a row cancel to nothing but rounding
    ceiling = 1.0 if width < 4 else 4e-3 if dtype != torch.float32 else None
    check_op(layer_norm, arguments((rows, width), dtype), what="layer_norm", ceiling=ceiling)


@kernel_dtypes
@pytest.mark.parametrize("constant", [False, True])
@pytest.mark.parametrize("shape", [(3, 5, 48), (2, 1, 1, 769), (7, 64)])
def test_residual_and_constant(shape: tuple[int, ...], constant: bool, dtype: torch.dtype) -> None:
    inputs = arguments(shape, dtype, residual=True, constant=constant)
    check_op(layer_norm, inputs, what="layer_norm residual", ceiling=4e-3 if dtype != torch.float32 else None)


@kernel_dtypes
@pytest.mark.parametrize("mean", [3.0, 100.0, 1e4])
def test_mean_far_from_zero(mean: float, dtype: torch.dtype) -> None:
    # 768 is padded to 1024 lanes: padding that entered the variance would show here
    check_op(layer_norm, arguments((4, 768), dtype, mean=mean), what="layer_norm far mean", ceiling=1.0, distance=mean)


@pytest.mark.parametrize(
    ("layout", "name", "dtype"),
    covering(["offset", "padded", "strided", "transposed"], ["x", "residual", "weight"], KERNEL_DTYPES),
    ids=str,
)
def test_layouts(name: str, layout: str, dtype: torch.dtype) -> None:
    inputs = arguments((6, 5, 40), dtype, residual=True)
    inputs[name] = layouts(inputs[name])[layout]
    check_op(layer_norm, inputs, what="layer_norm layouts", ceiling=4e-3 if dtype != torch.float32 else None)


@pytest.mark.parametrize("shape", [(0, 16), (3, 0, 16)])
@pytest.mark.parametrize("backend", ["reference", "torch", "triton"])
def test_empty(shape: tuple[int, ...], backend: str) -> None:
    inputs = {name: x.requires_grad_() for name, x in arguments(shape, torch.float32, residual=True).items()}
    normed, stream = layer_norm(**inputs, backend=backend)
    assert normed.shape == stream.shape == shape
    grads = torch.autograd.grad([normed.sum(), stream.sum()], list(inputs.values()))
    assert all(not grad.any() for grad in grads)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_bad_numbers_stay_in_their_row(bad: float) -> None:
    inputs = arguments((9, 70), torch.float32)
    inputs["x"][4, 3] = bad
    normed, _ = layer_norm(**inputs, backend="triton")
    assert normed[4].isnan().all()
    assert normed.isfinite().sum() == 8 * 70


def test_stream_keeps_what_the_norm_adds_only_for_itself() -> None:
    inputs = arguments((3, 64), torch.float32, residual=True, constant=True)
    _, stream = layer_norm(**inputs, backend="triton")
    assert torch.equal(stream, inputs["x"] + inputs["residual"])
    _, untouched = layer_norm(inputs["x"], inputs["weight"], inputs["bias"], backend="triton")
    assert untouched is inputs["x"]


def test_repeats_are_bit_equal() -> None:
    inputs = {name: x.requires_grad_() for name, x in arguments((70, 96), torch.float32, residual=True).items()}
    first, *rest = (
        torch.autograd.grad(layer_norm(**inputs, backend="triton"), list(inputs.values()), [torch.ones(70, 96)] * 2)
        for _ in range(3)
    )
    assert all(torch.equal(a, b) for other in rest for a, b in zip(first, other, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_torch_formulation(dtype: torch.dtype) -> None:
    check_op(layer_norm, arguments((5, 3, 40), dtype, residual=True, constant=True), what="layer_norm", backend="torch")


@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.parametrize("constant", [False, True])
def test_registered_op(residual: bool, constant: bool) -> None:
    inputs = arguments((4, 3, 24), torch.float32, residual=residual, constant=constant)
    tensors = [inputs.get(name) for name in ("x", "weight", "bias", "residual", "constant")]
    tensors = [x if x is None else x.requires_grad_() for x in tensors]
    torch.library.opcheck(torch.ops.xclip_fast.layer_norm, (*tensors, 1e-5))


def test_registered_op_without_kernels_has_exact_gradients(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    inputs = arguments((3, 7), torch.float64, residual=True, constant=True)
    tensors = [inputs[name].cpu().requires_grad_() for name in ("x", "weight", "bias", "residual", "constant")]
    function = lambda *args: torch.ops.xclip_fast.layer_norm(*args, 0.3)[:2]  # noqa: E731
    assert torch.autograd.gradcheck(function, tensors)
    # with gradients of both outputs at once, which come alone above
    assert torch.autograd.gradcheck(lambda *args: torch.cat(function(*args)), tensors)


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_compiles_whole(backend: str) -> None:
    compiled = torch.compile(lambda *args: layer_norm(*args, backend=backend)[0], fullgraph=True, backend="aot_eager")
    args = [x.requires_grad_() for x in arguments((4, 32), torch.float32).values()]
    eager = layer_norm(*args, backend=backend)[0]
    assert torch.allclose(compiled(*args), eager)
    with torch.inference_mode():
        assert torch.allclose(compiled(*args), eager)


def test_wrong_arguments_are_named() -> None:
    x, weight, bias = arguments((2, 8), torch.float32).values()
    with pytest.raises(ValueError, match=r"weight must have shape \(8,\) to fit x, found \(7,\)"):
        layer_norm(x, weight[:7], bias)
    with pytest.raises(ValueError, match=r"residual must be torch.float32 \(2, 8\) like x, found torch.float16"):
        layer_norm(x, weight, bias, residual=x.half())
    with pytest.raises(ValueError, match="x must be a floating point"):
        layer_norm(x.int(), weight, bias)
    with pytest.raises(ValueError, match="unknown backend 'cuda'"):
        layer_norm(x, weight, bias, backend="cuda")


def test_explains_what_the_kernels_cannot_take() -> None:
    x, weight, bias = arguments((2, 8), torch.float32).values()
    assert explain("layer_norm", x, weight, bias)["triton"] is None
    assert "float64" in explain("layer_norm", x.double(), weight.double(), bias.double())["triton"]
    wide = torch.empty(1, 9000, device=DEVICE)
    assert "9000" in explain("layer_norm", wide, wide[0], wide[0])["triton"]
    with pytest.raises(ValueError, match="up to 8192 numbers, found 9000"):
        layer_norm(wide, wide[0], wide[0], backend="triton")
