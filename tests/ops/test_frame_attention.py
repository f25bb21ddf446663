"""Intra-frame attention: parity in every cut of the rows, layouts, bad numbers, registration, cost of the padding."""

from __future__ import annotations

import pytest
import torch
from harness import DEVICE, check_op, each_tile, kernel_dtypes, layouts, random
from numerics import EXACT, assert_within, poisoned_memory
from pointer_check import Launches
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from xclip_fast.kernels.frame_attention import (
    KEPT_TOKENS,
    cut,
    frame_attention_fwd,
    options,
    padded_work,
    streamed_tile,
)
from xclip_fast.kernels.frame_attention_bwd import key_gradient_tile, query_gradient_tile
from xclip_fast.ops import explain, frame_attention
from xclip_fast.reference.vision import FrameAttention, attend_within_frame
from xclip_fast.tuning import Tile, Tunable

TILES = [streamed_tile, query_gradient_tile, key_gradient_tile]
KEPT = Tile(64, 0)  # a program keeps all keys of a head

# frames, tokens, heads, head dimension: tokens around each border of a block or a tail; several frames or heads, since
# the gradient of one message holds too few numbers to compare the largest errors of two methods
SHAPES = [
    *[(2, tokens, 1, 32) for tokens in (2, 7, 14, 15, 16, 17, 31, 33, 47, 48, 49, 63, 65, 79, 81, 97, 113, 127)],
    *[(1, tokens, 2, 64) for tokens in (2, 15, 16, 30, 32, 50, 63, 64, 65, 66)],
    *[(1, tokens, 1, 64) for tokens in (96, 111, 128, 129, 145)],
    *[(1, tokens, 2, 128) for tokens in (3, 16, 33)],
    *[(1, tokens, 1, 128) for tokens in (64, 70)],
    (3, 5, 2, 32),
    (2, 17, 3, 32),
    (5, 3, 1, 64),
    (2, 50, 2, 64),
    (1, 10, 12, 64),
    (2, 20, 1, 128),
]
LARGE = [(2, 197, 1, 64), (1, 257, 2, 64), (1, 577, 1, 64)]


def arguments(
    shape: tuple[int, int, int, int], dtype: torch.dtype, *, mean: float = 0.0, scale: float = 1.0
) -> dict[str, object]:
    frames, tokens, heads, head_dim = shape
    return {
        "qkv": random(frames, tokens, 3 * heads * head_dim, dtype=dtype, mean=mean, scale=scale),
        "message_kv": random(frames, 2 * heads * head_dim, dtype=dtype, mean=mean, scale=scale),
        "heads": heads,
    }


def leaves(inputs: dict[str, object]) -> list[Tensor]:
    return [inputs[name].requires_grad_() for name in ("qkv", "message_kv")]


def run(inputs: dict[str, object], backend: str = "triton") -> list[Tensor]:
    """Output and gradients, the latter for an upstream gradient of ones, which has no strides."""
    tensors = leaves({name: x.detach() if isinstance(x, Tensor) else x for name, x in inputs.items()})
    out = frame_attention(*tensors, inputs["heads"], backend=backend)
    return [out.detach(), *torch.autograd.grad(out.sum(), tensors)]


@pytest.mark.parametrize(("shape", "dtype"), each_tile(SHAPES), ids=str)
def test_parity(shape: tuple[int, int, int, int], dtype: torch.dtype) -> None:
    check_op(frame_attention, arguments(shape, dtype), what="frame_attention")


@kernel_dtypes
@pytest.mark.parametrize("shape", LARGE, ids=str)
def test_parity_of_the_models(shape: tuple[int, int, int, int], dtype: torch.dtype) -> None:
    if DEVICE == "cpu" and dtype == torch.float32:
        pytest.skip("float32 is cut into many small tiles, too slow in the interpreter")
    check_op(frame_attention, arguments(shape, dtype), what="frame_attention models")


@kernel_dtypes
@pytest.mark.parametrize("head_dim", [32, 64, 128])
def test_one_token(head_dim: int, dtype: torch.dtype) -> None:
    check_op(frame_attention, arguments((3, 1, 2, head_dim), dtype), what="frame_attention one token")


