"""The one loader of the compiled extension: it never builds, downloads, locks or raises, and says why not."""

from __future__ import annotations

import ctypes
import struct
from collections.abc import Callable
from functools import cache
from pathlib import Path

import torch

from xclip_fast.errors import one_line

LIBRARY = Path(__file__).with_name("_native.so")
INTERFACE = 2  # raised with every change of what the library's operators take, there and here
REBUILD = "build it again with `make ext`"

Question = Callable[[], "str | None"]


def _constant(question: Question) -> Question:
    """What ``torch.compiler.assume_constant_result`` does, without importing the compiler, which takes seconds."""
    question._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return question


@_constant
def refusal() -> str | None:
    """Why the extension cannot be used, in one sentence, or nothing; the first call loads it."""
    return _load(LIBRARY)[0]


@_constant
def cuda_refusal() -> str | None:
    """Why the CUDA part of the extension cannot be used, or nothing."""
    reason, architectures = _load(LIBRARY)
    return reason or (None if architectures else "the extension was built without CUDA: build it where nvcc is")


def architectures() -> list[str]:
    """The GPU architectures the extension holds code for; none where it is missing or built for the CPU alone."""
    return _load(LIBRARY)[1]


@cache
def _load(path: Path) -> tuple[str | None, list[str]]:
    """The reason the library cannot be used, if any, and its GPU architectures."""
    if not path.exists():
        return "the extension is not built: `make ext` builds it", []
    damage = _damage(path)
    if damage:
        return f"the extension {path.name} is damaged ({damage}): {REBUILD}", []
    try:
        # the operators of the library register themselves with torch as it is loaded
        library = ctypes.CDLL(str(path))
        library.xclip_fast_architectures.restype = ctypes.c_char_p
        interface, built_for = library.xclip_fast_interface(), library.xclip_fast_architectures().decode()
    except (OSError, AttributeError) as error:
        return f"the extension does not load with torch {torch.__version__} ({one_line(error)}): {REBUILD}", []
    if interface != INTERFACE:
        return f"the extension has interface {interface}, this xclip_fast needs {INTERFACE}: {REBUILD}", []
    return None, built_for.split()


def _damage(path: Path) -> str | None:
    """What is wrong with the file; the dynamic linker would end the process over a file that was cut short."""
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            header = file.read(64)
    except OSError as error:
        return error.strerror or "it cannot be read"
    if len(header) < 64 or header[:5] != b"\x7fELF\x02":
        return "it is not a 64-bit ELF library"
    order = "<" if header[5] == 1 else ">"
    (sections,) = struct.unpack_from(f"{order}Q", header, 40)
    entry, count = struct.unpack_from(f"{order}HH", header, 58)
    # linkers write the table of sections last
    end = sections + entry * count
    return f"{end} bytes long when built, {size} now" if size < end else None
