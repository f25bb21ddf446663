"""Which implementation of an op runs: the argument first, then the ``backend`` context, then the automatic choice."""

from __future__ import annotations

import importlib.util
import os
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import torch
from torch import Tensor
from torch.autograd import forward_ad

from xclip_fast.tuning import tuned_backend

BACKENDS = ("reference", "torch", "triton", "extension")
KERNEL_DTYPES = (torch.float16, torch.bfloat16, torch.float32)
INTERPRETED_DTYPES = (torch.float16, torch.float32)  # Triton's interpreter keeps bfloat16 as integers

NO_EXTENSION = "this op has no part in the compiled extension"
_TRANSFORMED = "torch.func and forward-mode derivatives know plain torch alone"

_TRITON_INSTALLED = importlib.util.find_spec("triton") is not None

_asked: ContextVar[str | None] = ContextVar("xclip_fast.ops.backend", default=None)
# torch.compile sets no context variable, and reads none before PyTorch 2.14: there it sees what belongs to the thread
_traced = threading.local()
_COMPILE_READS_CONTEXT = torch.__version__ >= "2.14"
_refusals: dict[str, Callable[..., str | None]] = {}
_extension_refusals: dict[str, Callable[..., str | None]] = {}


@contextmanager
def backend(name: str) -> Iterator[None]:
    """Run every op inside the context on one backend.

    It holds for the calls of this thread, or of this asyncio task. A thread started inside starts without it, as with
    every context variable, unless it runs in ``contextvars.copy_context()``; so do the threads in which autograd
    recomputes checkpointed activations on a GPU.

    Args:
        name: "reference" (a few plain lines), "torch" (the fused formulation, any device), "triton" (the kernels) or
            "extension" (compiled C++ and CUDA, which serves ``patch_embed``, and ``frame_attention`` on some CPUs).

    Raises:
        ValueError: there is no such backend.
    """
    _check_name(name)
    before = _entered()
    _enter(name)
    try:
        yield
    finally:
        _enter(before)


def _entered() -> str | None:
    return getattr(_traced, "name", None) if torch.compiler.is_dynamo_compiling() else _asked.get()


def _enter(name: str | None) -> None:
    tracing = torch.compiler.is_dynamo_compiling()
    if not tracing:
        _asked.set(name)
    if tracing or not _COMPILE_READS_CONTEXT:
        _traced.name = name


def choose(
    op: str,
    asked: str | None,
    *tensors: Tensor | None,
    refusal: str | None = None,
    extension: str | None = NO_EXTENSION,
    extension_wins: bool = True,
) -> str:
    """The backend that serves a call.

    Args:
        op: name of the op, for the message.
        asked: the caller's ``backend`` argument.
        tensors: all tensors of the call.
        refusal: why the kernels cannot serve this call's sizes, or nothing.
        extension: why the compiled extension cannot serve this call, or nothing.
        extension_wins: whether it is the fastest where it can, and so the automatic choice.

    Raises:
        ValueError: there is no such backend, or "triton" or "extension" was asked for and cannot serve this call.
    """
    name = asked or _entered() or (_asked.get() if _COMPILE_READS_CONTEXT else None)
    if name in ("reference", "torch"):
        return name
    if name is None and is_transformed():
        # each of its lines has every derivative, which not even PyTorch's own attention has
        return "reference"
    if name is None:
        on_gpu = any(tensor is not None and tensor.device.type == "cuda" for tensor in tensors)
        tuned = tuned_backend(op, tensors) if on_gpu else None
        if tuned == "torch" or (tuned == "triton" and (refusal or kernel_refusal(*tensors)) is None):
            return tuned
        if extension is None and extension_wins:
            return "extension"
    reason = refusal or kernel_refusal(*tensors)
    if name == "extension":
        reason = _TRANSFORMED if is_transformed() else extension
    if name is None:
        return "triton" if on_gpu and reason is None else "torch"
    _check_name(name)
    if reason is not None:
        raise ValueError(f"{op}: the {name} backend was asked for, but {reason}; use backend='torch'")
    return name


