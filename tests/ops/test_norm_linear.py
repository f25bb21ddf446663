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


@kernel_dtypes
@pytest.mark.parametrize("added", [True, False], ids=["residual", "alone"])
@pytest.mark.parametrize("name", SHAPES)
def test_gradients_are_those_of_the_two_apart(name: str, added: bool, dtype: torch.dtype) -> None:
    given: list[Tensor | None] = [*tensors(name, dtype)]
    if not added:
        given[1] = None
    with backend("triton"):
        found = step(fused(name), given, streams=added)
    near = step(plain(name), given, streams=added)
    exact = step(plain(name), [None if tensor is None else tensor.double() for tensor in given], streams=added)
    for one, other, truth in zip(found, near, exact, strict=True):
        assert one.dtype == dtype
        assert parity_error(one, truth) <= allowance(parity_error(other, truth), dtype, 64)


@pytest.mark.parametrize("name", SHAPES)
def test_a_gradient_of_the_stream_alone(name: str) -> None:
    x, residual, *rest = (tensor.requires_grad_() for tensor in tensors(name, torch.float32))
    with backend("triton"):
        _, stream = fused(name)(x, residual, *rest)
    stream.sum().backward()
    assert torch.equal(x.grad, torch.ones_like(x))  # type: ignore[arg-type]
    assert torch.equal(residual.grad, torch.ones_like(x))  # type: ignore[arg-type]
    assert rest[0].grad is None


@pytest.mark.parametrize("name", SHAPES)
def test_normed_rows_are_not_kept_and_the_others_read_once(name: str) -> None:
    given = [tensor.requires_grad_() for tensor in tensors(name, torch.float32, (64, WIDTH))]
    with backend("triton"), saved_tensors() as (kept, read):
        out, stream = fused(name)(*given)
    (out.sum() + stream.sum()).backward()
    assert sorted(read) == list(range(len(kept)))
    own = {tensor.data_ptr() for tensor in given}
    rows = [tensor for tensor in kept if tensor.shape == (64, WIDTH) and tensor.data_ptr() not in own]
    assert [tensor.data_ptr() for tensor in rows] == [stream.data_ptr()]


@pytest.mark.parametrize("case", ["no gradient", "autocast", "two dtypes", "torch"])
def test_what_is_left_to_the_ops_apart(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    called: list[str] = []
    for name in SHAPES:
        monkeypatch.setattr(f"xclip_fast.ops._norm_linear.{name}_op", lambda *_: called.append("op"))
    for name in SHAPES:
        given = tensors(name, torch.float16)
        if case == "two dtypes":
            given[2], given[3] = given[2].float(), given[3].float()
        given = [tensor.requires_grad_(case != "no gradient") for tensor in given]
        autocast = torch.autocast(DEVICE, torch.float16, enabled=case == "autocast")
        with backend("torch" if case == "torch" else "triton"), autocast:
            out, stream = fused(name)(*given)
        assert out.shape[:-1] == stream.shape[:-1]
    assert not called


@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize("frozen", ["layers", "norm and rows"])
def test_frozen_tensors_have_no_gradient_and_the_others_the_same(name: str, frozen: str) -> None:
    grads, drawn = [], tensors(name, torch.float32)
    for fixed in (range(0), range(4, 8) if frozen == "layers" else range(4)):
        given = [tensor.clone().requires_grad_(place not in fixed) for place, tensor in enumerate(drawn)]
        with backend("triton"):
            out, _ = fused(name)(*given)
        (out * torch.linspace(-1, 1, out.shape[-1], device=out.device)).sum().backward()
        grads.append([tensor.grad for tensor in given])
    for place, (all_of_them, some) in enumerate(zip(*grads, strict=True)):
        if some is None:
            assert place in (range(4, 8) if frozen == "layers" else range(4))
        else:
            assert torch.equal(some, all_of_them)


@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize("place", range(1, 6))
def test_shapes_that_do_not_fit_are_refused_in_training_too(name: str, place: int) -> None:
    given = tensors(name, torch.float32)
    shape = given[place].shape
    given[place] = random(*shape[:-1], shape[-1] // 2, dtype=torch.float32)
    with backend("triton"), pytest.raises((ValueError, RuntimeError)):
        fused(name)(*(tensor.requires_grad_() for tensor in given))


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("name", SHAPES)
def test_checkpoints_compute_it_again(name: str, reentrant: bool) -> None:
    given = [tensor.requires_grad_() for tensor in tensors(name, torch.float32)]
    with backend("triton"):
        wanted = torch.autograd.grad(fused(name)(*given)[0].square().sum(), given)
        out, _ = checkpoint(fused(name), *given, use_reentrant=reentrant)
        out.square().sum().backward()
    assert all(map(torch.equal, wanted, [tensor.grad for tensor in given]))


@pytest.mark.parametrize("used", ["first", "first and rows", "first and stream", "all"])
@pytest.mark.parametrize("added", [True, False], ids=["residual", "alone"])
@pytest.mark.parametrize("tokens", [1, 7])
def test_gradients_of_the_first_tokens(tokens: int, added: bool, used: str) -> None:
    given: list[Tensor | None] = [*tensors("norm_linear", torch.float32, (3, 2, tokens, WIDTH))]
    if not added:
        given[1] = None

    def run(ours: bool) -> list[Tensor]:
        leaves = [None if tensor is None else tensor.detach().clone().requires_grad_() for tensor in given]
        if ours:
            with backend("triton"):
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