@kernel_dtypes
@pytest.mark.parametrize("mean", [1.0, 3.0])
def test_mean_far_from_zero(mean: float, dtype: torch.dtype) -> None:
    # a common shift of the keys moves all scores alike; what is left of the differences has lost digits in every path
    inputs = arguments((2, 70, 1, 32), dtype, mean=mean, scale=0.5)
    check_op(frame_attention, inputs, what="frame_attention far mean", ceiling=2e-2)


@kernel_dtypes
@pytest.mark.parametrize("layout", ["offset", "padded", "strided", "transposed"])
@pytest.mark.parametrize("name", ["qkv", "message_kv"])
def test_layouts(name: str, layout: str, dtype: torch.dtype) -> None:
    inputs = arguments((2, 18, 2, 32), dtype)
    inputs[name] = layouts(inputs[name])[layout]
    check_op(frame_attention, inputs, what="frame_attention layouts")


@pytest.mark.parametrize("tokens", [18, 66])
def test_what_lies_between_the_rows_is_not_read(tokens: int) -> None:
    inputs = arguments((3, tokens, 1, 32), torch.float16)
    apart = dict(inputs)
    rows = torch.full((3, tokens + 64, 96 + 8), float("nan"), dtype=torch.float16, device=DEVICE)
    messages = torch.full((3, 5, 64), float("nan"), dtype=torch.float16, device=DEVICE)
    apart["qkv"] = rows[:, :tokens, :96].copy_(inputs["qkv"])
    apart["message_kv"] = messages[:, 2].copy_(inputs["message_kv"])
    with poisoned_memory():
        assert all(torch.equal(a, b) for a, b in zip(run(apart), run(inputs), strict=True))


def test_one_frame_seen_many_times() -> None:
    inputs = arguments((1, 18, 1, 32), torch.float16)
    seen = {"qkv": inputs["qkv"].expand(3, -1, -1), "message_kv": inputs["message_kv"].expand(3, -1), "heads": 1}
    out = frame_attention(**seen, backend="triton")
    assert torch.equal(out, frame_attention(**inputs, backend="triton").expand(3, -1, -1))


@pytest.mark.parametrize("far", ["frames", "rows", "messages"])
def test_strides_beyond_32_bits(far: str) -> None:
    inputs = arguments((3, 3, 1, 32), torch.float16)
    strides = {"frames": (2**30, 96, 1), "rows": (96, 2**30, 1)}.get(far)
    apart = dict(inputs)
    if strides is None:
        apart["message_kv"] = torch.empty(2**31 + 64, dtype=torch.float16, device=DEVICE).as_strided(
            (3, 64), (2**30, 1)
        )
        apart["message_kv"].copy_(inputs["message_kv"])
    else:
        apart["qkv"] = torch.empty(2**31 + 600, dtype=torch.float16, device=DEVICE).as_strided((3, 3, 96), strides)
        apart["qkv"].copy_(inputs["qkv"])
    assert all(torch.equal(a, b) for a, b in zip(run(apart), run(inputs), strict=True))


@pytest.mark.parametrize("layout", ["expanded", "apart", "transposed"])
def test_layout_of_the_upstream_gradient(layout: str) -> None:
    qkv, message_kv = leaves(arguments((2, 18, 1, 32), torch.float16))
    out = frame_attention(qkv, message_kv, 1, backend="triton")
    upstream = random(2, 40, 64, dtype=torch.float16)[:, 3:21, 16:48]
    if layout == "expanded":
        upstream = upstream[:, :1].expand(-1, 18, -1)
    elif layout == "transposed":
        upstream = upstream.transpose(0, 2).contiguous().transpose(0, 2)
    found = torch.autograd.grad(out, [qkv, message_kv], upstream, retain_graph=True)
    expected = torch.autograd.grad(out, [qkv, message_kv], upstream.contiguous())
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


@pytest.mark.parametrize("backend", ["reference", "torch", "triton"])
def test_no_frames(backend: str) -> None:
    out, grad_qkv, grad_message_kv = run(arguments((0, 5, 2, 32), torch.float32), backend)
    assert out.shape == (0, 5, 64)
    assert grad_qkv.shape == (0, 5, 192)
    assert grad_message_kv.shape == (0, 128)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize(
    ("name", "index"),
    [
        ("qkv", (1, 3, 5)),  # a query of the body
        ("qkv", (1, 65, 5)),  # a query of the tail
        ("qkv", (1, 3, 40)),  # a key of the body
        ("qkv", (1, 65, 40)),  # a key of the tail
        ("qkv", (1, 3, 70)),  # a value of the body
        ("qkv", (1, 65, 70)),  # a value of the tail
        ("message_kv", (1, 5)),  # the message's key
        ("message_kv", (1, 40)),  # the message's value
    ],
)
def test_bad_numbers_as_in_torch(name: str, index: tuple[int, ...], bad: float) -> None:
    inputs = arguments((3, 66, 1, 32), torch.float16)
    inputs[name][index] = bad
    exact = {name: x.float() if isinstance(x, Tensor) else x for name, x in inputs.items()}
    for found, expected in zip(run(inputs), run(exact, "reference"), strict=True):
        assert torch.equal(found.isfinite(), expected.isfinite())
        assert found[0].isfinite().all()
        assert found[2].isfinite().all()


