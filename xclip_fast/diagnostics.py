"""What this machine offers and why something is missing: the facts behind ``xclip-fast info``.

Every fact is looked up in a child process. A library that hangs or crashes on import is then one sentence of the report
instead of the end of it.
"""

from __future__ import annotations

import json
import os
import platform
import signal
import subprocess
import sys
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import xclip_fast

DEADLINE = 60.0  # seconds for one look-up: importing torch from a cold network disk can take half of that

VIDEO = ("pyav", "torchcodec", "decord")

# name -> distribution, what it is for
LIBRARIES = {
    "triton": ("triton", "fused GPU kernels"),
    "pyav": ("av", "video decoding"),
    "torchcodec": ("torchcodec", "video decoding"),
    "decord": ("decord", "video decoding"),
    "open_clip": ("open_clip_torch", "CLIP weights, tokenizer"),
    "transformers": ("transformers", "Hugging Face models"),
    "pyarrow": ("pyarrow", "Parquet output"),
}

_CHILD = (
    "import json, sys; sys.path[:] = json.loads(sys.argv[1]); "
    "from xclip_fast.diagnostics import answer; answer(sys.argv[2:])"
)


def report() -> dict[str, Any]:
    """Versions, devices and backends, JSON-ready; it never raises because something is broken.

    ``features`` are those of the processor, ``native`` the half precisions it multiplies in; the engine multiplies
    others in float32. ``torch`` and ``triton`` are versions or None; ``cuda`` is the version of CUDA if torch finds a
    GPU, else None; ``extension`` and each entry of ``backends`` say whether they can be used and, if not, the reason.
    """
    facts = _ask(["torch", "extension", *LIBRARIES])
    torch, triton, extension = facts["torch"], facts["triton"], facts["extension"]
    backends = {name: {"purpose": purpose, **facts[name]} for name, (_, purpose) in LIBRARIES.items()}
    if triton["available"] and "cuda" not in torch:
        backends["triton"] |= _missing("no GPU for it here, torch does the work", triton["version"])
    backends["extension"] = {
        "purpose": "patch embedding in C++ and CUDA, products, attention and int8 on the CPU",
        **extension,
    }
    return {
        "version": xclip_fast.__version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "torch": torch["version"],
        "torch_reason": torch["reason"],
        "triton": triton["version"] if triton["available"] else None,
        "cuda": torch.get("cuda"),
        "cuda_reason": torch.get("cuda_reason"),
        "devices": torch.get("devices", []),
        "features": torch.get("features", []),
        "native": torch.get("native", []),
        "extension": {"loaded": extension["available"], "reason": extension["reason"]},
        "backends": backends,
    }


def answer(names: list[str]) -> None:
    """The child's part: look each name up and write one JSON line for it."""
    with os.fdopen(os.dup(1), "w") as pipe:
        # what a library prints while it is imported must not mix with the answers
        os.dup2(2, 1)
        for name in names:
            print(json.dumps(_look_up(name)), file=pipe, flush=True)


def _look_up(name: str) -> dict[str, Any]:
    try:
        if name == "torch":
            return _torch()
        if name == "extension":
            return _extension()
        if name in VIDEO:
            from xclip_fast.video.backends import BACKENDS

            reason = BACKENDS[name].unavailable()
            return {"available": reason is None, "version": _version(name), "reason": reason}
        import_module(name)
        return {"available": True, "version": _version(name), "reason": None}
    except Exception as error:
        # whatever a broken library raises is the answer
        return _missing(_reason(name, error), _version(name))


def _torch() -> dict[str, Any]:
    import torch

    found: dict[str, Any] = {"available": True, "version": torch.__version__, "reason": None}
    from xclip_fast import processor
    from xclip_fast.devices import cuda_refusal

    kernels = torch.backends.cpu.get_cpu_capability()
    cpu = f"{processor.describe()}; {torch.get_num_threads()} threads, PyTorch's kernels for {kernels}"
    found["devices"] = [{"name": "cpu", "description": cpu}]
    found["features"] = list(processor.features())
    found["native"] = [name for name in ("bfloat16", "float16") if processor.multiplies(getattr(torch, name))]
    if reason := cuda_refusal():
        found["cuda_reason"] = reason
        return found
    found["cuda"] = torch.version.cuda
    for index in range(torch.cuda.device_count()):
        device = torch.cuda.get_device_properties(index)
        memory = f"{device.total_memory / 2**30:.0f} GiB"
        description = f"{device.name}, {memory}, compute capability {device.major}.{device.minor}"
        found["devices"].append({"name": f"cuda:{index}", "description": description})
    return found


def _extension() -> dict[str, Any]:
    from xclip_fast import _extension as extension

    reason = extension.refusal()
    if reason is not None:
        return _missing(reason)
    abilities = [] if extension.linear_refusal() else ["float32 products"]
    abilities += [] if extension.attention_refusal() else ["bfloat16 attention"]
    return {"available": True, "version": ", ".join(["cpu", *abilities, *extension.architectures()]), "reason": None}


def _ask(names: list[str]) -> dict[str, dict[str, Any]]:
    facts: dict[str, dict[str, Any]] = {}
    while left := names[len(facts) :]:
        lines, end = _run_child(left)
        facts.update(zip(left, map(json.loads, lines), strict=False))
        if len(facts) < len(names):
            culprit = names[len(facts)]
            facts[culprit] = _missing(end, _version(culprit))
    return facts


def _run_child(names: list[str]) -> tuple[list[bytes], str]:
    """The child's whole lines, and how it ended should one be missing."""
    command = [sys.executable, "-c", _CHILD, json.dumps(sys.path), *names]
    try:
        done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, timeout=DEADLINE)
    except subprocess.TimeoutExpired as late:
        output, end = late.stdout or b"", f"no answer within {DEADLINE:.0f} s"
    except OSError as error:
        output, end = b"", f"cannot start {sys.executable!r} to look: {error.strerror}"
    else:
        output, end = done.stdout, f"importing it ended the process with code {done.returncode}"
        if done.returncode < 0:
            end = f"importing it crashed with signal {-done.returncode} ({signal.strsignal(-done.returncode)})"
    return [line for line in output.splitlines(keepends=True) if line.endswith(b"\n")], end


def _missing(reason: str, found_version: str | None = None) -> dict[str, Any]:
    return {"available": False, "version": found_version, "reason": reason}


def _reason(name: str, error: Exception) -> str:
    if isinstance(error, ModuleNotFoundError) and error.name == name:
        return "not installed"
    first_line = next(iter(str(error).strip().splitlines()), "")
    return f"{type(error).__name__}: {first_line}"[:200]


def _version(name: str) -> str | None:
    try:
        return version(LIBRARIES[name][0] if name in LIBRARIES else name)
    except PackageNotFoundError:
        return None
