"""Mean over frames of the patches' layer norm: parity, layouts, bad numbers, registration."""

from __future__ import annotations

import pytest
import torch
from harness import DEVICE, KERNEL_DTYPES, check_op, covering, each_tile, kernel_dtypes, layouts, random

from xclip_fast.ops import explain, layer_norm, mean_norm_over_frames

SHAPES = [
    (1, 1, 1, 4),
    (1, 8, 1, 64),
    (2, 1, 3, 31),
    (1, 2, 5, 127),
    (2, 3, 4, 128),
    (3, 2, 1, 129),
    (1, 16, 2, 48),
    (2, 32, 1, 20),
    (1, 3, 49, 16),
    (2, 4, 7, 96),
    (1, 2, 2, 767),
    (1, 2, 3, 768),
    (1, 2, 2, 769),
    (1, 2, 1, 1024),
    (2, 2, 1, 1025),
    (4, 5, 6, 7),
]


def arguments(shape: tuple[int, ...], dtype: torch.dtype, mean: float = 0.0) -> dict[str, object]:
    return {
        "tokens": random(*shape, dtype=dtype, mean=mean),
        "weight": random(shape[-1], dtype=dtype, mean=1.0),
        "bias": random(shape[-1], dtype=dtype),
    }


@pytest.mark.parametrize(("shape", "dtype"), each_tile(SHAPES), ids=str)
def test_parity(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    check_op(mean_norm_over_frames, arguments(shape, dtype), what="mean_norm_over_frames", ceiling=4e-3)


@kernel_dtypes
@pytest.mark.parametrize("mean", [3.0, 100.0, 1e4])
def test_mean_far_from_zero(mean: float, dtype: torch.dtype) -> None:
    inputs = arguments((1, 3, 4, 768), dtype, mean)
    check_op(mean_norm_over_frames, inputs, what="mean_norm_over_frames far mean", ceiling=1.0, distance=mean)


@kernel_dtypes
@pytest.mark.parametrize("layout", ["offset", "padded", "strided", "transposed", "without class token"])
def test_layouts(layout: str, dtype: torch.dtype) -> None:
    inputs = arguments((2, 3, 5, 40), dtype)
    if layout == "without class token":
        inputs["tokens"] = random(2, 3, 6, 40, dtype=dtype)[:, :, 1:]
    else:
        inputs["tokens"] = layouts(inputs["tokens"])[layout]
    check_op(mean_norm_over_frames, inputs, what="mean_norm_over_frames layouts", ceiling=4e-3)


# the tile follows from the width alone; layouts and dtypes meet each shape, not all at once
@pytest.mark.parametrize(
    ("shape", "layout", "dtype"),
    covering(SHAPES[::3], ["contiguous", "without class token", "strided"], KERNEL_DTYPES),
    ids=str,
)
def test_residual(layout: str, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    inputs = arguments(shape, dtype)
    batch, frames, patches, width = shape
    residual = random(batch, frames, patches + 1, width, dtype=dtype, mean=0.5)[:, :, 1:]
    inputs["residual"] = residual if layout == "without class token" else residual.contiguous()
    if layout == "strided":
        inputs["residual"] = layouts(inputs["residual"])["strided"]
    check_op(mean_norm_over_frames, inputs, what="mean_norm_over_frames residual", ceiling=4e-3)
    if dtype == torch.float32:
        check_op(mean_norm_over_frames, inputs, what="mean_norm_over_frames torch residual", backend="torch")


# tiles of all frames, of some of them and of one
@pytest.mark.parametrize(
    ("shape", "dtype"), each_tile([(1, 1, 1, 4), (2, 3, 4, 128), (1, 19, 2, 768), (2, 2, 1, 1025)]), ids=str
)
def test_constant(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    inputs = arguments(shape, dtype) | {"constant": random(shape[-1], dtype=dtype, mean=2.0)}
    check_op(mean_norm_over_frames, inputs, what="mean_norm_over_frames constant", ceiling=4e-3)
    inputs["residual"] = random(*shape, dtype=dtype)
    check_op(mean_norm_over_frames, inputs, what="mean_norm_over_frames both", ceiling=4e-3)
    if dtype == torch.float32:
        check_op(mean_norm_over_frames, inputs, what="mean_norm_over_frames torch both", backend="torch")
    else:
        # its gradient is a sum of rounded ones, which is no better for its own digits
        inputs["constant"] = inputs["constant"].float()
        check_op(mean_norm_over_frames, inputs, what="mean_norm_over_frames exact constant", gradients=False)


@pytest.mark.slow
def test_many_patches_hold_fewer_frames_at_once() -> None:
    check_op(mean_norm_over_frames, arguments((2, 5, 129, 1025), torch.float16), what="many patches", gradients=False)


def test_frames_beyond_the_last_add_nothing_without_eps() -> None:
    inputs = arguments((1, 3, 2, 48), torch.float32)
    found = mean_norm_over_frames(**inputs, eps=0.0, backend="triton")
    assert torch.allclose(found, mean_norm_over_frames(**inputs, eps=0.0, backend="reference"), atol=1e-5)


def test_residual_must_be_like_tokens() -> None:
    with pytest.raises(ValueError, match=r"residual must be torch.float32 \(1, 2, 3, 4\) like tokens, found .*3, 5"):
        mean_norm_over_frames(**arguments((1, 2, 3, 4), torch.float32), residual=torch.zeros(1, 2, 3, 5))


@pytest.mark.parametrize("shape", [(0, 2, 3, 8), (2, 2, 0, 8)])
@pytest.mark.parametrize("backend", ["reference", "torch", "triton"])
def test_empty(shape: tuple[int, ...], backend: str) -> None:
    inputs = {name: x.requires_grad_() for name, x in arguments(shape, torch.float32).items()}
    out = mean_norm_over_frames(**inputs, backend=backend)
    assert out.shape == (shape[0], shape[2], shape[3])
    assert all(not grad.any() for grad in torch.autograd.grad(out.sum(), list(inputs.values())))


def test_one_bad_patch_spoils_only_its_own_mean() -> None:
    inputs = arguments((2, 3, 4, 70), torch.float32)
    inputs["tokens"][1, 2, 3, 5] = float("nan")
    out = mean_norm_over_frames(**inputs, backend="triton")
    assert out[1, 3].isnan().all()
    assert out.isfinite().sum() == 7 * 70


def test_one_frame_is_layer_norm() -> None:
    inputs = arguments((2, 1, 5, 64), torch.float32)
    normed, _ = layer_norm(inputs["tokens"], inputs["weight"], inputs["bias"], backend="triton")
    assert torch.allclose(mean_norm_over_frames(**inputs, backend="triton"), normed[:, 0], atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_torch_formulation(dtype: torch.dtype) -> None:
    inputs = arguments((2, 3, 5, 40), dtype)
    check_op(mean_norm_over_frames, inputs, what="mean_norm_over_frames torch", backend="torch")


@pytest.mark.slow
def test_registered_op() -> None:
    for shape in ((2, 3, 4, 24), (1, 1, 1, 5)):
        inputs = [x.requires_grad_() for x in arguments(shape, torch.float32).values()]
        torch.library.opcheck(torch.ops.xclip_fast.mean_norm_over_frames, (*inputs, None, None, 1e-5))
        residual = random(*shape, dtype=torch.float32).requires_grad_()
        constant = random(shape[-1], dtype=torch.float32).requires_grad_()
        torch.library.opcheck(torch.ops.xclip_fast.mean_norm_over_frames, (*inputs, residual, constant, 1e-5))


def test_registered_op_without_kernels_has_exact_gradients(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    inputs = [x.cpu().requires_grad_() for x in arguments((2, 3, 2, 7), torch.float64).values()]
    inputs += [random(*shape, dtype=torch.float64).cpu().requires_grad_() for shape in ((2, 3, 2, 7), (7,))]
    assert torch.autograd.gradcheck(lambda *args: torch.ops.xclip_fast.mean_norm_over_frames(*args, 0.3), inputs)


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_compiles_whole(backend: str) -> None:
    function = torch.compile(
        lambda *args: mean_norm_over_frames(*args, backend=backend), fullgraph=True, backend="aot_eager"
    )
    inputs = [x.requires_grad_() for x in arguments((2, 3, 4, 32), torch.float32).values()]
    assert torch.allclose(function(*inputs), mean_norm_over_frames(*inputs, backend=backend), atol=1e-6)
    with torch.inference_mode():
        assert torch.allclose(function(*inputs), mean_norm_over_frames(*inputs, backend=backend), atol=1e-6)


def test_repeats_are_bit_equal() -> None:
    inputs = {name: x.requires_grad_() for name, x in arguments((2, 3, 9, 48), torch.float32).items()}
    runs = [
        torch.autograd.grad(mean_norm_over_frames(**inputs, backend="triton").sum(), list(inputs.values()))
        for _ in range(3)
    ]
    assert all(torch.equal(a, b) for other in runs[1:] for a, b in zip(runs[0], other, strict=True))


def test_wrong_arguments_are_named() -> None:
    tokens, weight, bias = arguments((2, 3, 4, 8), torch.float32).values()
    with pytest.raises(ValueError, match=r"tokens must be a floating point \(B, T, N, D\) tensor.*\(3, 4, 8\)"):
        mean_norm_over_frames(tokens[0], weight, bias)
    with pytest.raises(ValueError, match=r"T >= 1"):
        mean_norm_over_frames(tokens[:, :0], weight, bias)
    with pytest.raises(ValueError, match=r"bias must have shape \(8,\)"):
        mean_norm_over_frames(tokens, weight, bias[:3])
    with pytest.raises(ValueError, match=r"constant must have shape \(8,\)"):
        mean_norm_over_frames(tokens, weight, bias, constant=bias[:3])
    wide = torch.empty(1, 1, 1, 9000, device=DEVICE)
    assert "9000" in explain("mean_norm_over_frames", wide, wide[0, 0, 0], wide[0, 0, 0])["triton"]
