"""Attention of class texts over patches: parity, shared queries, layouts, bad numbers, memory, registration."""

from __future__ import annotations

import math

import pytest
import torch
from harness import DEVICE, KERNEL_DTYPES, ON_GPU, check_op, covering, each_tile, kernel_dtypes, layouts, random

from xclip_fast.ops import explain, prompt_attention

# videos, classes, patches, heads, head dimension
SHAPES = [
    (1, 1, 1, 1, 32),
    (1, 1, 1, 1, 64),
    (2, 1, 3, 1, 32),
    (1, 2, 16, 2, 32),
    (2, 3, 15, 1, 64),
    (1, 5, 17, 2, 64),
    (2, 15, 31, 1, 32),
    (1, 16, 32, 1, 128),
    (1, 17, 33, 2, 32),
    (3, 31, 49, 1, 64),
    (1, 32, 49, 2, 64),
    (2, 33, 63, 1, 32),
    (1, 63, 64, 1, 64),
    (1, 64, 65, 1, 64),
    (1, 65, 100, 1, 32),
    (2, 9, 196, 1, 64),
    (1, 100, 20, 2, 32),
    (1, 7, 256, 1, 64),
    (1, 3, 576, 1, 32),
    (4, 2, 2, 3, 32),
]


def arguments(
    shape: tuple[int, int, int, int, int], dtype: torch.dtype, *, shared: bool = False, mean: float = 0.0
) -> dict[str, object]:
    videos, classes, patches, heads, head_dim = shape
    width = heads * head_dim
    return {
        "query": random(1 if shared else videos, classes, width, dtype=dtype, mean=mean),
        "key": random(videos, patches, width, dtype=dtype, mean=mean),
        "value": random(videos, patches, width, dtype=dtype, mean=mean),
        "heads": heads,
    }


def tensors(inputs: dict[str, object]) -> list[torch.Tensor]:
    return [inputs[name].requires_grad_() for name in ("query", "key", "value")]


@pytest.mark.parametrize(("shape", "dtype"), each_tile(SHAPES), ids=str)
def test_parity(shape: tuple[int, int, int, int, int], dtype: torch.dtype) -> None:
    inputs = arguments(shape, dtype)
    # with one patch the weights are constant and the gradients of query and key vanish
    fixed = ("query", "key") if shape[2] == 1 else ()
    check_op(prompt_attention, inputs, what="prompt_attention", fixed=fixed, ceiling=1e-2)


# the queries of one video are its own
@pytest.mark.parametrize(("shape", "dtype"), each_tile(shape for shape in SHAPES if shape[0] > 1), ids=str)
def test_parity_of_shared_queries(shape: tuple[int, int, int, int, int], dtype: torch.dtype) -> None:
    inputs = arguments(shape, dtype, shared=True)
    check_op(prompt_attention, inputs, what="prompt_attention shared", ceiling=1e-2)


@kernel_dtypes
def test_mean_far_from_zero(dtype: torch.dtype) -> None:
    inputs = arguments((2, 9, 20, 1, 64), dtype, mean=1.0)
    check_op(prompt_attention, inputs, what="prompt_attention far mean", ceiling=2e-2)


@pytest.mark.parametrize(
    ("layout", "name", "dtype"),
    covering(["offset", "padded", "strided", "transposed"], ["query", "key", "value"], KERNEL_DTYPES),
    ids=str,
)
def test_layouts(name: str, layout: str, dtype: torch.dtype) -> None:
    inputs = arguments((2, 5, 18, 2, 32), dtype)
    inputs[name] = layouts(inputs[name])[layout]
    check_op(prompt_attention, inputs, what="prompt_attention layouts", ceiling=1e-2)


@kernel_dtypes
def test_packed_projection_is_read_in_place(dtype: torch.dtype) -> None:
    inputs = arguments((2, 5, 18, 2, 32), dtype)
    packed = random(2, 18, 4 * 64, dtype=dtype)
    inputs["key"], inputs["value"] = packed[..., 64:128], packed[..., 192:]
    check_op(prompt_attention, inputs, what="prompt_attention packed", ceiling=1e-2)


@pytest.mark.parametrize("shape", [(0, 3, 4, 1, 32), (2, 0, 4, 1, 32)])
@pytest.mark.parametrize("backend", ["reference", "torch", "triton"])
def test_empty(shape: tuple[int, int, int, int, int], backend: str) -> None:
    inputs = arguments(shape, torch.float32)
    leaves = tensors(inputs)
    out = prompt_attention(**inputs, backend=backend)
    assert out.shape == (shape[0], shape[1], 32)
    assert all(not grad.any() for grad in torch.autograd.grad(out.sum(), leaves))


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("name", ["query", "key", "value"])
def test_bad_numbers_as_in_torch(name: str, bad: float) -> None:
    inputs = arguments((2, 5, 20, 2, 32), torch.float32)
    inputs[name][1, 3, 40] = bad
    found = prompt_attention(**inputs, backend="triton")
    expected = prompt_attention(**inputs, backend="reference")
    assert torch.equal(found.isfinite(), expected.isfinite())
    assert torch.allclose(found[expected.isfinite()], expected[expected.isfinite()], atol=1e-5)


