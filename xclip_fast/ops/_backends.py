"""Which implementation of an op runs: the argument first, then the ``backend`` context, then the automatic choice."""

from __future__ import annotations

import importlib.util
import os
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from inspect import Signature, signature
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from xclip_fast.devices import compute_capability
from xclip_fast.tuning import tuned_backend

BACKENDS = ("reference", "torch", "triton", "extension")
KERNEL_DTYPES = (torch.float16, torch.bfloat16, torch.float32)
INTERPRETED_DTYPES = (torch.float16, torch.float32)  # Triton's interpreter keeps bfloat16 as integers

# numbers in the tokens of a batch below which a GPU waits for the host, and PyTorch's own operators are faster. On an
# H100 the kernels took as long as Hugging Face's operators between 2^23 and 2^24 in inference; in a training step they
# lost at 2^24.2 still, the most that was tried, and 2^25 is a guess
HOST_BOUND = 1 << 24
HOST_BOUND_WITH_GRADIENT = 1 << 25

NO_EXTENSION = "this op has no part in the compiled extension"
_TRANSFORMED = "torch.func and forward-mode derivatives know plain torch alone"

_TRITON_INSTALLED = importlib.util.find_spec("triton") is not None

_asked: ContextVar[str | None] = ContextVar("xclip_fast.ops.backend", default=None)
# torch.compile sets no context variable, and reads none before PyTorch 2.14: there it sees what belongs to the thread
_traced = threading.local()
_COMPILE_READS_CONTEXT = torch.__version__ >= "2.14"
_Refusal = Callable[..., str | None] | None
_explained: dict[str, tuple[Signature, _Refusal, _Refusal]] = {}


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

    Example:
        >>> import torch
        >>> from xclip_fast import ops
        >>> x, weight, bias = torch.randn(4, 64), torch.ones(64), torch.zeros(64)
        >>> with ops.backend("reference"):
        ...     normed, _ = ops.layer_norm(x, weight, bias)
        >>> torch.allclose(normed, ops.layer_norm(x, weight, bias)[0], atol=1e-5)
        True
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
        refusal: the reason why the kernels cannot serve this call's sizes, or None.
        extension: the reason why the compiled extension cannot serve this call, or None.
        extension_wins: whether it is the fastest where it can, and so the automatic choice.

    Raises:
        ValueError: there is no such backend, or "triton" or "extension" was asked for and cannot serve this call.
    """
    name = asked or asked_backend()
    if name in ("reference", "torch"):
        return name
    transformed = is_transformed()
    if name is not None:
        _check_name(name)
        reason = extension if name == "extension" else refusal or _tensor_refusal(tensors)
        reason = _TRANSFORMED if transformed else reason
        if reason is not None:
            raise ValueError(f"{op}: the {name} backend was asked for, but {reason}; use backend='torch'")
        return name
    if transformed:
        # each of its lines has every derivative, which not even PyTorch's own attention has
        return "reference"
    on_gpu = tensors[0] is not None and tensors[0].is_cuda
    tuned = tuned_backend(op, tensors) if on_gpu else None
    if tuned == "torch":
        return tuned
    # asked only where the answer is used
    served = on_gpu and (tuned == "triton" or extension is not None or not extension_wins)
    if served and (refusal or _tensor_refusal(tensors)) is None:
        return "triton"
    if extension is None and extension_wins:
        return "extension"
    return "torch"


def host_bound(tokens: Tensor) -> bool:
    """Whether a GPU is faster with a block of these tokens (..., D) than the host with the calls of its kernels.

    Then plain modules of PyTorch's own operators cost the least, and fused ones gain nothing. Compiled, a block costs
    no calls. Captured it costs none either, but what is captured has to be what ran before: enter
    ``backend("triton")`` around both, for who asks for a backend gets it.
    """
    if not tokens.is_cuda or torch.compiler.is_compiling():
        return False
    limit = HOST_BOUND_WITH_GRADIENT if torch.is_grad_enabled() else HOST_BOUND
    return tokens.numel() < limit and asked_backend() is None


def asked_backend() -> str | None:
    """The backend of the context around."""
    return _entered() or (_asked.get() if _COMPILE_READS_CONTEXT else None)


def kernel_refusal(*tensors: Tensor | None) -> str | None:
    """The reason why the Triton kernels cannot take these tensors, or None; meta tensors are taken, to be counted."""
    return _TRANSFORMED if is_transformed() else _tensor_refusal(tensors)


def _tensor_refusal(tensors: Sequence[Tensor | None]) -> str | None:
    if _on_one_gpu(tensors):
        return None
    present = [tensor for tensor in tensors if tensor is not None]
    first = present[0]
    for tensor in present:
        if tensor.dtype not in KERNEL_DTYPES and tensor.is_floating_point():
            return f"it takes float16, bfloat16 and float32, found {tensor.dtype}"
        if _is_negated(tensor):
            return "a negated view has another sign in memory: call .resolve_neg() on it"
    place = first.device
    if any(tensor.device != place for tensor in present):
        return f"the tensors are on several devices: {', '.join(sorted({str(tensor.device) for tensor in present}))}"
    if place.type == "meta":
        return None
    if not _TRITON_INSTALLED:
        return "triton is not installed"
    if place.type == "cpu" and interpreting():
        if reason := interpreter_refusal():
            return reason
        if any(tensor.is_floating_point() and tensor.dtype not in INTERPRETED_DTYPES for tensor in present):
            return "Triton's interpreter computes bfloat16 wrongly"
        return None
    if place.type != "cuda":
        return f"the tensors are on {place.type}, and Triton needs a CUDA GPU (TRITON_INTERPRET=1 emulates one, slowly)"
    return None if compute_capability(first.get_device()) >= (8, 0) else "it needs compute capability 8.0 or newer"


def _is_negated(tensor: Tensor) -> bool:
    # a compiler cannot ask, and its graphs resolve such a view
    return not torch.compiler.is_compiling() and tensor.is_neg()


def _on_one_gpu(tensors: Sequence[Tensor | None]) -> bool:
    """Whether that is all there is to ask: the usual call, which every op makes."""
    place = -1
    for tensor in tensors:
        if tensor is None:
            continue
        if not tensor.is_cuda or tensor.dtype not in KERNEL_DTYPES or place not in (-1, tensor.get_device()):
            return False
        if _is_negated(tensor):
            return False
        place = tensor.get_device()
    return place >= 0 and _TRITON_INSTALLED and compute_capability(place) >= (8, 0)


def is_transformed() -> bool:
    """Whether a transform of ``torch.func`` or a forward-mode derivative is under way, which no kernel knows."""
    return torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0


def interpreting() -> bool:
    """Whether Triton kernels run in its interpreter, on the CPU."""
    return os.environ.get("TRITON_INTERPRET", "0") == "1"


def interpreter_refusal() -> str | None:
    """The reason why the interpreter of the installed Triton fails with the installed NumPy, or None.

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
    """Whether a registered op called directly on this tensor executes Triton, or falls back to plain PyTorch."""
    if tensor.is_cuda:
        known = tensor.dtype in KERNEL_DTYPES or not tensor.is_floating_point()
        return known and _TRITON_INSTALLED and compute_capability(tensor.get_device()) >= (8, 0)
    return not tensor.is_meta and kernel_refusal(tensor) is None


