"""Logits in one pass: parity, layouts, zero and bad vectors, registration."""

from __future__ import annotations

import pytest
import torch
from harness import DEVICE, KERNEL_DTYPES, check_op, covering, each_tile, kernel_dtypes, layouts, random

from xclip_fast.ops import clip_logits, explain

SCALE = ("logit_scale",)
SHAPES = [
    (1, 1, 1),
    (1, 1, 2),
    (1, 2, 3),
    (2, 1, 16),
    (3, 4, 31),
    (1, 5, 64),
    (2, 7, 65),
    (5, 3, 127),
    (2, 8, 128),
    (1, 33, 129),
    (4, 4, 100),
    (2, 5, 511),
    (2, 9, 512),
    (1, 6, 513),
    (2, 3, 768),
    (1, 2, 1025),
    (7, 10, 40),
    (1, 101, 24),
]


def arguments(shape: tuple[int, int, int], dtype: torch.dtype, *, mean: float = 0.0, scale: float = 1.0) -> dict:
    batch, classes, width = shape
    return {
        "video": random(batch, width, dtype=dtype, mean=mean),
        "text": random(classes, width, dtype=dtype, mean=mean),
        "prompts": random(batch, classes, width, dtype=dtype, scale=scale),
        "alpha": random(width, dtype=dtype, scale=0.3),
        "logit_scale": torch.tensor(2.0, dtype=dtype, device=DEVICE),
    }


@pytest.mark.parametrize(("shape", "dtype"), each_tile(SHAPES), ids=str)
def test_parity(shape: tuple[int, int, int], dtype: torch.dtype) -> None:
    # gradients orthogonal to a vector cancel where vectors have one or two numbers, or dots are near zero
    ceiling = 1.0 if shape[2] < 4 else 2e-2
    check_op(clip_logits, arguments(shape, dtype), what="clip_logits", fixed=SCALE, ceiling=ceiling)


@kernel_dtypes
@pytest.mark.parametrize("mean", [1.0, 3.0])
def test_mean_far_from_zero(mean: float, dtype: torch.dtype) -> None:
    inputs = arguments((3, 5, 96), dtype, mean=mean)
    check_op(clip_logits, inputs, what="clip_logits far mean", fixed=SCALE, ceiling=5e-2)


@kernel_dtypes
@pytest.mark.parametrize("shape", SHAPES[2::3], ids=str)
def test_gradient_of_the_scale(shape: tuple[int, int, int], dtype: torch.dtype) -> None:
    # one number, the sum of terms of either sign: its error is measured against the sum of their sizes
    inputs = arguments(shape, dtype)
    scale = inputs["logit_scale"].requires_grad_()
    logits = clip_logits(**inputs, backend="triton")
    upstream = torch.randn_like(logits)
    (found,) = torch.autograd.grad(logits, scale, upstream)
    exact = clip_logits(**{name: x.detach().double() for name, x in inputs.items()}, backend="reference")
    terms = upstream.double() * exact
    assert (found.double() - terms.sum()).abs() <= 4 * torch.finfo(dtype).eps * terms.abs().sum()


@pytest.mark.parametrize(
    ("layout", "name", "dtype"),
    covering(["offset", "padded", "strided", "transposed"], ["video", "text", "prompts", "alpha"], KERNEL_DTYPES),
    ids=str,
)
def test_layouts(name: str, layout: str, dtype: torch.dtype) -> None:
    inputs = arguments((3, 6, 40), dtype)
    inputs[name] = layouts(inputs[name])[layout]
    check_op(clip_logits, inputs, what="clip_logits layouts", fixed=SCALE, ceiling=2e-2)


# the tile follows from the width alone; layouts and dtypes meet each shape, not all at once
@pytest.mark.parametrize(
    ("shape", "layout", "dtype"), covering(SHAPES[3::3], ["contiguous", "padded", "strided"], KERNEL_DTYPES), ids=str
)
def test_residual(layout: str, shape: tuple[int, int, int], dtype: torch.dtype) -> None:
    inputs = arguments(shape, dtype)
    residual = random(*inputs["prompts"].shape, dtype=dtype)
    inputs["residual"] = residual if layout == "contiguous" else layouts(residual)[layout]
    check_op(clip_logits, inputs, what="clip_logits residual", fixed=SCALE, ceiling=2e-2)
    if dtype == torch.float32:
        check_op(clip_logits, inputs, what="clip_logits torch residual", backend="torch", fixed=SCALE, ceiling=2e-2)


# the engine's: texts in float32, the rest of them rounded, and one residual for all of them
@pytest.mark.parametrize("backend", ["torch", "triton"])
@pytest.mark.parametrize("half", [("video", "prompts", "residual"), ("video",), ("prompts", "residual")], ids=str)
@pytest.mark.parametrize("dtype", KERNEL_DTYPES[1:], ids=str)
def test_half_precision_beside_texts_in_float32(dtype: torch.dtype, half: tuple[str, ...], backend: str) -> None:
    inputs = arguments((3, 6, 40), torch.float32)
    inputs["residual"] = random(40, dtype=torch.float32).expand(3, 6, -1)
    inputs |= {name: inputs[name].to(dtype) for name in half}
    check_op(clip_logits, inputs, what="clip_logits mixed", fixed=SCALE, ceiling=2e-2, backend=backend)
    assert clip_logits(**inputs, backend=backend).dtype == torch.float32