def test_large_scores_do_not_overflow() -> None:
    inputs = arguments((1, 4, 20, 1, 64), torch.float32)
    inputs["query"] = inputs["query"] * 1e3
    # the weights saturate: one is 1, the others vanish, and with them the gradients that could be compared
    check_op(prompt_attention, inputs, what="prompt_attention large scores", gradients=False)
    leaves = tensors(inputs)
    grads = torch.autograd.grad(prompt_attention(**inputs, backend="triton").sum(), leaves)
    assert all(grad.isfinite().all() for grad in grads)


def test_backward_keeps_no_weights() -> None:
    inputs = arguments((1, 70, 90, 1, 32), torch.float32)
    tensors(inputs)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x) or x, lambda x: x):
        prompt_attention(**inputs, backend="triton")
    assert sum(x.numel() for x in kept) == 32 * (70 + 90 + 90 + 70) + 70


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("shared", [False, True])
def test_torch_formulation(dtype: torch.dtype, shared: bool) -> None:
    inputs = arguments((2, 7, 20, 2, 20), dtype, shared=shared)
    check_op(prompt_attention, inputs, what="prompt_attention torch", backend="torch")


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("kernels", ["0", "1"], ids=["torch", "kernels"])
def test_log_sum_exp(kernels: str, shared: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if not ON_GPU:
        monkeypatch.setenv("TRITON_INTERPRET", kernels)
    query, key, value, heads = arguments((2, 3, 5, 2, 32), torch.float32, shared=shared).values()
    _, found = torch.ops.xclip_fast.prompt_attention(query, key, value, heads)
    q, k = (x.double().unflatten(-1, (heads, -1)).transpose(1, 2) for x in (query, key))
    truth = (q @ k.mT * 32**-0.5).logsumexp(-1) / math.log(2)
    assert torch.allclose(found.double(), truth.expand(2, -1, -1), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("shared", [False, True])
def test_registered_op(shared: bool) -> None:
    inputs = arguments((2, 3, 5, 2, 32), torch.float32, shared=shared)
    torch.library.opcheck(torch.ops.xclip_fast.prompt_attention, (*tensors(inputs), 2))


@pytest.mark.parametrize("shared", [False, True])
def test_registered_op_without_kernels_has_exact_gradients(shared: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    inputs = arguments((2, 3, 4, 2, 3), torch.float64, shared=shared)
    leaves = [x.detach().cpu().requires_grad_() for x in tensors(inputs)]
    assert torch.autograd.gradcheck(lambda *args: torch.ops.xclip_fast.prompt_attention(*args, 2)[0], leaves)


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_compiles_whole(backend: str) -> None:
    function = torch.compile(
        lambda *args: prompt_attention(*args, 2, backend=backend), fullgraph=True, backend="aot_eager"
    )
    leaves = tensors(arguments((2, 3, 5, 2, 32), torch.float32))
    assert torch.allclose(function(*leaves), prompt_attention(*leaves, 2, backend=backend), atol=1e-6)
    with torch.inference_mode():
        assert torch.allclose(function(*leaves), prompt_attention(*leaves, 2, backend=backend), atol=1e-6)


def test_autocast_as_attention() -> None:
    inputs = arguments((2, 3, 5, 2, 32), torch.float32)
    leaves = [x.cpu() for x in tensors(inputs)]
    with torch.autocast("cpu", torch.bfloat16):
        assert prompt_attention(*leaves, 2, backend="torch").dtype == torch.bfloat16


def test_repeats_are_bit_equal() -> None:
    inputs = arguments((2, 40, 50, 1, 32), torch.float32)
    leaves = tensors(inputs)
    runs = [torch.autograd.grad(prompt_attention(**inputs, backend="triton").sum(), leaves) for _ in range(3)]
    assert all(torch.equal(a, b) for other in runs[1:] for a, b in zip(runs[0], other, strict=True))


def test_wrong_arguments_are_named() -> None:
    query, key, value, heads = arguments((2, 3, 5, 2, 32), torch.float32).values()
    with pytest.raises(ValueError, match="E a multiple of heads"):
        prompt_attention(query, key, value, 3)
    with pytest.raises(ValueError, match=r"key must be torch.float32 \(B, N, 64\)"):
        prompt_attention(query, key[:1], value[:1], heads)
    with pytest.raises(ValueError, match=r"value must be torch.float32 \(2, 5, 64\) like key"):
        prompt_attention(query, key, value[:, :4], heads)
    with pytest.raises(ValueError, match="head dimension is 32, 64 or 128, found 16"):
        prompt_attention(query, key, value, 4, backend="triton")
    assert explain("prompt_attention", query, key, value, heads)["triton"] is None
    assert query.device.type == DEVICE