def explains(
    op: Callable[..., Any],
    refusal: Callable[..., str | None] | None = None,
    *,
    extension: Callable[..., str | None] | None = None,
) -> None:
    """Let ``explain`` know a public op.

    Args:
        op: the public function.
        refusal: the reason why its kernels cannot serve a call's sizes, or None; its parameters are some of the op's.
        extension: the same of the compiled extension.
    """
    _explained[op.__name__] = signature(op), refusal, extension


def explain(op: str, *args: object, **kwargs: object) -> dict[str, str | None]:
    """The reason why each backend cannot serve a call of an op, or None where it can.

    Args:
        op: name of the op, as in ``xclip_fast.ops``.
        args, kwargs: the arguments the op would be called with.

    Returns:
        Backend name to reason or None.

    Raises:
        ValueError: there is no such op.
        TypeError: the op does not take these arguments.

    Example:
        >>> x, vector = torch.randn(4, 8, dtype=torch.float64), torch.ones(8, dtype=torch.float64)
        >>> explain("layer_norm", x, vector, vector)["triton"]
        'it takes float16, bfloat16 and float32, found torch.float64'
    """
    if op not in _explained:
        raise ValueError(f"unknown op {op!r}: choose one of {', '.join(sorted(_explained))}")
    known, refusal, extension = _explained[op]
    bound = known.bind(*args, **kwargs)
    bound.apply_defaults()
    found = bound.arguments

    def ask(function: Callable[..., str | None]) -> str | None:
        return function(**{name: found[name] for name in signature(function).parameters})

    flat = [one for value in found.values() for one in (value if isinstance(value, tuple) else (value,))]
    tensors = [value for value in flat if isinstance(value, Tensor)]
    return {
        "reference": None,
        "torch": None,
        "triton": (refusal and ask(refusal)) or kernel_refusal(*tensors),
        "extension": ask(extension) if extension else NO_EXTENSION,
    }


def _check_name(name: str) -> None:
    if name not in BACKENDS:
        raise ValueError(f"unknown backend {name!r}: choose one of {', '.join(BACKENDS)}")
