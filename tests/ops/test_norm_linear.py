"""A norm with what multiplies its rows, in training: results and gradients as of the two apart, in less memory."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from harness import DEVICE, kernel_dtypes, random, saved_tensors
from torch import Tensor
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from xclip_fast.numerics import allowance, parity_error
from xclip_fast.ops import backend
from xclip_fast.ops._norm_linear import norm_feed_forward, norm_linear

WIDTH, HIDDEN, EPS = 24, 40, 1e-5
SHAPES = {"norm_linear": [(HIDDEN, WIDTH), (HIDDEN,)]}
SHAPES["norm_feed_forward"] = [*SHAPES["norm_linear"], (WIDTH, HIDDEN), (WIDTH,)]
Call = Callable[..., tuple[Tensor, ...]]
both_ways = pytest.mark.parametrize("way", ["triton", "torch"])


def fused(name: str) -> Call:
    def call(x: Tensor, residual: Tensor | None, *rest: Tensor) -> tuple[Tensor, ...]:
        norm, weights = rest[:2], rest[2:]
        if name == "norm_linear":
            return norm_linear(x, residual, norm, *weights, EPS)[:2]  # type: ignore[arg-type, misc]
        return norm_feed_forward(x, residual, norm, weights, EPS)  # type: ignore[arg-type]

    return call


def plain(name: str) -> Call:
    def call(x: Tensor, residual: Tensor | None, *rest: Tensor) -> tuple[Tensor, ...]:
        stream = x if residual is None else x + residual
        out = functional.linear(functional.layer_norm(stream, (WIDTH,), *rest[:2], EPS), *rest[2:4])
        if name == "norm_feed_forward":
            out = functional.linear(out * torch.sigmoid(1.702 * out), *rest[4:])
        return out, stream

    return call


def tensors(name: str, dtype: torch.dtype, shape: tuple[int, ...] = (3, 7, WIDTH)) -> list[Tensor]:
    vectors = [random(WIDTH, dtype=dtype, mean=1.0), random(WIDTH, dtype=dtype)]
    weights = [random(*sizes, dtype=dtype) / (sizes[-1] ** 0.5 if len(sizes) > 1 else 1) for sizes in SHAPES[name]]
    return [random(*shape, dtype=dtype), random(*shape, dtype=dtype, mean=0.5), *vectors, *weights]


def step(call: Call, given: list[Tensor | None], streams: bool) -> list[Tensor]:
    """Results, and gradients of a sum of both in which every number has a weight of its own."""
    leaves = [None if tensor is None else tensor.detach().clone().requires_grad_() for tensor in given]
    out, stream = call(*leaves)
    grads = [
        torch.linspace(-1, 1, y.numel(), device=y.device).view(y.shape).bfloat16().to(y.dtype) for y in (out, stream)
    ]
    outputs, grads = ([out, stream], grads) if streams else ([out], grads[:1])
    wanted = [leaf for leaf in leaves if leaf is not None]
    return [out.detach(), stream.detach(), *torch.autograd.grad(outputs, wanted, grads)]


@both_ways
@kernel_dtypes
@pytest.mark.parametrize("added", [True, False], ids=["residual", "alone"])
@pytest.mark.parametrize("name", SHAPES)
def test_gradients_are_those_of_the_two_apart(name: str, added: bool, dtype: torch.dtype, way: str) -> None:
    given: list[Tensor | None] = [*tensors(name, dtype)]
    if not added:
        given[1] = None
    with backend(way):
        found = step(fused(name), given, streams=added)
    near = step(plain(name), given, streams=added)
    exact = step(plain(name), [None if tensor is None else tensor.double() for tensor in given], streams=added)
    for one, other, truth in zip(found, near, exact, strict=True):
        assert one.dtype == dtype
        rounded = parity_error(other, truth)
        # PyTorch's operators round what kernels do not
        limit = max(allowance(rounded, dtype, 64), 1.5 * rounded if way == "torch" else 0.0)
        assert parity_error(one, truth) <= limit


@both_ways
@pytest.mark.parametrize("name", SHAPES)
def test_a_gradient_of_the_stream_alone(name: str, way: str) -> None:
    x, residual, *rest = (tensor.requires_grad_() for tensor in tensors(name, torch.float32))
    with backend(way):
        _, stream = fused(name)(x, residual, *rest)
    stream.sum().backward()
    assert torch.equal(x.grad, torch.ones_like(x))  # type: ignore[arg-type]
    assert torch.equal(residual.grad, torch.ones_like(x))  # type: ignore[arg-type]
    assert rest[0].grad is None


@both_ways
@pytest.mark.parametrize("name", SHAPES)
def test_normed_rows_are_not_kept_and_the_others_read_once(name: str, way: str) -> None:
    given = [tensor.requires_grad_() for tensor in tensors(name, torch.float32, (64, WIDTH))]
    with backend(way), saved_tensors() as (kept, read):
        out, stream = fused(name)(*given)
    (out.sum() + stream.sum()).backward()
    assert sorted(read) == list(range(len(kept)))
    own = {tensor.data_ptr() for tensor in given}
    rows = [tensor for tensor in kept if tensor.shape == (64, WIDTH) and tensor.data_ptr() not in own]
    assert [tensor.data_ptr() for tensor in rows] == [stream.data_ptr()]
    wide = [tensor for tensor in kept if tensor.shape == (64, HIDDEN)]
    assert len(wide) == (name == "norm_feed_forward")


@pytest.mark.parametrize("case", ["no gradient", "autocast", "two dtypes", "reference"])
def test_what_is_left_to_the_ops_apart(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    called: list[str] = []
    for name in ("norm_linear_op", "norm_feed_forward_op", "NormLinear.apply", "NormFeedForward.apply"):
        monkeypatch.setattr(f"xclip_fast.ops._norm_linear.{name}", lambda *_: called.append("op"))
    for name in SHAPES:
        given = tensors(name, torch.float16)
        if case == "two dtypes":
            given[2], given[3] = given[2].float(), given[3].float()
        given = [tensor.requires_grad_(case != "no gradient") for tensor in given]
        autocast = torch.autocast(DEVICE, torch.float16, enabled=case == "autocast")
        for way in ("reference",) if case == "reference" else ("triton", "torch"):
            with backend(way), autocast:
                out, stream = fused(name)(*given)
            assert out.shape[:-1] == stream.shape[:-1]
    assert not called


@pytest.mark.parametrize("used", ["rows", "all"])
@pytest.mark.parametrize("added", [True, False], ids=["residual", "alone"])
@pytest.mark.parametrize("name", SHAPES)
def test_on_plain_torch_it_has_second_and_forward_derivatives(name: str, added: bool, used: str) -> None:
    given: list[Tensor] = [tensor.requires_grad_() for tensor in tensors(name, torch.float64, (2, 3, WIDTH))]

    def run(*leaves: Tensor) -> tuple[Tensor, ...]:
        x, residual, weight, bias, *weights = leaves if added else (leaves[0], None, *leaves[1:])
        call = norm_linear if name == "norm_linear" else norm_feed_forward
        layers = weights if name == "norm_linear" else [weights]
        found = call(x, residual, (weight, bias), *layers, EPS)  # type: ignore[operator]
        return found[:1] if used == "rows" else found

    inputs = given if added else [given[0], *given[2:]]
    with backend("torch"):
        for one, other in zip(
            *(torch.autograd.grad(run(*inputs)[0].cos().sum(), inputs, create_graph=graph) for graph in (True, False)),
            strict=True,
        ):
            torch.testing.assert_close(one, other)
        assert torch.autograd.gradcheck(run, inputs, fast_mode=True, check_forward_ad=True)
        assert torch.autograd.gradgradcheck(run, inputs, fast_mode=True)


@pytest.mark.filterwarnings("ignore:.*torch.jit", "ignore::torch.jit.TracerWarning")
@pytest.mark.parametrize("name", SHAPES)
def test_traced_it_is_made_of_pytorch_s_operators(name: str) -> None:
    given = [tensor.cpu().requires_grad_() for tensor in tensors(name, torch.float32)]
    with backend("torch"):
        traced = torch.jit.trace(fused(name), tuple(given), check_trace=False)
        assert "PythonOp" not in str(traced.graph)
        expected = fused(name)(*given)
    for one, other in zip(traced(*given), expected, strict=True):
        torch.testing.assert_close(one, other)


@both_ways
@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize("frozen", ["layers", "norm and rows"])
def test_frozen_tensors_have_no_gradient_and_the_others_the_same(name: str, frozen: str, way: str) -> None:
    grads, drawn = [], tensors(name, torch.float32)
    for fixed in (range(0), range(4, 8) if frozen == "layers" else range(4)):
        given = [tensor.clone().requires_grad_(place not in fixed) for place, tensor in enumerate(drawn)]
        with backend(way):
            out, _ = fused(name)(*given)
        (out * torch.linspace(-1, 1, out.shape[-1], device=out.device)).sum().backward()
        grads.append([tensor.grad for tensor in given])
    for place, (all_of_them, some) in enumerate(zip(*grads, strict=True)):
        if some is None:
            assert place in (range(4, 8) if frozen == "layers" else range(4))
        else:
            assert torch.equal(some, all_of_them)


@both_ways
@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize("place", range(1, 6))
def test_shapes_that_do_not_fit_are_refused_in_training_too(name: str, place: int, way: str) -> None:
    given = tensors(name, torch.float32)
    shape = given[place].shape
    given[place] = random(*shape[:-1], shape[-1] // 2, dtype=torch.float32)
    with backend(way), pytest.raises((ValueError, RuntimeError)):
        fused(name)(*(tensor.requires_grad_() for tensor in given))


@both_ways
@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("name", SHAPES)
def test_checkpoints_compute_it_again(name: str, reentrant: bool, way: str) -> None:
    given = [tensor.requires_grad_() for tensor in tensors(name, torch.float32)]
    with backend(way):
        wanted = torch.autograd.grad(fused(name)(*given)[0].square().sum(), given)
        out, _ = checkpoint(fused(name), *given, use_reentrant=reentrant)
        out.square().sum().backward()
    assert all(map(torch.equal, wanted, [tensor.grad for tensor in given]))


@pytest.mark.parametrize("used", ["first", "first and rows", "first and stream", "all"])
@pytest.mark.parametrize("added", [True, False], ids=["residual", "alone"])
@pytest.mark.parametrize("tokens", [1, 7])
@both_ways
def test_gradients_of_the_first_tokens(way: str, tokens: int, added: bool, used: str) -> None:
    given: list[Tensor | None] = [*tensors("norm_linear", torch.float32, (3, 2, tokens, WIDTH))]
    if not added:
        given[1] = None

    def run(ours: bool) -> list[Tensor]:
        leaves = [None if tensor is None else tensor.detach().clone().requires_grad_() for tensor in given]
        if ours:
            with backend(way):
                out, stream, first = norm_linear(leaves[0], leaves[1], leaves[2:4], *leaves[4:], EPS)  # type: ignore[arg-type, misc]
        else:
            out, stream = plain("norm_linear")(*leaves)
            first = stream[:, :, 0]
        loss = (first * torch.linspace(-1, 1, first.numel(), device=first.device).view(first.shape)).sum()
        if used in ("first and rows", "all"):
            loss = loss + out.square().sum()
        if used in ("first and stream", "all"):
            loss = loss + stream.square().sum()
        wanted = [leaf for leaf in leaves if leaf is not None]
        grads = torch.autograd.grad(loss, wanted, allow_unused=True, materialize_grads=True)
        return [first.detach(), *grads]

    for one, other in zip(run(True), run(False), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)
