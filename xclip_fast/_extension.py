"""The one loader of the compiled extension: it never builds, downloads, locks or raises, and says why not."""

from __future__ import annotations

import ctypes
import struct
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import NamedTuple

import torch

from xclip_fast.errors import one_line

LIBRARY = Path(__file__).with_name("_native.so")
INTERFACE = 6  # raised with every change of what the library's operators take, there and here
REBUILD = "build it again with `make ext`"

Question = Callable[[], "str | None"]


def _constant(question: Question) -> Question:
    """What ``torch.compiler.assume_constant_result`` does, without importing the compiler, which takes seconds."""
    question._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return question


@_constant
def refusal() -> str | None:
    """Returns the reason why the extension cannot be used, or None; the first call loads it."""
    return _load(LIBRARY).refusal


@_constant
def cuda_refusal() -> str | None:
    """Returns the reason why the CUDA part of the extension cannot be used, or None."""
    library = _load(LIBRARY)
    without = None if library.architectures else "the extension was built without CUDA: build it where nvcc is"
    return library.refusal or without


def architectures() -> list[str]:
    """The GPU architectures the extension holds code for; none where it is missing or built for the CPU alone."""
    return list(_load(LIBRARY).architectures)


@_constant
def attention_refusal() -> str | None:
    """Returns the reason why the attention of the extension cannot be used on this processor, or None."""
    library = _load(LIBRARY)
    return library.refusal or (None if library.attends else "this processor has no AVX512-BF16")


@_constant
def linear_refusal() -> str | None:
    """Returns the reason why the GEMM of the extension cannot be used on this processor, or None."""
    library = _load(LIBRARY)
    return library.refusal or (None if library.multiplies else "this processor has no AVX2 with FMA")


class _Library(NamedTuple):
    """What a library was found to be: why it cannot be used, if so, and its abilities."""

    refusal: str | None = None
    architectures: tuple[str, ...] = ()
    attends: bool = False
    multiplies: bool = False


@cache
def _load(path: Path) -> _Library:
    if not path.exists():
        return _Library("the extension is not built: `make ext` builds it")
    damage = _damage(path)
    if damage:
        return _Library(f"the extension {path.name} is damaged ({damage}): {REBUILD}")
    try:
        # the operators of the library register themselves with torch as it is loaded
        library = ctypes.CDLL(str(path))
        library.xclip_fast_architectures.restype = ctypes.c_char_p
        interface, built_for = library.xclip_fast_interface(), library.xclip_fast_architectures().decode()
    except (OSError, AttributeError) as error:
        return _Library(f"the extension does not load with torch {torch.__version__} ({one_line(error)}): {REBUILD}")
    if interface != INTERFACE:
        return _Library(f"the extension has interface {interface}, this xclip_fast needs {INTERFACE}: {REBUILD}")
    for ability in (library.xclip_fast_attends, library.xclip_fast_multiplies):
        ability.restype = ctypes.c_bool
    abilities = library.xclip_fast_attends(), library.xclip_fast_multiplies()
    return _Library(None, tuple(built_for.split()), *abilities)


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
