"""The block of the multiframe integration transformer: parity, ragged clips, layouts, launches, registration."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from harness import DEVICE, ON_GPU, check_op, each_tile, kernel_dtypes, layouts, random
from pointer_check import Launches
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from xclip_fast.kernels.skinny_linear import Norm, skinny_launches, skinny_linear
from xclip_fast.kernels.temporal_block import temporal_block_fwd
from xclip_fast.ops import explain, temporal_block
from xclip_fast.ops.temporal_block import launches as expected_launches
from xclip_fast.reference.transformer import Block

# the chain of seven products and two norms errs more than one of them
CEILING = 1e-2
# clips, frames, heads, head dimension, hidden width
SIZES = [
    (1, 1, 1, 32, 16),
    (1, 8, 1, 64, 256),
    (2, 3, 2, 32, 1),
    (2, 8, 3, 32, 33),
    (3, 7, 1, 32, 100),
    (1, 16, 2, 64, 128),
    (1, 17, 1, 128, 40),
    (1, 33, 1, 32, 64),
    (1, 65, 1, 32, 31),
    (17, 2, 1, 32, 65),
    (33, 4, 1, 32, 48),
    (2, 66, 1, 64, 20),
]
# clips, frames, heads
WHOLE = [
    (1, 1, 1),
    (1, 8, 2),
    (2, 8, 1),
    (5, 2, 1),
    (3, 4, 1),
    (1, 16, 1),
    (2, 32, 1),
    (2, 5, 2),
    (17, 2, 1),
    (2, 66, 1),
]


def arguments(
    *frames: int, heads: int = 1, head_dim: int = 32, hidden: int = 48, dtype: torch.dtype = torch.float32
) -> dict[str, object]:
    width = heads * head_dim
    return {
        "x": random(*frames, width, dtype=dtype),
        "norm1_weight": random(width, dtype=dtype, mean=1.0, scale=0.3),
        "norm1_bias": random(width, dtype=dtype),
        "in_proj_weight": random(3 * width, width, dtype=dtype, scale=width**-0.5),
        "in_proj_bias": random(3 * width, dtype=dtype),
        "out_weight": random(width, width, dtype=dtype, scale=width**-0.5),
        "out_bias": random(width, dtype=dtype),
        "norm2_weight": random(width, dtype=dtype, mean=1.0, scale=0.3),
        "norm2_bias": random(width, dtype=dtype),
        "fc_weight": random(hidden, width, dtype=dtype, scale=width**-0.5),
        "fc_bias": random(hidden, dtype=dtype),
        "proj_weight": random(width, hidden, dtype=dtype, scale=hidden**-0.5),
        "proj_bias": random(width, dtype=dtype),
        "heads": heads,
    }


def whole(*frames: int, **options: Any) -> dict[str, object]:
    """The arguments that make one block all of MIT."""
    inputs = arguments(*frames, **options)
    dtype = inputs["x"].dtype
    return inputs | {
        "positions": random(*inputs["x"].shape[1:], dtype=dtype),
        "pooled_with": random(*inputs["x"].shape, dtype=dtype),
    }


def boundaries(*frames: int) -> Tensor:
    return torch.tensor(frames, dtype=torch.int32, device=DEVICE)


def tensors_of(inputs: dict[str, object]) -> list[Tensor]:
    return [x.requires_grad_() for x in inputs.values() if isinstance(x, Tensor) and x.is_floating_point()]


@pytest.mark.parametrize(("size", "dtype"), each_tile(SIZES), ids=str)
def test_parity(size: tuple[int, int, int, int, int], dtype: torch.dtype) -> None:
    clips, frames, heads, head_dim, hidden = size
    inputs = arguments(clips, frames, heads=heads, head_dim=head_dim, hidden=hidden, dtype=dtype)
    check_op(temporal_block, inputs, what="temporal_block", ceiling=CEILING)


@pytest.mark.parametrize(("size", "dtype"), each_tile(WHOLE), ids=str)
def test_all_of_mit(size: tuple[int, int, int], dtype: torch.dtype) -> None:
    clips, frames, heads = size
    inputs = whole(clips, frames, heads=heads, dtype=dtype)
    check_op(temporal_block, inputs, what="temporal_block whole", ceiling=CEILING)
    for name in ("positions", "pooled_with"):
        part = {key: x for key, x in inputs.items() if key != name}
        check_op(temporal_block, part, what=f"temporal_block without {name}", ceiling=CEILING, gradients=False)


@pytest.mark.parametrize("layout", ["offset", "padded", "strided", "transposed"])
@pytest.mark.parametrize("name", ["positions", "pooled_with"])
def test_layouts_of_mit(name: str, layout: str) -> None:
    inputs = whole(2, 8)
    inputs[name] = layouts(inputs[name])[layout]
    check_op(temporal_block, inputs, what="temporal_block layouts", ceiling=CEILING)


@kernel_dtypes
@pytest.mark.parametrize("bounds", [[0, 3, 3, 10], [0, 1, 67]], ids=str)
def test_ragged_parity(bounds: list[int], dtype: torch.dtype) -> None:
    inputs = arguments(bounds[-1] + 2, dtype=dtype) | {"cu_frames": boundaries(*bounds)}
    check_op(temporal_block, inputs, what="temporal_block ragged", ceiling=CEILING)


@pytest.mark.parametrize("layout", ["offset", "padded", "strided", "transposed"])
@pytest.mark.parametrize("name", ["x", "in_proj_weight", "fc_weight", "norm2_bias"])
def test_layouts(name: str, layout: str) -> None:
    inputs = arguments(2, 5)
    inputs[name] = layouts(inputs[name])[layout]
    check_op(temporal_block, inputs, what="temporal_block layouts", ceiling=CEILING)


@pytest.mark.parametrize("backend", ["reference", "torch", "triton"])
def test_equals_the_module(backend: str) -> None:
    block = Block(64, 2).to(DEVICE)
    x = random(2, 5, 64, dtype=torch.float32)
    parameters = dict(block.named_parameters())
    order = ["ln_1", "attn.in_proj_", "attn.out_proj", "ln_2", "mlp.c_fc", "mlp.c_proj"]
    tensors = [
        parameters[f"{name}{'' if name.endswith('_') else '.'}{part}"] for name in order for part in ("weight", "bias")
    ]
    assert torch.allclose(temporal_block(x, *tensors, 2, backend=backend), block(x), atol=1e-5)


@pytest.mark.parametrize("shape", [(0, 3), (2, 0)])
@pytest.mark.parametrize("backend", ["reference", "torch", "triton"])
def test_empty(shape: tuple[int, int], backend: str) -> None:
    inputs = arguments(*shape)
    leaves = tensors_of(inputs)
    out = temporal_block(**inputs, backend=backend)
    assert out.shape == (*shape, 32)
    assert all(not grad.any() for grad in torch.autograd.grad(out.sum(), leaves))


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_bad_numbers_stay_in_their_clip(bad: float) -> None:
    inputs = arguments(3, 5)
    inputs["x"][1, 2, 3] = bad
    out = temporal_block(**inputs, backend="triton")
    assert not out[1].isfinite().all(-1).any()
    assert out[[0, 2]].isfinite().all()


def test_repeats_are_bit_equal_and_keep_inputs_alone() -> None:
    inputs = arguments(2, 5)
    leaves = tensors_of(inputs)
    given = {x.data_ptr() for x in leaves}
    kept: list[Tensor] = []
    runs = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x) or x, lambda x: x):
        for _ in range(3):
            runs.append(torch.autograd.grad(temporal_block(**inputs, backend="triton").sum(), leaves))
    assert all(torch.equal(a, b) for other in runs[1:] for a, b in zip(runs[0], other, strict=True))
    assert kept
    assert {x.data_ptr() for x in kept} <= given


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_torch_formulation(dtype: torch.dtype) -> None:
    inputs = arguments(4, 8, heads=2, head_dim=20, dtype=dtype)
    check_op(temporal_block, inputs, what="temporal_block torch", backend="torch", ceiling=CEILING)


@pytest.mark.parametrize("bounds", [None, [0, 2, 5]], ids=["whole", "ragged"])
def test_registered_op(bounds: list[int] | None) -> None:
    inputs = tensors_of(arguments(*((2, 3) if bounds is None else (6,))))
    clips = (None, None, None, 1, 3) if bounds is None else (None, None, boundaries(*bounds), 1, 6)
    torch.library.opcheck(torch.ops.xclip_fast.temporal_block, (*inputs, *clips, 1e-5))


@pytest.mark.parametrize("bounds", [None, [0, 2, 2, 5]], ids=["whole", "ragged"])
def test_registered_op_without_kernels_has_exact_gradients(
    bounds: list[int] | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    inputs = arguments(*((2, 3) if bounds is None else (6,)), heads=2, head_dim=3, hidden=5, dtype=torch.float64)
    clips = (None, 2, 3) if bounds is None else (None, None, torch.tensor(bounds, dtype=torch.int32), 2, 4)
    tensors = [x.detach().cpu().requires_grad_() for x in tensors_of(inputs)]
    if bounds is None:
        ends = random(3, 6, dtype=torch.float64), random(2, 3, 6, dtype=torch.float64)
        tensors += [x.cpu().requires_grad_() for x in ends]
    assert torch.autograd.gradcheck(
        lambda *args: torch.ops.xclip_fast.temporal_block(*args, *clips, 0.3), tensors, fast_mode=True
    )


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_compiles_whole(backend: str) -> None:
    inputs = arguments(2, 3)
    leaves = tensors_of(inputs)
    compiled = torch.compile(
        lambda x: temporal_block(**(inputs | {"x": x}), backend=backend), fullgraph=True, backend="aot_eager"
    )
    eager = temporal_block(**inputs, backend=backend)
    found = compiled(inputs["x"])
    assert torch.allclose(found, eager, atol=1e-5)
    grads = (torch.autograd.grad(y.sum(), leaves[0])[0] for y in (found, eager))
    assert torch.allclose(*grads, atol=1e-4)
    with torch.inference_mode():
        assert torch.allclose(compiled(inputs["x"]), eager, atol=1e-5)


def test_autocast_as_modules() -> None:
    inputs = {name: x.cpu() if isinstance(x, Tensor) else x for name, x in arguments(2, 3).items()}
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = temporal_block(**inputs, backend="torch")
    assert found.dtype == torch.bfloat16
    assert torch.allclose(found.float(), temporal_block(**inputs, backend="reference"), atol=0.1, rtol=0.1)


@pytest.mark.skipif(ON_GPU, reason="the interpreter's pointer check counts the launches")
@pytest.mark.parametrize(("clips", "frames", "expected"), [(1, 8, 4), (2, 64, 4), (1, 65, 5), (17, 2, 5)])
def test_launches_are_known(clips: int, frames: int, expected: int, launches: Launches) -> None:
    tensors = [x.detach() for x in tensors_of(arguments(clips, frames, dtype=torch.float16))]
    call = (*tensors, None, None, None, 1, frames, 1e-5)
    temporal_block_fwd(*call)
    assert len(launches.names) == expected_launches(*call) == expected


@pytest.mark.skipif(ON_GPU, reason="the interpreter's pointer check counts the launches")
@pytest.mark.parametrize(("clips", "frames", "outside"), [(1, 8, 0), (3, 16, 0), (1, 7, 2), (2, 32, 2), (17, 2, 1)])
def test_all_of_mit_takes_no_more_launches(clips: int, frames: int, outside: int, launches: Launches) -> None:
    inputs = whole(clips, frames, dtype=torch.float16)
    tensors = [x.detach() for x in tensors_of(inputs)]
    call = (*tensors, None, 1, frames, 1e-5)
    temporal_block_fwd(*call)
    # PyTorch's own sums and means are not counted here
    assert len(launches.names) == expected_launches(*call) - outside
    assert len(launches.names) == (4 if clips <= 16 else 5)


@pytest.mark.skipif(ON_GPU, reason="the interpreter's pointer check counts the launches")
@pytest.mark.parametrize(
    ("rows", "options", "expected"),
    [
        (128, {"norm": True, "residual": True, "quick_gelu": True}, 1),
        # the norm, PyTorch's product (not counted here) and its sum with the residual (nor is that)
        (129, {"norm": True, "residual": True}, 1),
        (129, {"norm": True, "residual": True, "quick_gelu": True}, 2),
        (129, {}, 0),
    ],
)
def test_linear_of_few_and_many_rows(rows: int, options: dict[str, bool], expected: int, launches: Launches) -> None:
    x, weight, bias = random(rows, 40, dtype=torch.float32), random(24, 40, dtype=torch.float32), torch.ones(24)
    norm = Norm(torch.full((40,), 2.0), torch.ones(40), 1e-5)
    residual = random(rows, 24, dtype=torch.float32)
    found = skinny_linear(
        x,
        weight,
        bias,
        norm=norm if options.get("norm") else None,
        residual=residual if options.get("residual") else None,
        quick_gelu=options.get("quick_gelu", False),
    )
    assert len(launches.names) == expected <= skinny_launches(rows, **options)
    y = torch.nn.functional.layer_norm(x, (40,), norm.weight, norm.bias) if options.get("norm") else x
    y = torch.nn.functional.linear(y, weight, bias)
    y = y * torch.sigmoid(1.702 * y) if options.get("quick_gelu") else y
    y = y + residual if options.get("residual") else y
    assert torch.allclose(found, y, atol=1e-4)


def test_flops_are_those_of_its_products() -> None:
    inputs = {name: x.to("meta") if isinstance(x, Tensor) else x for name, x in arguments(2, 8, heads=2).items()}
    with FlopCounterMode(display=False) as fused:
        temporal_block(**inputs, backend="triton")
    with FlopCounterMode(display=False) as plain:
        temporal_block(**inputs, backend="reference")
    expected = 16 * (8 * 64**2 + 4 * 64 * 48 + 4 * 8 * 64)
    assert fused.get_total_flops() == plain.get_total_flops() == expected
    with FlopCounterMode(display=False) as backward:
        tensors = [x for x in inputs.values() if isinstance(x, Tensor)]
        torch.ops.xclip_fast.temporal_block_backward(tensors[0], *tensors[:-1], None, 2, 8, 1e-5)
    assert backward.get_total_flops() == 16 * (30 * 64**2 + 10 * 64 * 48 + 16 * 8 * 64)


def test_wrong_arguments_are_named() -> None:
    inputs = arguments(2, 5, heads=2)
    bad: list[tuple[str, dict[str, object]]] = [
        (r"fc_bias must have shape \(48,\) to fit x, found \(\)", {"fc_bias": inputs["fc_bias"][0]}),
        (r"proj_weight must have shape \(64, 48\) to fit x", {"proj_weight": inputs["fc_weight"]}),
        (r"norm2_weight must be torch.float32 like x", {"norm2_weight": inputs["norm2_weight"].half()}),
        ("heads must divide the width 64, found 5", {"heads": 5}),
        (r"positions must be torch.float32 \(5, 64\) to fit x", {"positions": inputs["x"]}),
        (r"pooled_with must be torch.float32 \(2, 5, 64\) to fit x", {"pooled_with": inputs["x"].half()}),
    ]
    for message, changed in bad:
        with pytest.raises(ValueError, match=message):
            temporal_block(**(inputs | changed))
    assert explain("temporal_block", **inputs)["triton"] is None
    assert "found 16" in explain("temporal_block", **(inputs | {"heads": 4}))["triton"]
