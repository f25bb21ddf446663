"""Patch embedding: parity from bytes and floats in every layout, gradients, registration, refusals before any work."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from harness import DEVICE, check_op, random
from numerics import assert_within, longest_sum, relative_error
from torch import Tensor, nn

from xclip_fast import _extension, processor, reference
from xclip_fast.bench.parity import doubled
from xclip_fast.config import CLIP_MEAN, CLIP_STD, IMAGENET_MEAN, IMAGENET_STD
from xclip_fast.numerics import allowance
from xclip_fast.ops import _patch_extension, patch_embed
from xclip_fast.reference.vision import embed_patches

BUILT = _extension.refusal() is None
needs_extension = pytest.mark.skipif(not BUILT or DEVICE != "cpu", reason=_extension.refusal() or "a test of the CPU")
BACKENDS = ["torch", pytest.param("extension", marks=needs_extension)]
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype).removeprefix("torch."))
backends = pytest.mark.parametrize("backend", BACKENDS)

# frames, height, width, patch, token width: the tuned patches, odd ones, one patch, wide and tall frames, one channel
SHAPES = [
    (1, 32, 32, 32, 1),
    (1, 32, 32, 32, 8),
    (2, 64, 32, 32, 24),
    (1, 32, 96, 32, 33),
    (3, 64, 64, 32, 16),
    (1, 128, 64, 32, 40),
    (1, 16, 16, 16, 1),
    (1, 16, 16, 16, 65),
    (2, 48, 32, 16, 24),
    (5, 16, 48, 16, 31),
    (1, 112, 80, 16, 12),
    (2, 160, 160, 16, 20),
    (1, 14, 14, 14, 1),
    (1, 14, 14, 14, 70),
    (2, 28, 42, 14, 24),
    (4, 42, 14, 14, 17),
    (1, 98, 126, 14, 13),
    (2, 126, 126, 14, 21),
    (1, 1, 1, 1, 1),
    (1, 1, 1, 1, 128),
    (2, 3, 2, 1, 7),
    (1, 11, 13, 1, 5),
    (2, 2, 4, 2, 9),
    (1, 24, 26, 2, 16),
    (3, 3, 3, 3, 10),
    (2, 9, 6, 3, 129),
    (1, 36, 39, 3, 8),
    (2, 4, 4, 4, 64),
    (1, 48, 52, 4, 3),
    (2, 5, 10, 5, 11),
    (1, 7, 7, 7, 127),
    (2, 21, 14, 7, 18),
    (1, 8, 24, 8, 32),
    (2, 96, 64, 8, 10),
    (1, 9, 9, 9, 6),
    (2, 22, 11, 11, 15),
    (1, 13, 26, 13, 19),
    (1, 15, 15, 15, 768),
    (2, 34, 17, 17, 20),
    (1, 24, 48, 24, 14),
    (1, 31, 31, 31, 23),
    (1, 33, 66, 33, 9),
    (1, 64, 64, 64, 4),
    (130, 2, 2, 2, 6),
]


def arguments(
    shape: tuple[int, int, int, int, int], dtype: torch.dtype, *, kind: str = "last", norm: bool = True
) -> dict[str, object]:
    """Frames of a kind ("last" and "first" are bytes, by where their channels are; "float"), and parameters."""
    count, height, width, patch, size = shape
    sides = (height, width, 3) if kind == "last" else (3, height, width)
    frames = torch.randint(0, 256, (count, *sides), dtype=torch.uint8, device=DEVICE)
    found: dict[str, object] = {
        "frames": random(count, *sides, dtype=dtype) if kind == "float" else frames,
        "weight": random(size, 3, patch, patch, dtype=dtype, scale=(3 * patch * patch) ** -0.5),
        "class_embedding": random(size, dtype=dtype),
        "positions": random(1 + height // patch * (width // patch), size, dtype=dtype),
    }
    if norm:
        found |= {"norm_weight": random(size, dtype=dtype, mean=1.0), "norm_bias": random(size, dtype=dtype)}
    return found


def check(inputs: dict[str, object], backend: str, what: str, **kwargs: object) -> None:
    # norms of few numbers multiply rounding errors, torch's own too
    check_op(patch_embed, inputs, what=f"patch_embed {backend} {what}", backend=backend, ceiling=0.2, **kwargs)


def nth(shape: tuple[int, int, int, int, int], dtype: torch.dtype) -> tuple[str, dict[str, object]]:
    """Arguments of a shape, by its place of another kind each."""
    index = SHAPES.index(shape)
    kind = ("last", "float", "first")[index % 3]
    return kind, arguments(shape, dtype, kind=kind, norm=shape[-1] > 4 and index % 4 > 0)


@needs_extension
@dtypes
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_parity(shape: tuple[int, int, int, int, int], dtype: torch.dtype) -> None:
    kind, inputs = nth(shape, dtype)
    check(inputs, "extension", kind)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_torch_formulation(shape: tuple[int, int, int, int, int]) -> None:
    kind, inputs = nth(shape, torch.float32)
    check(inputs, "torch", kind, gradients=False)
    # its gradients are torch's own: only their formulas are in question
    kind, inputs = nth(shape, torch.float64)
    check(inputs, "torch", kind)


@needs_extension
@dtypes
@pytest.mark.parametrize("bytes_of", ["all", "none"])
@pytest.mark.parametrize("norm", [True, False])
@pytest.mark.parametrize("patch", [2, 14, 16, 32])
def test_products_of_bytes_and_of_floats(
    patch: int, norm: bool, bytes_of: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    if bytes_of == "all" and (processor.sums_bytes_in_16_bits() or not torch.cpu._is_vnni_supported()):
        pytest.skip("this processor has no product of bytes")
    monkeypatch.setattr(_patch_extension, "MIN_INTEGER_ROWS", 0 if bytes_of == "all" else 10**9)
    # two frames of six patches at a time, then one
    monkeypatch.setattr(_patch_extension, "ROWS", 12)
    for kind in ("last", "first"):
        check(arguments((3, 2 * patch, 3 * patch, patch, 37), dtype, kind=kind, norm=norm), "extension", bytes_of)


def crops() -> dict[str, Callable[[Tensor], Tensor]]:
    """The same bytes (F, H, W, 3) in other memory."""

    def crop(frames: Tensor) -> Tensor:
        count, height, width, _ = frames.shape
        return frames.new_zeros(count, height + 9, width + 5, 3)[:, 4:-5, 2:-3].copy_(frames)

    def offset(frames: Tensor) -> Tensor:
        return frames.new_zeros(frames.numel() + 1)[1:].view(frames.shape).copy_(frames)

    def with_alpha(frames: Tensor) -> Tensor:
        return frames.new_zeros(*frames.shape[:3], 4)[..., :3].copy_(frames)

    def every_other(frames: Tensor) -> Tensor:
        count, height, width, _ = frames.shape
        return frames.new_zeros(2 * count, 2 * height, 2 * width, 3)[::2, ::2, ::2].copy_(frames)

    def planar(frames: Tensor) -> Tensor:
        return frames.permute(0, 3, 1, 2).contiguous().permute(0, 2, 3, 1)

    def turned(frames: Tensor) -> Tensor:
        return frames.transpose(1, 2).contiguous().transpose(1, 2)

    def first_over_last(frames: Tensor) -> Tensor:
        return frames.permute(0, 3, 1, 2)

    return {
        function.__name__: function
        for function in (crop, offset, with_alpha, every_other, planar, turned, first_over_last)
    }


@backends
@pytest.mark.parametrize("layout", list(crops()))
@pytest.mark.parametrize("patch", [6, 14, 16])
def test_layouts(patch: int, layout: str, backend: str) -> None:
    inputs = arguments((2, 10 * patch, 8 * patch, patch, 20), torch.float32)
    inputs["frames"] = crops()[layout](inputs["frames"])
    check(inputs, backend, "layouts")


@backends
def test_one_frame_seen_many_times(backend: str) -> None:
    inputs = arguments((1, 32, 48, 16, 20), torch.float32)
    inputs["frames"] = inputs["frames"].expand(5, -1, -1, -1)
    check(inputs, backend, "layouts")


@backends
def test_layouts_of_floats_and_of_weights(backend: str) -> None:
    inputs = arguments((2, 28, 42, 14, 20), torch.float32, kind="float")
    inputs["frames"] = inputs["frames"].contiguous(memory_format=torch.channels_last)
    inputs["weight"] = inputs["weight"].contiguous(memory_format=torch.channels_last)
    inputs["positions"] = inputs["positions"].T.contiguous().T
    inputs["class_embedding"] = torch.stack([inputs["class_embedding"]] * 2, dim=1)[:, 0]
    check(inputs, backend, "layouts")


@backends
@pytest.mark.parametrize("mean_std", [(IMAGENET_MEAN, IMAGENET_STD), ((0.9, 0.1, 0.5), (0.05, 2.0, 1.0))])
def test_mean_and_deviation(mean_std: tuple[tuple[float, ...], tuple[float, ...]], backend: str) -> None:
    inputs = arguments((2, 64, 48, 4, 30), torch.float32)
    check({**inputs, "mean": mean_std[0], "std": mean_std[1]}, backend, "mean and std")


def test_the_default_statistics_are_those_of_clip() -> None:
    inputs = arguments((1, 16, 16, 8, 10), torch.float32)
    assert torch.equal(patch_embed(**inputs), patch_embed(**inputs, mean=CLIP_MEAN, std=CLIP_STD))


@backends
@pytest.mark.parametrize("weights", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64])
def test_dtype_of_the_result(dtype: torch.dtype, weights: torch.dtype, backend: str) -> None:
    inputs = arguments((2, 48, 48, 4, 30), weights)
    truth = patch_embed(**doubled(inputs), backend="reference")
    plain = patch_embed(**inputs, dtype=dtype, backend="reference")
    inputs["weight"].requires_grad_()
    out = patch_embed(**inputs, dtype=dtype, backend=backend)
    assert out.dtype == plain.dtype == dtype
    # the sums are at least in float32, and so is the truth's rounding: none to half precision is added
    exact = torch.promote_types(weights, torch.float32)
    limit = allowance(relative_error(plain, truth), exact, longest_sum(inputs), ceiling=0.2)
    assert_within(out, truth, limit, what=f"patch_embed {backend} to another dtype")
    (grad,) = torch.autograd.grad(out.sum(), [inputs["weight"]])
    assert grad.dtype == weights


@needs_extension
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_before_the_result_is_rounded_half_precision_loses_little(dtype: torch.dtype) -> None:
    for patch in (14, 16, 32):
        inputs = arguments((4, 8 * patch, 8 * patch, patch, 96), dtype, norm=False)
        found = patch_embed(**inputs, dtype=torch.float32, backend="extension")
        assert_within(
            found, patch_embed(**doubled(inputs), backend="reference"), 5e-4, what="patch_embed before rounding"
        )


@backends
def test_mixed_dtypes_of_parameters(backend: str) -> None:
    inputs = arguments((2, 48, 48, 4, 30), torch.float16)
    for name in ("class_embedding", "positions", "norm_weight", "norm_bias"):
        inputs[name] = inputs[name].float()
    check(inputs, backend, "mixed dtypes", gradients=backend == "extension")


@backends
@pytest.mark.parametrize("kind", ["last", "first", "float"])
def test_no_frames(kind: str, backend: str) -> None:
    inputs = arguments((0, 32, 32, 16, 10), torch.float32, kind=kind)
    leaves = [x.requires_grad_() for x in inputs.values() if x.is_floating_point()]
    out = patch_embed(**inputs, backend=backend)
    assert out.shape == (0, 5, 10)
    assert all(not grad.any() for grad in torch.autograd.grad(out.sum(), leaves))


@backends
def test_bad_numbers_spoil_only_their_own(backend: str) -> None:
    inputs = arguments((2, 32, 32, 16, 10), torch.float32, kind="float", norm=False)
    inputs["frames"][1, 2, 17, 3] = float("nan")
    out = patch_embed(**inputs, backend=backend)
    assert out[1, 3].isnan().all()
    assert out.isfinite().sum() == 9 * 10
    # bytes are finite, weights need not be
    inputs = arguments((8, 64, 64, 16, 10), torch.float32, norm=False)
    inputs["weight"][3, 1, 2, 5] = float("nan")
    inputs["weight"][7, 0, 0, 0] = float("inf")
    out = patch_embed(**inputs, backend=backend)
    assert not out[:, 1:, [3, 7]].isfinite().any()
    assert out[:, 1:, [0, 1, 2, 4, 5, 6, 8, 9]].isfinite().all()
    assert out[:, 0].isfinite().all()


@backends
def test_weights_of_very_different_size(backend: str) -> None:
    inputs = arguments((4, 64, 64, 8, 12), torch.float32, norm=False)
    inputs["weight"] *= torch.logspace(-6, 6, 12, device=DEVICE)[:, None, None, None]
    inputs["weight"][5] = 0
    inputs["weight"][6] = 1e-42
    out = patch_embed(**inputs, backend=backend)
    truth = patch_embed(**doubled(inputs), backend="reference")
    for column in range(12):
        assert_within(out[..., column], truth[..., column], 1e-6, what=f"patch_embed {backend} sizes of weights")


def test_equals_the_module_of_the_reference() -> None:
    conv, norm = nn.Conv2d(3, 24, 16, 16, bias=False), nn.LayerNorm(24)
    embedding, positions, frames = torch.randn(24), torch.randn(5, 24), torch.randn(2, 3, 32, 32)
    expected = embed_patches(frames, conv, embedding, positions, norm)
    found = patch_embed(frames, conv.weight, embedding, positions, norm_weight=norm.weight, norm_bias=norm.bias)
    assert torch.allclose(found, expected, atol=2e-6)
    assert isinstance(reference.PatchEmbed(24, 16, 32)(frames), Tensor)


@pytest.mark.parametrize("extension", [False, pytest.param(True, marks=needs_extension)])
@pytest.mark.parametrize("kind", ["last", "first", "float"])
@pytest.mark.slow
def test_registered_op(kind: str, extension: bool) -> None:
    statistics = [[0.4, 0.5, 0.6], [0.2, 0.3, 0.4]] if kind != "float" else [[], []]
    for shape, norm in (((2, 48, 48, 4, 9), True), ((1, 6, 4, 2, 5), False)):
        inputs = list(arguments(shape, torch.float32, kind=kind, norm=norm).values())
        leaves = [x.detach().requires_grad_() if x.is_floating_point() else x for x in inputs]
        leaves += [] if norm else [None, None]
        tail = 1e-5, *statistics, torch.float32, norm and kind == "last", extension
        torch.library.opcheck(torch.ops.xclip_fast.patch_embed, (*leaves, *tail))
    torch.library.opcheck(torch.ops.xclip_fast.patch_rows, (inputs[0], 2, *statistics, torch.float16))


@pytest.mark.parametrize("extension", [False, pytest.param(True, marks=needs_extension)])
@pytest.mark.parametrize("kind", ["last", "float"])
def test_exact_gradients(kind: str, extension: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    inputs = [x.cpu() for x in arguments((2, 4, 6, 2, 5), torch.float64, kind=kind).values()]
    leaves = [x.requires_grad_() if x.is_floating_point() else x for x in inputs]
    statistics = [[0.4, 0.5, 0.6], [0.2, 0.3, 0.4]] if kind != "float" else [[], []]
    for save in (True, False):
        function = lambda *tensors, save=save: torch.ops.xclip_fast.patch_embed(  # noqa: E731
            *tensors, 0.3, *statistics, torch.float64, save, extension
        )[0]
        assert torch.autograd.gradcheck(function, leaves)


@needs_extension
@pytest.mark.parametrize("pieces", [2, 3])
def test_weights_packed_in_bytes_are_within_half_a_step(pieces: int) -> None:
    weight, scale = torch.randn(9, 3, 4, 4), torch.tensor([0.5, 1.0, 2.0], dtype=torch.float64)
    factors = torch.stack([scale, torch.zeros(3, dtype=torch.float64)])
    packed, unit, _ = torch.ops.xclip_fast_native.pack_weights(weight, factors, pieces)
    digits = packed.double().view(pieces, 9, 48)
    whole = sum(digits[piece] * 256.0 ** (pieces - 1 - piece) for piece in range(pieces))
    exact = (weight.double() * scale.view(3, 1, 1)).flatten(1) / unit.double()[:, None]
    # of three pieces float32 itself errs by another half
    assert (whole - exact).abs().max() <= (0.501 if pieces == 2 else 1.01)
    assert (whole - exact).abs().mean() <= 0.3


def test_exact_gradients_of_positions_in_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    frames, weight = torch.zeros(50, 4, 4, 3, dtype=torch.uint8), torch.ones(6, 3, 2, 2, dtype=torch.bfloat16)
    embedding, positions = torch.zeros(6, requires_grad=True), torch.zeros(5, 6, requires_grad=True)
    statistics = [[0.4, 0.5, 0.6], [0.2, 0.3, 0.4]]
    inputs = frames, weight, embedding, positions, None, None, 1e-5, *statistics, torch.bfloat16, False, False
    tokens, _ = torch.ops.xclip_fast.patch_embed(*inputs)
    upstream = torch.randn(tokens.shape).bfloat16()
    found = torch.autograd.grad(tokens, [embedding, positions], upstream)
    truth = upstream.float().sum(0)
    torch.testing.assert_close(found, (truth[0], truth), rtol=1e-5, atol=1e-5)


@backends
@pytest.mark.parametrize("kind", ["last", "float"])
def test_compiles_whole(kind: str, backend: str) -> None:
    inputs = arguments((2, 32, 32, 8, 12), torch.float32, kind=kind)
    leaves = [x.requires_grad_() for x in inputs.values() if x.is_floating_point()]
    function = torch.compile(lambda **x: patch_embed(**x, backend=backend), fullgraph=True, backend="aot_eager")
    found, expected = function(**inputs), patch_embed(**inputs, backend=backend)
    assert torch.allclose(found, expected, atol=1e-6)
    upstream = torch.randn_like(expected)
    for grad, exact in zip(
        torch.autograd.grad(found, leaves, upstream), torch.autograd.grad(expected, leaves, upstream), strict=True
    ):
        assert torch.allclose(grad, exact, atol=1e-4)
    with torch.inference_mode():
        assert torch.allclose(function(**inputs), expected, atol=1e-6)


@backends
def test_autocast_is_that_of_a_product(backend: str) -> None:
    inputs = arguments((4, 48, 48, 8, 12), torch.float32)
    leaf = inputs["weight"].requires_grad_()
    with torch.autocast(DEVICE, torch.bfloat16):
        found = patch_embed(**inputs, backend=backend)
        kept = patch_embed(**inputs, dtype=torch.float32, backend=backend)
    assert (found.dtype, kept.dtype) == (torch.bfloat16, torch.float32)
    expected = patch_embed(**inputs | {"weight": leaf.bfloat16()}, backend=backend)
    assert torch.equal(found, expected)
    (grad,) = torch.autograd.grad(found.float().sum(), [leaf])
    assert grad.dtype == torch.float32


@needs_extension
def test_repeats_and_threads_are_bit_equal() -> None:
    inputs = arguments((6, 48, 48, 8, 12), torch.float32)
    leaves = [x.requires_grad_() for x in inputs.values() if x.is_floating_point()]
    before, runs = torch.get_num_threads(), []
    for threads in (1, 1, 2):
        torch.set_num_threads(threads)
        out = patch_embed(**inputs, backend="extension")
        runs.append([out, *torch.autograd.grad(out.square().sum(), leaves)])
    torch.set_num_threads(before)
    assert all(torch.equal(a, b) for a, b in zip(runs[0], runs[1], strict=True))
    assert torch.equal(runs[0][0], runs[2][0])


@needs_extension
def test_weights_changed_in_place_are_seen() -> None:
    inputs = arguments((6, 48, 48, 8, 12), torch.float32)
    before = patch_embed(**inputs, backend="extension")
    inputs["weight"].data.mul_(2)
    assert_within(
        patch_embed(**inputs, backend="extension"),
        patch_embed(**inputs, backend="torch"),
        1e-5,
        what="patch_embed again",
    )
    assert not torch.allclose(before, patch_embed(**inputs, backend="extension"))


def test_no_gradient_can_be_asked_of_bytes() -> None:
    inputs = arguments((1, 16, 16, 8, 10), torch.float32)
    with pytest.raises(RuntimeError, match="floating point"):
        inputs["frames"].requires_grad_()
    out = patch_embed(**inputs | {"weight": inputs["weight"].requires_grad_()})
    with pytest.raises(RuntimeError):
        torch.autograd.grad(out.sum(), [inputs["frames"]])


def test_products_are_counted() -> None:
    from torch.utils.flop_counter import FlopCounterMode

    inputs = arguments((2, 32, 48, 16, 10), torch.float32)
    with FlopCounterMode(display=False) as counter:
        tensors = [*inputs.values(), 1e-5, [0.5] * 3, [0.5] * 3, torch.float32, False, False]
        torch.ops.xclip_fast.patch_embed(*tensors)
    assert counter.get_total_flops() == 2 * 12 * 768 * 10
