"""Cross-frame attention: parity for any clip length, ragged clips without leaks, layouts, bad numbers, registration."""

from __future__ import annotations

import itertools

import pytest
import torch
from harness import DEVICE, ON_GPU, check_op, each_tile, kernel_dtypes, layouts, random
from pointer_check import Launches
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from xclip_fast.kernels.message_attention import message_attention_fwd, message_key_value_fwd
from xclip_fast.ops import explain, message_attention, message_key_value
from xclip_fast.ops.message_attention import key_value_launches
from xclip_fast.ops.message_attention import launches as expected_launches

# the chain of five products and a norm errs more than one of them
CEILING = 1e-2
# clips, frames, heads, head dimension
SIZES = [
    (2, 5, 3, 64),
    (1, 40, 1, 64),
    (2, 70, 1, 64),
    (2, 9, 1, 128),
    (1, 20, 1, 128),
    (1, 66, 1, 128),
    (4, 1, 5, 32),
    (3, 7, 2, 32),
    (3, 33, 1, 32),
    (17, 3, 1, 32),
    (33, 4, 1, 32),
    (2, 65, 1, 32),
]
RAGGED = {
    "one tile": [0, 3, 10, 11, 27],
    "one frame each": [0, 1, 2, 3],
    "one clip": [0, 40],
    "empty clips": [0, 0, 5, 5, 5, 9, 9],
    "longer than a tile": [0, 2, 68, 69],
    "more clips than share a launch": [*range(18)],
}


def arguments(
    *frames: int, heads: int = 1, head_dim: int = 32, dtype: torch.dtype = torch.float32, mean: float = 0.0
) -> dict[str, object]:
    width = heads * head_dim
    return {
        "class_tokens": random(*frames, width, dtype=dtype, mean=mean),
        "fc_weight": random(width, width, dtype=dtype, scale=width**-0.5),
        "fc_bias": random(width, dtype=dtype, mean=mean),
        "norm_weight": random(width, dtype=dtype, mean=1.0, scale=0.3),
        "norm_bias": random(width, dtype=dtype),
        "in_proj_weight": random(3 * width, width, dtype=dtype, scale=width**-0.5),
        "in_proj_bias": random(3 * width, dtype=dtype),
        "out_weight": random(width, width, dtype=dtype, scale=width**-0.5),
        "out_bias": random(width, dtype=dtype),
        "heads": heads,
    }


def key_value_arguments(*shape: int, dtype: torch.dtype = torch.float32, mean: float = 0.0) -> dict[str, object]:
    width = shape[-1]
    return {
        "messages": random(*shape, dtype=dtype, mean=mean),
        "norm_weight": random(width, dtype=dtype, mean=1.0, scale=0.3),
        "norm_bias": random(width, dtype=dtype),
        "weight": random(2 * width, width, dtype=dtype, scale=width**-0.5),
        "bias": random(2 * width, dtype=dtype),
    }


def boundaries(*frames: int) -> Tensor:
    return torch.tensor(frames, dtype=torch.int32, device=DEVICE)


def tensors_of(inputs: dict[str, object]) -> list[Tensor]:
    return [x.requires_grad_() for x in inputs.values() if isinstance(x, Tensor) and x.is_floating_point()]


@pytest.mark.parametrize(("frames", "dtype"), each_tile([1, 2, 7, 8, 16, 31, 32, 33, 64, 65, 200]), ids=str)
def test_parity(frames: int, dtype: torch.dtype) -> None:
    heads = 1 if frames > 64 else 2
    check_op(message_attention, arguments(1, frames, heads=heads, dtype=dtype), what="cfa", ceiling=CEILING)


@pytest.mark.parametrize(("size", "dtype"), each_tile(SIZES), ids=str)
def test_parity_of_sizes(size: tuple[int, int, int, int], dtype: torch.dtype) -> None:
    clips, frames, heads, head_dim = size
    inputs = arguments(clips, frames, heads=heads, head_dim=head_dim, dtype=dtype)
    check_op(message_attention, inputs, what="cfa sizes", ceiling=CEILING)


@pytest.mark.slow
def test_production_width() -> None:
    inputs = arguments(1, 8, heads=12, head_dim=64, dtype=torch.float16)
    check_op(message_attention, inputs, what="cfa production", ceiling=CEILING, gradients=False)