def kernel_refusal(*tensors: Tensor | None) -> str | None:
    """Why the Triton kernels cannot take these tensors, or nothing; meta tensors are taken, to count launches."""
    if is_transformed():
        return _TRANSFORMED
    present = [tensor for tensor in tensors if tensor is not None]
    for tensor in present:
        if tensor.is_floating_point() and tensor.dtype not in KERNEL_DTYPES:
            return f"it takes float16, bfloat16 and float32, found {tensor.dtype}"
    places = {tensor.device for tensor in present}
    if len(places) > 1:
        return f"the tensors are on several devices: {', '.join(sorted(map(str, places)))}"
    kind = present[0].device.type
    if kind == "meta":
        return None
    if not _TRITON_INSTALLED:
        return "triton is not installed"
    if kind == "cpu" and interpreting():
        if reason := interpreter_refusal():
            return reason
        if any(tensor.is_floating_point() and tensor.dtype not in INTERPRETED_DTYPES for tensor in present):
            return "Triton's interpreter computes bfloat16 wrongly"
        return None
    if kind != "cuda":
        return f"the tensors are on {kind}, and Triton needs a CUDA GPU (TRITON_INTERPRET=1 emulates one, slowly)"
    return (
        None
        if torch.cuda.get_device_capability(present[0].device) >= (8, 0)
        else "it needs compute capability 8.0 or newer"
    )


def is_transformed() -> bool:
    """Whether a transform of ``torch.func`` or a forward-mode derivative is under way, which no kernel knows."""
    return torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0


def interpreting() -> bool:
    """Whether Triton kernels run in its interpreter, on the CPU."""
    return os.environ.get("TRITON_INTERPRET", "0") == "1"


def interpreter_refusal() -> str | None:
    """Why the interpreter of the Triton that is installed fails with the NumPy that is, or nothing.

    Triton 3.6 takes an array of one number for a number, which NumPy 2.4 refuses.
    """
    if not _TRITON_INSTALLED:
        return None
    import numpy
    import triton

    if _minor(triton.__version__) >= (3, 7) or _minor(numpy.__version__) < (2, 4):
        return None
    found = f"triton {triton.__version__} fails with numpy {numpy.__version__}"
    return f"the interpreter of {found}: pip install 'numpy<2.4', or a newer triton"


def _minor(version: str) -> tuple[int, int]:
    major, minor = version.split(".")[:2]
    return int(major), int(minor)


def runs_kernels(tensor: Tensor) -> bool:
    """Whether a registered op called directly on this tensor executes Triton (else the torch formulation)."""
    return kernel_refusal(tensor) is None and tensor.device.type != "meta"


def explains(op: str, *, extension: bool = False) -> Callable[[Callable[..., str | None]], Callable[..., str | None]]:
    """Register the function that tells why the kernels, or the extension, cannot serve a call with these arguments."""

    def register(function: Callable[..., str | None]) -> Callable[..., str | None]:
        (_extension_refusals if extension else _refusals)[op] = function
        return function

    return register


def explain(op: str, *args: object, **kwargs: object) -> dict[str, str | None]:
    """Why each backend can or cannot serve a call of an op.

    Args:
        op: name of the op, as in ``xclip_fast.ops``.
        args, kwargs: the arguments the op would be called with.

    Returns:
        Backend name to the reason it cannot serve the call, or None where it can.

    Raises:
        ValueError: there is no such op.
    """
    if op not in _refusals:
        raise ValueError(f"unknown op {op!r}: choose one of {', '.join(sorted(_refusals))}")
    compiled = _extension_refusals.get(op)
    return {
        "reference": None,
        "torch": None,
        "triton": _refusals[op](*args, **kwargs),
        "extension": compiled(*args, **kwargs) if compiled else NO_EXTENSION,
    }


def _check_name(name: str) -> None:
    if name not in BACKENDS:
        raise ValueError(f"unknown backend {name!r}: choose one of {', '.join(BACKENDS)}")