def test_a_tail_of_scores_of_minus_infinity() -> None:
    inputs = arguments((1, 65, 1, 32), torch.float16)
    # the tail is seen first, and holds the last row and the message
    inputs["qkv"][..., 0] = 1.0
    inputs["qkv"][0, 64, 32] = inputs["message_kv"][0, 0] = float("-inf")
    out, *grads = run(inputs)
    exact = {name: x.float() if isinstance(x, Tensor) else x for name, x in inputs.items()}
    expected, *expected_grads = run(exact, "reference")
    assert out.isfinite().all()
    assert_within(out, expected, 1e-3, what="frame_attention minus infinity")
    # the padding of the queries must not meet the infinite keys: their gradients are zero
    for found, truth in zip(grads, expected_grads, strict=True):
        assert torch.equal(found.isfinite(), truth.isfinite())
        assert torch.allclose(found.float().nan_to_num(), truth.nan_to_num(), atol=1e-2)


def test_rows_without_a_finite_score_are_nan_as_in_torch() -> None:
    inputs = arguments((1, 5, 1, 32), torch.float32)
    inputs["qkv"][0, 2, :32] = 0.0
    inputs["qkv"][0, 2, 0] = float("-inf")
    inputs["qkv"][..., 32] = inputs["message_kv"][..., 0] = 1.0
    found = frame_attention(**inputs, backend="triton")
    assert found[0, 2].isnan().all()
    assert found.isfinite().sum() == 4 * 32


def test_large_scores_do_not_overflow() -> None:
    inputs = arguments((1, 40, 1, 64), torch.float32)
    inputs["qkv"][..., :64] *= 1e3
    # the weights saturate: one is 1, the others vanish, and with them the gradients that could be compared
    check_op(frame_attention, inputs, what="frame_attention large scores", gradients=False, ceiling=1e-4)
    assert all(grad.isfinite().all() for grad in run(inputs))


@pytest.mark.parametrize("tokens", [18, 66])
def test_scores_far_below_zero(tokens: int) -> None:
    # the padding scores zero, above all keys: a weight of it would overflow
    inputs = arguments((2, tokens, 1, 32), torch.float32)
    inputs["qkv"][..., 0] = -40.0
    inputs["qkv"][..., 32] = inputs["message_kv"][..., 0] = 60.0
    # 32 additions round a score of 2400, whose step is 2^-12; over sqrt(32) they are errors of the weights' exponents:
    # 0.29 * sqrt(32) * 2^-12 / sqrt(32), which is 0.29 * 2^12 units
    check_op(frame_attention, inputs, what="frame_attention low scores", ceiling=1e-3, distance=2.0**12)


def test_repeats_are_bit_equal() -> None:
    inputs = arguments((2, 66, 1, 32), torch.float16)
    first, *rest = (run(inputs) for _ in range(3))
    assert all(torch.equal(a, b) for other in rest for a, b in zip(first, other, strict=True))


