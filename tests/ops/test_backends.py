"""Which backend is chosen: inside contexts, of several threads and compiled, and by what is installed."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from contextvars import copy_context
from typing import Any

import numpy
import pytest
import torch
from torch import Tensor

from xclip_fast import ops
from xclip_fast.ops import layer_norm
from xclip_fast.ops._backends import choose, kernel_refusal

NAMES = ["reference", "torch", None, "torch", "reference", None]


def _in_force() -> str:
    return choose("layer_norm", None, torch.ones(2, 8))


def _norm(x: Tensor) -> Tensor:
    return layer_norm(x, x[0], x[0])[0]


def _norm_by_definition_and_as_asked(x: Tensor) -> tuple[Tensor, Tensor]:
    with ops.backend("reference"):
        first = _norm(x)
    return first, _norm(x)


@pytest.fixture
def compiler() -> Iterator[tuple[Any, list[list[str]]]]:
    """Compiles whole, and the backends of the norms in each graph that ran since."""
    ran: list[list[str]] = []

    def note(graph: Any, _: Any) -> Any:
        targets = [getattr(node.target, "__name__", node.target) for node in graph.graph.nodes]
        names = [{"sqrt": "reference", "layer_norm": "torch"}.get(str(target)) for target in targets]
        found = [name for name in names if name]

        def run(*arguments: Any) -> Any:
            ran.append(found)
            return graph.forward(*arguments)

        return run

    torch._dynamo.reset()
    yield lambda function: torch.compile(function, fullgraph=True, backend=note), ran
    torch._dynamo.reset()


def test_overlapping_contexts_of_two_threads_keep_apart_and_leave_nothing_behind() -> None:
    steps = threading.Barrier(2, timeout=20)

    def visit(name: str, first: bool) -> list[str]:
        found = [_in_force()]
        if not first:
            steps.wait()
        with ops.backend(name):
            if first:
                steps.wait()
            found.append(_in_force())
            steps.wait()
            found.append(_in_force())
            if not first:
                steps.wait()
        if first:
            steps.wait()
        return [*found, _in_force()]

    with ThreadPoolExecutor(2) as pool:
        outer, inner = pool.submit(visit, "reference", True), pool.submit(visit, "torch", False)
        without = _in_force()
        assert outer.result() == [without, "reference", "reference", without]
        assert inner.result() == [without, "torch", "torch", without]
        assert pool.submit(_in_force).result() == without
    assert _in_force() == without


def test_a_thread_takes_the_backend_of_its_starter_in_a_copied_context_alone() -> None:
    with ThreadPoolExecutor(1) as pool, ops.backend("reference"):
        without, copied = pool.submit(_in_force).result(), pool.submit(copy_context().run, _in_force).result()
    assert (without, copied) == (_in_force(), "reference")


def test_tasks_of_one_thread_keep_apart() -> None:
    async def visit(name: str, turns: int) -> str:
        with ops.backend(name):
            for _ in range(turns):
                await asyncio.sleep(0)
            return _in_force()

    async def both() -> list[str]:
        return await asyncio.gather(visit("reference", 1), visit("torch", 3))

    without = _in_force()
    assert asyncio.run(both()) == ["reference", "torch"]
    assert _in_force() == without


def test_contexts_nest_and_end_with_an_error() -> None:
    without = _in_force()
    with ops.backend("reference"):
        with suppress(RuntimeError), ops.backend("torch"):
            assert _in_force() == "torch"
            raise RuntimeError
        assert _in_force() == "reference"
    assert _in_force() == without
    with pytest.raises(ValueError, match="unknown backend 'cuda'"), ops.backend("cuda"):
        pass


def test_compiled_whole_a_function_takes_the_backend_around_it(compiler: Any) -> None:
    compiles, ran = compiler
    function, x = compiles(_norm), torch.randn(3, 8)
    for name in NAMES:
        if name is None:
            function(x)
            continue
        with ops.backend(name):
            function(x)
    assert ran == [[name or "torch"] for name in NAMES]
    ran.clear()
    with ThreadPoolExecutor(1) as pool, ops.backend("reference"):
        pool.submit(function, x).result()
        function(x)
    assert ran == [["torch"], ["reference"]]


@pytest.mark.skipif(torch.__version__ < "2.14", reason="torch.compile reads no context variable before 2.14")
def test_compiled_whole_a_function_takes_the_backend_of_a_copied_context(compiler: Any) -> None:
    compiles, ran = compiler
    function, x = compiles(_norm), torch.randn(3, 8)
    with ThreadPoolExecutor(1) as pool, ops.backend("reference"):
        pool.submit(copy_context().run, function, x).result()
    assert ran == [["reference"]]


def test_compiled_whole_a_function_may_enter_the_context(compiler: Any) -> None:
    compiles, ran = compiler
    function, x = compiles(_norm_by_definition_and_as_asked), torch.randn(3, 8)
    without = _in_force()
    for name in NAMES:
        if name is None:
            function(x)
            assert _in_force() == without
            continue
        with ops.backend(name):
            function(x)
            assert _in_force() == name
    assert ran == [["reference", name or "torch"] for name in NAMES]


@pytest.mark.parametrize(
    ("of_triton", "of_numpy", "fails"),
    [
        ("3.6.0", "2.4.0", True),
        ("3.6.0+git1", "3.0.0rc1", True),
        ("3.6.0", "2.3.5", False),
        ("3.6.0", "1.26.4", False),
        ("3.7.0", "2.4.6", False),
        ("3.10.1", "2.5.0", False),
        ("4.0", "2.4.0", False),
    ],
)
def test_an_interpreter_that_fails_with_this_numpy_is_not_taken(
    monkeypatch: pytest.MonkeyPatch, of_triton: str, of_numpy: str, fails: bool
) -> None:
    triton = pytest.importorskip("triton", reason="triton has wheels for Linux alone")
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    monkeypatch.setattr(triton, "__version__", of_triton)
    monkeypatch.setattr(numpy, "__version__", of_numpy)
    assert (kernel_refusal(torch.ones(2)) is not None) is fails
    if fails:
        x, ones = torch.ones(2, 8), torch.ones(8)
        words = f"triton {of_triton} fails with numpy {of_numpy}: pip install 'numpy<2.4', or a newer triton"
        with pytest.raises(ValueError, match=words.replace("+", r"\+")):
            layer_norm(x, ones, ones, backend="triton")
        # without being asked for it is passed over
        assert layer_norm(x, ones, ones)[0].equal(torch.ones(2, 8))