@pytest.mark.slow
def test_clip_of_1024_frames() -> None:
    inputs = arguments(1, 1024, dtype=torch.float16)
    check_op(message_attention, inputs, what="cfa 1024", ceiling=CEILING, gradients=False)


@kernel_dtypes
@pytest.mark.parametrize("mean", [3.0, 100.0])
def test_mean_far_from_zero(mean: float, dtype: torch.dtype) -> None:
    inputs = arguments(2, 5, heads=2, dtype=dtype, mean=mean)
    check_op(message_attention, inputs, what="cfa far mean", ceiling=1.0)
    check_op(
        message_key_value,
        key_value_arguments(6, 40, dtype=dtype, mean=mean),
        what="kv far mean",
        ceiling=1.0,
        distance=mean,
    )


@pytest.mark.parametrize(("bounds", "dtype"), each_tile(RAGGED.values()), ids=str)
def test_ragged_parity(bounds: list[int], dtype: torch.dtype) -> None:
    # an odd number of padding frames, or none
    inputs = arguments(bounds[-1] + bounds[-1] % 2 * 3, heads=2, dtype=dtype)
    inputs["cu_frames"] = boundaries(*bounds)
    check_op(message_attention, inputs, what="cfa ragged", ceiling=CEILING)


@pytest.mark.parametrize("backend", ["torch", "triton"])
@pytest.mark.parametrize("bounds", RAGGED.values(), ids=RAGGED)
def test_ragged_clips_equal_the_loop(bounds: list[int], backend: str) -> None:
    inputs = arguments(bounds[-1], heads=2)
    tokens = inputs.pop("class_tokens")
    together = message_attention(tokens, **inputs, cu_frames=boundaries(*bounds), backend=backend)
    for first, last in [*itertools.pairwise(bounds)][-4:]:
        alone = message_attention(tokens[None, first:last], **inputs, backend=backend)[0]
        assert torch.allclose(together[first:last], alone, atol=1e-5)


@pytest.mark.parametrize("backend", ["torch", "triton"])
@pytest.mark.parametrize(
    ("bounds", "value"),
    [
        ([0, 3, 3, 10, 17], 7.0),
        ([0, 3, 3, 10, 17], float("nan")),
        ([0, 3, 3, 10, 17], float("inf")),
        ([0, 4, 58, 70], float("nan")),
    ],
    ids=str,
)
def test_clips_do_not_leak(bounds: list[int], value: float, backend: str) -> None:
    inputs = arguments(bounds[-1] + 4)
    tokens = inputs["class_tokens"].requires_grad_()
    first, last = bounds[-3], bounds[-2]
    changed = tokens.detach().clone()
    changed[first:last] = value
    changed[bounds[-1] :] = value
    changed.requires_grad_()
    cu_frames = boundaries(*bounds)
    kept = [*range(first), *range(last, bounds[-1])]
    before, after = (
        message_attention(**(inputs | {"class_tokens": x}), cu_frames=cu_frames, backend=backend)[kept]
        for x in (tokens, changed)
    )
    assert torch.equal(before, after)
    grads = [torch.autograd.grad(y.sum(), x)[0][kept] for y, x in ((before, tokens), (after, changed))]
    assert torch.equal(*grads)


@pytest.mark.parametrize("backend", ["reference", "torch", "triton"])
def test_padding_frames_attend_to_nothing(backend: str) -> None:
    inputs = arguments(12)
    messages = message_attention(**inputs, cu_frames=boundaries(0, 4, 9), backend=backend)
    alone = torch.nn.functional.linear(inputs["class_tokens"], inputs["fc_weight"], inputs["fc_bias"])
    assert torch.allclose(messages[9:], (alone + inputs["out_bias"])[9:], atol=1e-5)
    everything = message_attention(**inputs, cu_frames=boundaries(0), backend=backend)
    assert torch.allclose(everything, alone + inputs["out_bias"], atol=1e-5)


@pytest.mark.parametrize("longest", [9, 70])
@pytest.mark.parametrize("bounds", [[5, 3], [-7, 2**30], [0, 2000, 4], [60, 2000], [-(2**31), 2**31 - 1, 50]], ids=str)
def test_wrong_boundaries_on_the_device_stay_inside(bounds: list[int], longest: int) -> None:
    # the public function refuses these on the CPU; on a GPU it cannot see them, and the pointer check watches here
    tensors = [x.detach() for x in tensors_of(arguments(70))]
    found = torch.ops.xclip_fast.message_attention(*tensors, boundaries(*bounds), 1, longest, 1e-5)
    assert found.shape == (70, 32)