def test_a_frame_does_not_depend_on_its_neighbours() -> None:
    inputs = arguments((3, 18, 2, 32), torch.float16)
    alone = {"qkv": inputs["qkv"][1:2], "message_kv": inputs["message_kv"][1:2], "heads": 2}
    assert all(torch.equal(a[1:2], b) for a, b in zip(run(inputs), run(alone), strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("shape", [(3, 5, 2, 20), (1, 1, 1, 1), (2, 50, 12, 64), (1, 197, 2, 64)], ids=str)
def test_torch_formulation(shape: tuple[int, int, int, int], dtype: torch.dtype) -> None:
    check_op(frame_attention, arguments(shape, dtype), what="frame_attention torch", backend="torch")


@pytest.mark.parametrize("layout", ["offset", "padded", "strided", "transposed"])
@pytest.mark.parametrize("name", ["qkv", "message_kv"])
def test_torch_formulation_layouts(name: str, layout: str) -> None:
    inputs = arguments((2, 18, 2, 32), torch.float64)
    inputs[name] = layouts(inputs[name])[layout]
    check_op(frame_attention, inputs, what="frame_attention torch", backend="torch")


@pytest.mark.parametrize("backend", ["reference", "torch"])
def test_equals_the_attention_of_the_papers_block(backend: str) -> None:
    module = FrameAttention(24, 3).double()
    tokens, messages = torch.randn(2, 7, 24, dtype=torch.float64), torch.randn(2, 24, dtype=torch.float64)
    weight, bias = module.attn.in_proj_weight, module.attn.in_proj_bias
    qkv = torch.nn.functional.linear(module.ln_1(tokens), weight, bias)
    message_kv = torch.nn.functional.linear(module.ln_1(messages), weight[24:], bias[24:])
    found = tokens + module.attn.out_proj(frame_attention(qkv, message_kv, 3, backend=backend))
    expected = attend_within_frame(tokens[None], messages[None], module.ln_1, module.attn)[0]
    assert_within(found, expected, EXACT, what="frame_attention in its block")


def test_autocast_as_attention() -> None:
    inputs = arguments((2, 18, 2, 32), torch.float32)
    qkv, message_kv = (inputs[name].cpu() for name in ("qkv", "message_kv"))
    expected = frame_attention(qkv.bfloat16(), message_kv.bfloat16(), 2, backend="torch")
    with torch.autocast("cpu", torch.bfloat16):
        # a projection under autocast gives bfloat16, a norm float32
        found = frame_attention(qkv.bfloat16(), message_kv, 2, backend="torch")
    assert found.dtype == torch.bfloat16
    assert torch.equal(found, expected)


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_backward_keeps_no_weights(backend: str) -> None:
    inputs = arguments((1, 66, 1, 32), torch.float32)
    tensors = leaves(inputs)
    kept: dict[int, Tensor] = {}
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.setdefault(x.data_ptr(), x), lambda x: x):
        frame_attention(*tensors, 1, backend=backend)
    # packed rows, message, output and log-sum-exp; plain torch also keeps its own keys and values
    own = 66 * 96 + 64 + 66 * 32 + 66
    assert sum(x.numel() for x in kept.values()) <= own + (2 * 67 * 32 if backend == "torch" else 0)


@pytest.mark.parametrize("grad", [False, True])
def test_launches(grad: bool, launches: Launches | None) -> None:
    if launches is None:
        pytest.skip("launches are counted in the interpreter")
    inputs = arguments((1, 66, 1, 32), torch.float16)
    with torch.set_grad_enabled(grad):
        frame_attention(*leaves(inputs), 1, backend="triton")
    assert launches.names == ["_frame_attention_fwd_kernel"]
    run(inputs)
    assert launches.names[2:] == ["_frame_attention_bwd_query_kernel", "_frame_attention_bwd_key_kernel"]


@pytest.mark.parametrize("with_lse", [False, True])
@pytest.mark.parametrize("shape", [(2, 5, 1, 32), (1, 20, 2, 64), (2, 3, 2, 5)], ids=str)
def test_registered_op(shape: tuple[int, int, int, int], with_lse: bool) -> None:
    inputs = arguments(shape, torch.float32)
    tensors = leaves(inputs) if with_lse else [inputs["qkv"], inputs["message_kv"]]
    torch.library.opcheck(torch.ops.xclip_fast.frame_attention, (*tensors, inputs["heads"], with_lse))


def test_registered_op_on_rows_apart() -> None:
    inputs = arguments((2, 5, 1, 32), torch.float32)
    qkv = layouts(inputs["qkv"])["padded"].requires_grad_()
    torch.library.opcheck(torch.ops.xclip_fast.frame_attention, (qkv, inputs["message_kv"].requires_grad_(), 1))
    _, lse = torch.ops.xclip_fast.frame_attention(qkv, inputs["message_kv"], 1)
    upstream = random(2, 5, 32, dtype=torch.float32)
    args = (upstream, qkv.detach(), inputs["message_kv"].detach(), upstream.clone(), lse.detach(), 1)
    torch.library.opcheck(torch.ops.xclip_fast.frame_attention_backward, args)


@pytest.mark.parametrize("kernels", ["1", "0"])
def test_log_sum_exp(kernels: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if DEVICE == "cpu":
        monkeypatch.setenv("TRITON_INTERPRET", kernels)
    inputs = arguments((2, 18, 2, 32), torch.float16)
    qkv, message_kv = inputs["qkv"], inputs["message_kv"]
    out, lse = torch.ops.xclip_fast.frame_attention(qkv, message_kv, 2)
    query, key, _ = qkv.double().view(2, 18, 3, 2, 32).permute(2, 0, 3, 1, 4)
    key = torch.cat([key, message_kv.double().view(2, 2, 2, 32)[:, 0].unsqueeze(2)], dim=2)
    scores = query @ key.transpose(-2, -1) * 32**-0.5
    assert lse.dtype == torch.float32
    assert_within(lse, scores.logsumexp(-1) / torch.tensor(2.0).log().item(), 1e-6, what="frame_attention lse")
    without, nothing = torch.ops.xclip_fast.frame_attention(qkv, message_kv, 2, False)
    assert torch.equal(without, out)
    assert nothing.numel() == 0


def test_log_sum_exp_is_kept_for_training_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def spy(qkv: Tensor, message_kv: Tensor, heads: int, with_lse: bool) -> tuple[Tensor, Tensor]:
        asked.append(with_lse)
        return frame_attention_fwd(qkv, message_kv, heads, with_lse)

    monkeypatch.setattr("xclip_fast.kernels.frame_attention.frame_attention_fwd", spy)
    qkv, message_kv, heads = arguments((1, 5, 1, 32), torch.float32).values()
    frame_attention(qkv, message_kv, heads, backend="triton")
    frame_attention(qkv, message_kv.requires_grad_(), heads, backend="triton")
    with torch.no_grad():
        frame_attention(qkv, message_kv, heads, backend="triton")
    assert asked == [False, True, False]


def test_without_log_sum_exp_there_is_no_backward_pass() -> None:
    qkv, message_kv = leaves(arguments((1, 5, 1, 32), torch.float32))
    out, _ = torch.ops.xclip_fast.frame_attention(qkv, message_kv, 1, False)
    with pytest.raises(ValueError, match="with_lse=False"):
        out.sum().backward()


@pytest.mark.parametrize("shape", [(2, 3, 2, 3), (1, 5, 1, 4)], ids=str)
def test_registered_op_without_kernels_has_exact_gradients(
    shape: tuple[int, int, int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    tensors = [x.detach().cpu().requires_grad_() for x in leaves(arguments(shape, torch.float64))]
    assert torch.autograd.gradcheck(lambda *args: torch.ops.xclip_fast.frame_attention(*args, shape[2])[0], tensors)


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_compiles_whole(backend: str) -> None:
    def attend(qkv: Tensor, message_kv: Tensor) -> Tensor:
        return frame_attention(qkv, message_kv, 2, backend=backend)

    compiled = torch.compile(attend, fullgraph=True, backend="aot_eager")
    tensors = leaves(arguments((2, 5, 2, 32), torch.float32))
    assert torch.allclose(compiled(*tensors), attend(*tensors))
    found = torch.autograd.grad(compiled(*tensors).square().sum(), tensors)
    expected = torch.autograd.grad(attend(*tensors).square().sum(), tensors)
    assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(found, expected, strict=True))
    with torch.inference_mode():
        assert torch.allclose(compiled(*tensors), attend(*tensors))


def test_operations_are_counted() -> None:
    qkv, message_kv = torch.empty(2, 7, 3 * 64, device="meta"), torch.empty(2, 2 * 64, device="meta")
    with FlopCounterMode(display=False) as forward:
        out = frame_attention(qkv.requires_grad_(), message_kv, 2, backend="triton")
    assert out.shape == (2, 7, 64)
    assert forward.get_total_flops() == 4 * 2 * 2 * 7 * 8 * 32
    with FlopCounterMode(display=False) as backward:
        out.sum().backward()
    assert backward.get_total_flops() == 2.5 * forward.get_total_flops()


@pytest.mark.parametrize("tokens", [197, 257])
def test_padding_costs_little(tokens: int) -> None:
    assert 1.0 < padded_work(tokens, cut(streamed_tile(tokens, 64, 2), tokens)) <= 1.12
    assert padded_work(577, cut(streamed_tile(577, 64, 2), 577)) <= 1.14


def test_padded_work_is_of_whole_tiles() -> None:
    assert padded_work(50, cut(streamed_tile(50, 64, 2), 50)) == 64 * 64 / (50 * 51)
    assert padded_work(257, cut(streamed_tile(257, 64, 2), 257)) == 272 * 272 / (257 * 258)
    assert padded_work(257, cut(KEPT, 257)) == 320 * 272 / (257 * 258)


@pytest.mark.parametrize("element_size", [2, 4])
@pytest.mark.parametrize("head_dim", [32, 64, 128])
@pytest.mark.parametrize("tile_of", TILES)
def test_tiles_cover_each_row_once(tile_of: Tunable, head_dim: int, element_size: int) -> None:
    for tokens in [*range(1, 700), 1025, 4096, 5000]:
        queries, keys = cut(tile_of(tokens, head_dim, element_size), tokens)
        assert queries.body % queries.block == keys.body % keys.block == 0
        # queries: a tail behind the body, or blocks alone of which the last may be masked
        assert (
            queries.body <= tokens < queries.body + queries.tail
            or (queries.tail == 0 and queries.body - queries.block < tokens <= queries.body)
            or queries.body + queries.tail == tokens
        )
        assert queries.count == queries.body // queries.block + (queries.tail > 0)
        # keys: the tail holds the rows left and the message, and is no larger than a block
        assert keys.body <= tokens < keys.body + keys.tail
        assert keys.tail <= keys.block
        assert {queries.block, keys.block, keys.tail, queries.tail or 16} <= {16, 32, 64, 128}


def test_kept_keys_are_two_powers_of_two_and_a_tail() -> None:
    for tokens in KEPT_TOKENS:
        blocks = cut(KEPT, tokens)
        launch = options(blocks, KEPT)
        sides = [launch[f"KEY_{part}"] for part in ("FIRST", "SECOND", "TAIL")]
        assert all(side >= 16 and side & (side - 1) == 0 for side in sides)
        assert sum(sides[:2]) == blocks.keys.body <= tokens < blocks.keys.body + blocks.keys.tail
        assert blocks.queries.body - 64 < tokens <= blocks.queries.body
        assert blocks.queries.tail == 0
        assert blocks.programs == 1
    for tokens in (63, 321):
        with pytest.raises(ValueError, match=f"keys of {tokens} tokens are not kept"):
            cut(KEPT, tokens)


def test_wrong_arguments_are_named() -> None:
    qkv, message_kv, heads = arguments((2, 5, 2, 32), torch.float32).values()
    with pytest.raises(ValueError, match=r"qkv must be .* D a multiple of 5 heads, found torch.float32 \(2, 5, 192\)"):
        frame_attention(qkv, message_kv, 5)
    with pytest.raises(ValueError, match="heads must be positive, found 0"):
        frame_attention(qkv, message_kv, 0)
    with pytest.raises(ValueError, match=r"with S >= 1"):
        frame_attention(qkv[:, :0], message_kv, heads)
    with pytest.raises(ValueError, match="qkv must be a floating point"):
        frame_attention(qkv.int(), message_kv, heads)
    with pytest.raises(ValueError, match="qkv must be a floating point"):
        frame_attention(qkv[0], message_kv, heads)
    with pytest.raises(
        ValueError, match=r"message_kv must be torch.float32 \(2, 128\) to fit qkv, found .* \(1, 128\)"
    ):
        frame_attention(qkv, message_kv[:1], heads)
    with pytest.raises(ValueError, match=r"found torch\.float16"):
        frame_attention(qkv, message_kv.half(), heads)
    with pytest.raises(ValueError, match="unknown backend 'cuda'"):
        frame_attention(qkv, message_kv, heads, backend="cuda")


def test_explains_what_the_kernels_cannot_take() -> None:
    qkv, message_kv, heads = arguments((2, 5, 2, 32), torch.float32).values()
    assert explain("frame_attention", qkv, message_kv, heads)["triton"] is None
    assert "float64" in explain("frame_attention", qkv.double(), message_kv.double(), heads)["triton"]
    assert "32, 64, 128 numbers, found 16" in explain("frame_attention", qkv, message_kv, 4)["triton"]
    with pytest.raises(ValueError, match="found 16; use backend='torch'"):
        frame_attention(qkv, message_kv, 4, backend="triton")
