"""The registry of ops: whatever the layers and the engine call has example arguments, and ``explain`` knows it."""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from inspect import isfunction
from typing import Any
from unittest.mock import patch

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import xclip_fast
from xclip_fast import engine, ops
from xclip_fast.engine import Engine
from xclip_fast.model import XCLIP, create_model
from xclip_fast.ops import explain
from xclip_fast.ops._folded_message import folded_message
from xclip_fast.ops._quantize_rows import quantize_rows
from xclip_fast.ops.cases import OPS, TINY, TRAINED, Load, find_op
from xclip_fast.ops.inputs import Draw

LOAD = Load(TINY, 2, 5)
# registered ops that no user calls: backward passes, and what the ops themselves are made of
WITHIN = ("_backward", "patch_rows", "column_sums", "linear", "norm_feed_forward")


class Registered(TorchDispatchMode):
    """The names of the registered ops of this library that are dispatched."""

    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        namespace, _, name = func.name().partition("::")
        if namespace == "xclip_fast":
            self.names.add(name)
        return func(*args, **(kwargs or {}))


def functions() -> dict[Callable[..., Any], str]:
    """The functions that layers and engine can call, with their names."""
    public = {getattr(ops, name): name for name in ops.__all__ if isfunction(getattr(ops, name))}
    return {op: name for op, name in public.items() if name not in ("backend", "explain")} | {
        quantize_rows: "quantize_rows",
        folded_message: "folded_message",
    }


@contextmanager
def called() -> Iterator[set[str]]:
    """The names of the functions of ops that are called, from wherever they were imported to."""
    known, names = functions(), set()
    undo: list[Any] = []

    def watched(op: Callable[..., Any]) -> Callable[..., Any]:
        @wraps(op)
        def call(*args: Any, **kwargs: Any) -> Any:
            names.add(known[op])
            return op(*args, **kwargs)

        return call

    for module in pkgutil.walk_packages(xclip_fast.__path__, "xclip_fast."):
        if module.name.startswith(("xclip_fast.layers", "xclip_fast.engine", "xclip_fast.model")):
            found = importlib.import_module(module.name)
            for name, value in vars(found).items():
                if isfunction(value) and value in known:
                    undo.append(patch.object(found, name, watched(value)))
    for one in undo:
        one.start()
    try:
        yield names
    finally:
        for one in undo:
            one.stop()


@pytest.fixture(scope="module")
def model() -> XCLIP:
    return create_model(TINY, seed=0)


def video(*, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(2, TINY.frames, 3, TINY.image_size, TINY.image_size, generator=generator)


TEXT = torch.randn(5, TINY.embed_dim, generator=torch.Generator().manual_seed(1))


def known(name: str) -> None:
    """The registry has the op, and explains it for the arguments that a model gives it."""
    assert name in OPS, f"{name} has no example arguments"
    arguments = OPS[name].arguments(Draw(torch.float32, "cpu"), LOAD)
    assert explain(name, **arguments).keys() == set(ops.BACKENDS)


def test_what_the_layers_call_is_in_the_registry(model: XCLIP) -> None:
    with called() as names, Registered() as registered, ops.backend("triton"):
        model.logits(model.encode_video(video()), TEXT).sum().backward()
    assert {"patch_embed", "layer_norm", "feed_forward", "frame_attention", "temporal_block", "clip_logits"} <= names
    own = {name for name in registered.names if not name.endswith(WITHIN)}
    assert own, "the kernels ran"
    for name in sorted(names | own):
        known(name)


def test_what_the_engine_calls_is_in_the_registry(model: XCLIP) -> None:
    with called() as names, Registered() as registered:
        fast = Engine(model, torch.float32, "cpu")
        fast(video(), fast.texts_of(TEXT))
    assert {"clip_logits", "mean_norm_over_frames", "prompt_attention"} <= names
    for name in sorted(names | {name for name in registered.names if not name.endswith(WITHIN)}):
        known(name)


def test_what_the_engine_could_call_on_a_gpu_is_in_the_registry() -> None:
    # its calls there depend on the GPU: whatever it imports counts
    modules = [
        importlib.import_module(f"xclip_fast.engine.{one.name}") for one in pkgutil.iter_modules(engine.__path__)
    ]
    values = [value for module in modules for value in vars(module).values() if isfunction(value)]
    imported = {name for op, name in functions().items() if op in values}
    assert {"folded_message", "quantize_rows", "temporal_block", "frame_attention"} <= imported
    for name in sorted(imported):
        known(name)


def test_every_public_op_is_in_the_registry() -> None:
    assert set(functions().values()) == OPS.keys()
    assert {name for name in functions().values() if name in ops.__all__} == set(TRAINED)


@pytest.mark.parametrize("op", OPS)
def test_the_arguments_are_those_of_the_op(op: str) -> None:
    case = OPS[op]
    found = find_op(op)(**case.arguments(Draw(torch.float32, "meta"), LOAD), backend="torch")
    assert all(tensor.is_meta for tensor in ([found] if isinstance(found, Tensor) else found))
    for name in case.small:
        assert find_op(op)(**case.example(Draw(torch.float32, "meta"), name), backend="torch") is not None