@pytest.mark.parametrize("shape", [(0, 3, 8), (2, 0, 8)])
@pytest.mark.parametrize("backend", ["reference", "torch", "triton"])
def test_empty(shape: tuple[int, int, int], backend: str) -> None:
    inputs = {name: x.requires_grad_() for name, x in arguments(shape, torch.float32).items()}
    out = clip_logits(**inputs, backend=backend)
    assert out.shape == shape[:2]
    assert all(not grad.any() for grad in torch.autograd.grad(out.sum(), list(inputs.values())))


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_zero_vectors_give_zero_as_normalize_does(backend: str) -> None:
    inputs = arguments((2, 3, 16), torch.float32)
    inputs["video"][0] = 0
    inputs["text"][1] = 0
    inputs["prompts"][:, 1] = 0
    found = clip_logits(**inputs, backend=backend)
    assert torch.allclose(found, clip_logits(**inputs, backend="reference"), atol=1e-6)
    assert not found[0].any()
    assert not found[:, 1].any()


def test_one_bad_text_spoils_only_its_own_logits() -> None:
    inputs = arguments((2, 6, 40), torch.float32)
    inputs["prompts"][1, 4, 7] = float("nan")
    found = clip_logits(**inputs, backend="triton")
    assert found[1, 4].isnan()
    assert found.isfinite().sum() == 11


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_torch_formulation(dtype: torch.dtype) -> None:
    check_op(clip_logits, arguments((3, 7, 40), dtype), what="clip_logits torch", backend="torch", fixed=SCALE)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_torch_formulation_rounds_half_precision_once(dtype: torch.dtype) -> None:
    # cosines are differences of large sums: these are in float32
    inputs = arguments((2, 5, 512), dtype) | {"residual": random(2, 5, 512, dtype=dtype)}
    exact = clip_logits(**{name: x.float() for name, x in inputs.items()}, backend="torch")
    assert torch.equal(clip_logits(**inputs, backend="torch"), exact.to(dtype))


@pytest.mark.slow
def test_registered_op() -> None:
    for shape in ((2, 3, 24), (1, 1, 5)):
        inputs = [x.requires_grad_() for x in arguments(shape, torch.float32).values()]
        torch.library.opcheck(torch.ops.xclip_fast.clip_logits, (*inputs, None))
        residual = torch.randn_like(inputs[2]).requires_grad_()
        torch.library.opcheck(torch.ops.xclip_fast.clip_logits, (*inputs, residual))


def test_registered_op_without_kernels_has_exact_gradients(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    inputs = [x.cpu().requires_grad_() for x in arguments((2, 3, 7), torch.float64).values()]
    inputs.append(torch.randn_like(inputs[2]).requires_grad_())
    assert torch.autograd.gradcheck(torch.ops.xclip_fast.clip_logits, inputs)


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_compiles_whole(backend: str) -> None:
    function = torch.compile(lambda *args: clip_logits(*args, backend=backend), fullgraph=True, backend="aot_eager")
    inputs = [x.requires_grad_() for x in arguments((2, 3, 32), torch.float32).values()]
    assert torch.allclose(function(*inputs), clip_logits(*inputs, backend=backend), atol=1e-6)
    with torch.inference_mode():
        assert torch.allclose(function(*inputs), clip_logits(*inputs, backend=backend), atol=1e-6)


def test_repeats_are_bit_equal() -> None:
    inputs = {name: x.requires_grad_() for name, x in arguments((3, 21, 48), torch.float32).items()}
    runs = [torch.autograd.grad(clip_logits(**inputs, backend="triton").sum(), list(inputs.values())) for _ in "abc"]
    assert all(torch.equal(a, b) for other in runs[1:] for a, b in zip(runs[0], other, strict=True))


def test_wrong_arguments_are_named() -> None:
    video, text, prompts, alpha, logit_scale = arguments((2, 3, 8), torch.float32).values()
    with pytest.raises(ValueError, match=r"prompts must be torch.float32 \(2, 3, 8\) to fit video and text"):
        clip_logits(video, text, prompts[:1], alpha, logit_scale)
    with pytest.raises(ValueError, match=r"text must be torch.float32 \(K, 8\)"):
        clip_logits(video, text.half(), prompts, alpha, logit_scale)
    with pytest.raises(ValueError, match=r"prompts must be torch.float16 .*, or less precise, found torch.float32"):
        clip_logits(video.half(), text.half(), prompts, alpha, logit_scale)
    with pytest.raises(ValueError, match=r"residual must be torch.float32 .* like prompts, found torch.float16"):
        clip_logits(video, text, prompts, alpha, logit_scale, residual=prompts.half())
    with pytest.raises(ValueError, match="logit_scale must be a scalar"):
        clip_logits(video, text, prompts, alpha, alpha)
    assert (
        "float64" in explain("clip_logits", *(x.double() for x in (video, text, prompts, alpha, logit_scale)))["triton"]
    )