@pytest.mark.parametrize(("frames", "longest"), [(9, 5), (100, 70)])
def test_of_a_clip_longer_than_its_bound_the_first_frames_attend(frames: int, longest: int) -> None:
    inputs = arguments(frames)
    tensors = [x.detach() for x in tensors_of(inputs)]
    found = torch.ops.xclip_fast.message_attention(*tensors, boundaries(0, frames), 1, longest, 1e-5)
    alone = message_attention(**inputs, cu_frames=boundaries(0, longest), backend="triton")
    assert torch.allclose(found, alone, atol=1e-5)


def test_longest_given_splits_nothing_else() -> None:
    inputs = arguments(70)
    cu_frames = boundaries(0, 20, 40, 70)
    found, bounded = (
        message_attention(**inputs, cu_frames=cu_frames, max_frames=most, backend="triton") for most in (None, 60)
    )
    assert torch.allclose(found, bounded, atol=1e-6)


@pytest.mark.parametrize("layout", ["offset", "padded", "strided", "transposed"])
@pytest.mark.parametrize("name", ["class_tokens", "fc_weight", "in_proj_weight", "norm_weight", "out_bias"])
def test_layouts(name: str, layout: str) -> None:
    inputs = arguments(2, 5, heads=2)
    inputs[name] = layouts(inputs[name])[layout]
    check_op(message_attention, inputs, what="cfa layouts", ceiling=CEILING)


@kernel_dtypes
def test_class_tokens_as_a_view(dtype: torch.dtype) -> None:
    tokens = random(2, 4, 7, 64, dtype=dtype)
    inputs = arguments(2, 4, heads=2, dtype=dtype)
    inputs["class_tokens"] = tokens[:, :, 0]
    check_op(message_attention, inputs, what="cfa class tokens", ceiling=CEILING)


@pytest.mark.parametrize("shape", [(0, 3), (2, 0), (0, 0)])
@pytest.mark.parametrize("backend", ["reference", "torch", "triton"])
def test_empty(shape: tuple[int, int], backend: str) -> None:
    inputs = arguments(*shape)
    leaves = tensors_of(inputs)
    messages = message_attention(**inputs, backend=backend)
    assert messages.shape == (*shape, 32)
    assert all(not grad.any() for grad in torch.autograd.grad(messages.sum(), leaves, materialize_grads=True))


@pytest.mark.parametrize("bounds", [[0], [0, 0], [0, 0, 0]])
@pytest.mark.parametrize("backend", ["reference", "torch", "triton"])
def test_empty_ragged(bounds: list[int], backend: str) -> None:
    inputs = arguments(0)
    leaves = tensors_of(inputs)
    messages = message_attention(**inputs, cu_frames=boundaries(*bounds), backend=backend)
    assert messages.shape == (0, 32)
    assert all(not grad.any() for grad in torch.autograd.grad(messages.sum(), leaves, materialize_grads=True))


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("frames", [5, 70])
def test_bad_numbers_stay_in_their_clip(frames: int, bad: float) -> None:
    inputs = arguments(3, frames)
    inputs["class_tokens"][1, 2, 3] = bad
    messages = message_attention(**inputs, backend="triton")
    assert messages[1].isnan().all()
    assert messages[[0, 2]].isfinite().all()


def test_zero_eps_with_padded_frames() -> None:
    # the padding of a tile has no variance at all: its NaN must not enter the sums
    found, truth = (message_attention(**arguments(1, 5), eps=0.0, backend=b) for b in ("triton", "reference"))
    assert found.isfinite().all()
    assert truth.isfinite().all()


def test_repeats_are_bit_equal() -> None:
    inputs = arguments(3, 10)
    leaves = tensors_of(inputs)
    runs = [torch.autograd.grad(message_attention(**inputs, backend="triton").sum(), leaves) for _ in range(3)]
    assert all(torch.equal(a, b) for other in runs[1:] for a, b in zip(runs[0], other, strict=True))


