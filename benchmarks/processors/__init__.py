"""Other processors than the one at hand: programs that see only some of its features, on Linux and x86."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from shutil import which
from tempfile import TemporaryDirectory

from xclip_fast.errors import InputError

_LIBRARY = Path(__file__).with_name("mask.c")
_WIDE = "avx512,amx"
# what each hides of a processor that has everything; "intel" is the vendor, by which MKL and oneDNN choose as well
MASKS: Mapping[str, str] = {
    "avx2": f"{_WIDE},avx_vnni",
    "avx2-amd": f"{_WIDE},avx_vnni,intel",
    "avx2-vnni": _WIDE,
    "avx512": "amx,avx_vnni,avx512_vnni,avx512_bf16,avx512_fp16",
    "avx512-vnni": "amx,avx_vnni,avx512_bf16,avx512_fp16",
    "avx512-bf16": "amx,avx_vnni,avx512_fp16",
}


def can_mask() -> bool:
    """Whether the processor and the kernel let CPUID fault."""
    if sys.platform != "linux" or platform.machine() != "x86_64":
        return False
    # the system call that would tell also takes a mask away from this process
    return "cpuid_fault" in Path("/proc/cpuinfo").read_text().split()


def run(mask: str, command: list[str]) -> int:
    """Run a command, and what it starts, on a processor that seems to lack what the mask hides; its exit code.

    Args:
        mask: of ``MASKS``.
        command: a program and its arguments. The mask reaches a child that is given these environment variables, and
            is not linked statically.

    Raises:
        InputError: there is no such mask, no compiler, or this machine cannot mask.
    """
    if mask not in MASKS:
        raise InputError(f"unknown mask {mask!r}: choose one of {', '.join(MASKS)}")
    if not can_mask():
        raise InputError("no program can be masked here: it needs Linux on an x86 processor that lets CPUID fault")
    compiler = which("cc")
    if compiler is None:
        raise InputError("no C compiler was found: install gcc or clang")
    with TemporaryDirectory() as folder:
        library = Path(folder) / "mask.so"
        subprocess.run([compiler, "-O1", "-shared", "-fPIC", "-o", library, _LIBRARY, "-ldl"], check=True)
        preloaded = os.environ.get("LD_PRELOAD")
        masked = {
            "LD_PRELOAD": f"{library}:{preloaded}" if preloaded else str(library),
            "HIDDEN_CPU_FEATURES": MASKS[mask],
            # the address sanitizer would insist on being loaded first
            "ASAN_OPTIONS": f"{os.environ.get('ASAN_OPTIONS', '')}:verify_asan_link_order=0",
        }
        code = subprocess.run(command, env=os.environ | masked, check=False).returncode
    # as a shell tells a signal
    return code if code >= 0 else 128 - code