def test_backward_keeps_inputs_alone() -> None:
    inputs = arguments(2, 6, heads=2)
    given = {x.data_ptr() for x in tensors_of(inputs)}
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x) or x, lambda x: x):
        message_attention(**inputs, backend="triton")
    assert kept
    assert {x.data_ptr() for x in kept} <= given


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("bounds", [None, [0, 3, 3, 9]], ids=["whole", "ragged"])
def test_torch_formulation(bounds: list[int] | None, dtype: torch.dtype) -> None:
    inputs = arguments(*((2, 5) if bounds is None else (10,)), heads=4, head_dim=10, dtype=dtype)
    if bounds is not None:
        inputs["cu_frames"] = boundaries(*bounds)
    check_op(message_attention, inputs, what="cfa torch", backend="torch", ceiling=CEILING)


@pytest.mark.parametrize(
    ("shape", "dtype"),
    each_tile([(1, 1), (5, 33), (16, 64), (2, 3, 48), (17, 129), (64, 40), (129, 24), (3, 300)]),
    ids=str,
)
def test_key_value_parity(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    ceiling = 1.0 if shape[-1] < 4 else CEILING
    check_op(message_key_value, key_value_arguments(*shape, dtype=dtype), what="message kv", ceiling=ceiling)


@pytest.mark.parametrize("layout", ["offset", "padded", "strided", "transposed"])
@pytest.mark.parametrize("name", ["messages", "weight", "norm_bias"])
def test_key_value_layouts(name: str, layout: str) -> None:
    inputs = key_value_arguments(2, 5, 40)
    inputs[name] = layouts(inputs[name])[layout]
    check_op(message_key_value, inputs, what="message kv layouts", ceiling=CEILING)


@pytest.mark.parametrize("shape", [(0, 16), (3, 0, 16)])
@pytest.mark.parametrize("backend", ["reference", "torch", "triton"])
def test_key_value_empty(shape: tuple[int, ...], backend: str) -> None:
    inputs = key_value_arguments(*shape)
    leaves = tensors_of(inputs)
    packed = message_key_value(**inputs, backend=backend)
    assert packed.shape == (*shape[:-1], 32)
    assert all(not grad.any() for grad in torch.autograd.grad(packed.sum(), leaves))


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_key_value_of_bad_numbers(backend: str) -> None:
    inputs = key_value_arguments(4, 20)
    inputs["messages"][2, 5] = float("nan")
    packed = message_key_value(**inputs, backend=backend)
    assert packed[2].isnan().all()
    assert packed[[0, 1, 3]].isfinite().all()


def test_norm_in_float32_under_half_precision() -> None:
    inputs = arguments(2, 5, heads=2, dtype=torch.float16)
    for name in ("norm_weight", "norm_bias"):
        inputs[name] = inputs[name].float()
    check_op(message_attention, inputs, what="cfa float32 norm", ceiling=CEILING)


@pytest.mark.parametrize("bounds", [None, [0, 2, 2, 6], [0]], ids=["whole", "ragged", "padding"])
def test_registered_op(bounds: list[int] | None) -> None:
    inputs = arguments(*((2, 3) if bounds is None else (7,)), heads=2)
    clips = (None, 2, 3) if bounds is None else (boundaries(*bounds), 2, 7)
    torch.library.opcheck(torch.ops.xclip_fast.message_attention, (*tensors_of(inputs), *clips, 1e-5))


@pytest.mark.parametrize("shape", [(4, 24), (2, 3, 24), (0, 24)], ids=str)
def test_registered_key_value(shape: tuple[int, ...]) -> None:
    inputs = tensors_of(key_value_arguments(*shape))
    torch.library.opcheck(torch.ops.xclip_fast.message_key_value, (*inputs, 1e-5))


@pytest.mark.parametrize("bounds", [None, [0, 2, 2, 5]], ids=["whole", "ragged"])
def test_registered_ops_without_kernels_have_exact_gradients(
    bounds: list[int] | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    inputs = arguments(*((2, 3) if bounds is None else (6,)), heads=2, head_dim=3, dtype=torch.float64)
    clips = (None, 2, 3) if bounds is None else (torch.tensor(bounds, dtype=torch.int32), 2, 4)
    tensors = [x.detach().cpu().requires_grad_() for x in tensors_of(inputs)]
    assert torch.autograd.gradcheck(
        lambda *args: torch.ops.xclip_fast.message_attention(*args, *clips, 0.3), tensors, fast_mode=True
    )
    packed = [x.detach().cpu().requires_grad_() for x in tensors_of(key_value_arguments(3, 4, dtype=torch.float64))]
    assert torch.autograd.gradcheck(lambda *args: torch.ops.xclip_fast.message_key_value(*args, 0.3), packed)


@pytest.mark.parametrize("backend", ["torch", "triton"])
@pytest.mark.parametrize("bounds", [None, [0, 4, 6]], ids=["whole", "ragged"])
def test_compiles_whole(bounds: list[int] | None, backend: str) -> None:
    inputs = arguments(*((2, 3) if bounds is None else (6,)), heads=2)
    cu_frames = None if bounds is None else boundaries(*bounds)
    kv = key_value_arguments(2, 64)

    def both(tokens: Tensor) -> Tensor:
        messages = message_attention(**(inputs | {"class_tokens": tokens}), cu_frames=cu_frames, backend=backend)
        return message_key_value(**(kv | {"messages": messages}), backend=backend)

    compiled = torch.compile(both, fullgraph=True, backend="aot_eager")
    tokens = inputs["class_tokens"].requires_grad_()
    eager = both(tokens)
    found = compiled(tokens)
    assert torch.allclose(found, eager, atol=1e-5)
    assert torch.allclose(*(torch.autograd.grad(y.sum(), tokens)[0] for y in (found, eager)), atol=1e-4)
    with torch.inference_mode():
        assert torch.allclose(compiled(tokens), eager, atol=1e-5)


def test_autocast_as_modules() -> None:
    inputs = {name: x.cpu() if isinstance(x, Tensor) else x for name, x in arguments(2, 3, heads=2).items()}
    kv = {name: x.cpu() for name, x in key_value_arguments(3, 64).items()}
    with torch.autocast("cpu", dtype=torch.bfloat16):
        messages = message_attention(**inputs, backend="torch")
        packed = message_key_value(**kv, backend="torch")
        linear = torch.nn.functional.linear(inputs["class_tokens"], inputs["fc_weight"], inputs["fc_bias"])
    assert messages.dtype == packed.dtype == linear.dtype == torch.bfloat16
    exact = message_attention(**inputs, backend="reference")
    assert torch.allclose(messages.float(), exact, atol=0.1, rtol=0.1)
    assert not torch.equal(messages.float(), exact)


class PyTorchKernels(TorchDispatchMode):
    """Counts what PyTorch itself would launch: no views, no allocations, and not the copies the interpreter makes."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        if not func.is_view and not any(part in func.name() for part in ("empty", "set_", "copy_")):
            self.names.append(func.name())
        return func(*args, **(kwargs or {}))


@pytest.mark.skipif(ON_GPU, reason="the interpreter's pointer check counts the launches")
@pytest.mark.parametrize(
    ("clips", "frames", "ragged", "expected"),
    [
        (1, 8, False, 3),
        (2, 60, False, 3),
        (3, 64, False, 4),
        (1, 65, False, 4),
        (1, 130, False, 6),
        (33, 4, False, 6),
        (2, 6, True, 4),
        (2, 60, True, 5),
        (0, 5, True, 3),
        (0, 5, False, 0),
    ],
)
def test_launches_are_known_and_class_tokens_not_copied(
    clips: int, frames: int, ragged: bool, expected: int, launches: Launches
) -> None:
    rows = max(clips, ragged) * frames
    longest = rows if ragged else frames
    shape = (rows,) if ragged else (clips, frames)
    class_tokens, *parameters = (x.detach() for x in tensors_of(arguments(*shape, 3, dtype=torch.float16)))
    cu_frames = boundaries(*range(0, clips * frames + 1, frames)) if ragged else None
    call = (class_tokens[..., 0, :], *parameters, cu_frames, 1, longest, 1e-5)
    with PyTorchKernels() as torch_kernels:
        messages = message_attention_fwd(*call)
    on_meta = (x.to("meta") if isinstance(x, Tensor) else x for x in call)
    assert len(launches.names) + len(torch_kernels.names) == expected_launches(*on_meta) == expected
    call = (messages, *parameters[2:4], parameters[4][32:], parameters[5][32:], 1e-5)
    with torch_kernels:
        message_key_value_fwd(*call)
    assert len(launches.names) + len(torch_kernels.names) == expected + key_value_launches(*call)


def test_flops_are_counted_on_meta_tensors() -> None:
    inputs = {name: x.to("meta") if isinstance(x, Tensor) else x for name, x in arguments(2, 8, heads=2).items()}
    kv = {name: x.to("meta") for name, x in key_value_arguments(2, 8, 64).items()}
    with FlopCounterMode(display=False) as fused:
        message_attention(**inputs, backend="triton")
        message_key_value(**kv, backend="triton")
    with FlopCounterMode(display=False) as plain:
        message_attention(**inputs, backend="reference")
        message_key_value(**kv, backend="reference")
    assert fused.get_total_flops() == plain.get_total_flops() == 16 * (10 * 64**2 + 4 * 8 * 64 + 4 * 64**2)


def test_backward_flops_are_those_of_its_products() -> None:
    inputs = {name: x.to("meta") if isinstance(x, Tensor) else x for name, x in arguments(2, 8, heads=2).items()}
    tensors = [inputs[name] for name in ("class_tokens", *list(inputs)[1:8])]
    grad = torch.empty_like(tensors[0])
    with FlopCounterMode(display=False) as counted:
        torch.ops.xclip_fast.message_attention_backward(grad, *tensors, None, 2, 8, 1e-5)
    assert counted.get_total_flops() == 16 * (28 * 64**2 + 12 * 8 * 64)


def test_wrong_arguments_are_named() -> None:
    inputs = arguments(2, 5, heads=2)
    ragged = arguments(10)
    bad: list[tuple[str, dict[str, object]]] = [
        (r"class_tokens must be \(B, T, D\), or \(F, D\) with cu_frames, found \(10, 32\)", ragged),
        (r"fc_weight must have shape \(64, 64\) to fit class_tokens", inputs | {"fc_weight": inputs["fc_bias"]}),
        (r"out_bias must be torch.float32 like class_tokens", inputs | {"out_bias": inputs["out_bias"].half()}),
        ("heads must divide the width 64, found 3", inputs | {"heads": 3}),
        (r"max_frames \(4\) bounds ragged clips", inputs | {"max_frames": 4}),
        ("max_frames must be at least 1", ragged | {"cu_frames": boundaries(0, 4), "max_frames": 0}),
        (r"class_tokens must be \(F, D\) with cu_frames", inputs | {"cu_frames": boundaries(0, 4)}),
        ("cu_frames must be torch.int32", ragged | {"cu_frames": boundaries(0, 4).long()}),
        ("cu_frames must be torch.int32", ragged | {"cu_frames": boundaries()}),
        ("unknown backend 'cuda'", inputs | {"backend": "cuda"}),
    ]
    for message, call in bad:
        with pytest.raises(ValueError, match=message):
            message_attention(**call)
    kv = key_value_arguments(2, 8)
    with pytest.raises(ValueError, match=r"weight must have shape \(16, 8\) to fit messages, found \(8, 8\)"):
        message_key_value(**(kv | {"weight": kv["weight"][:8]}))
    with pytest.raises(ValueError, match="messages must be"):
        message_key_value(**(kv | {"messages": kv["messages"][0, 0]}))


@pytest.mark.parametrize("bounds", [[1, 4], [0, 5, 3], [0, 11], [0, -1]], ids=str)
def test_wrong_boundaries_are_refused_on_the_cpu(bounds: list[int]) -> None:
    inputs = {name: x.cpu() if isinstance(x, Tensor) else x for name, x in arguments(10).items()}
    with pytest.raises(ValueError, match=r"cu_frames must rise from 0 to at most 10 frames, found \["):
        message_attention(**inputs, cu_frames=torch.tensor(bounds, dtype=torch.int32))
    with pytest.raises(ValueError, match="max_frames is 3, but a clip has 4 frames"):
        message_attention(**inputs, cu_frames=torch.tensor([0, 4], dtype=torch.int32), max_frames=3)


def test_explains_what_the_kernels_cannot_take() -> None:
    inputs = arguments(2, 5, heads=2)
    heads = inputs.pop("heads")
    tensors = list(inputs.values())
    assert explain("message_attention", *tensors, heads)["triton"] is None
    assert explain("message_attention", **inputs, heads=heads)["triton"] is None
    assert "heads hold 32, 64, 128 numbers, found 16" in explain("message_attention", *tensors, 4)["triton"]
    assert "float64" in explain("message_attention", *(x.double() for x in tensors), heads)["triton"]
    with pytest.raises(ValueError, match="found 16; use backend='torch'"):
        message_attention(*tensors, 4, backend="triton")
    wide = torch.zeros(1, 1, device=DEVICE).expand(18000, 9000)
    assert "9000" in explain("message_key_value", wide[:1], wide[0], wide[0], wide, wide[:, 0])["triton"]
