"""A CUDA driver, runtime and cuBLAS that need no GPU, to rehearse on: everything happens but the computing.

``standin.c`` takes the place of NVIDIA's libraries in processes that are started with ``environment()``. There torch
finds an H100: memory is handed out and counted, launches are checked, streams and captures are kept by CUDA's rules,
Triton compiles for sm_90 and launches through its own binder and C stub. What is read back is zeros.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import re
import subprocess
import sys
import sysconfig
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
SOURCE = Path(__file__).with_suffix(".c")
NAME = "libcuda.so.1"  # Triton looks for the driver under this name, and torch asks it for the rest
# those that torch calls of libraries that are stood in for; each other function of theirs is a stub
USERS = ("c10_cuda", "torch_python", "torch_cuda", "torch_cuda_linalg")
STOOD_IN = ("@libcudart.", "@libcublas.", "@libcublasLt.")
DRIVER = re.compile(r"\b(cu[A-Z]\w*)\(")  # in the source of Triton's driver
NOT_SUPPORTED = 801  # what the runtime returns for a function that it does not have


def build(folder: Path = ROOT / "build" / "standin") -> Path:
    """The library for this Python's torch, compiled where it is not there yet.

    Raises:
        OSError: a compiler, or headers and libraries of CUDA, are missing.
    """
    packages = Path(sysconfig.get_paths()["purelib"])
    used = [packages / "torch" / "lib" / f"lib{name}.so" for name in USERS]
    if missing := [str(path) for path in used if not path.exists()]:
        raise OSError(f"a torch with CUDA is needed to rehearse, found none of {', '.join(missing)}")
    # those of the runtime that torch was built for, then the rest, which Triton brings
    include = [*packages.glob("nvidia/cu*/include"), packages / "triton" / "backends" / "nvidia" / "include"]
    stamp = hashlib.sha256(SOURCE.read_bytes() + str([(str(path), path.stat().st_size) for path in used]).encode())
    target = folder / stamp.hexdigest()[:16] / NAME
    if target.exists():
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    options = ["-O1", "-fPIC", "-shared", "-w", f"-Wl,-soname,{NAME}", *(f"-I{path}" for path in include)]
    unfinished = target.with_suffix(f".{os.getpid()}")
    _run("cc", *options, str(SOURCE), "-o", str(unfinished), "-ldl", "-lpthread")
    there = {line.split()[-1] for line in _run("nm", "-D", "--defined-only", str(unfinished)).splitlines()}
    called = [line.split()[-1] for path in used for line in _run("nm", "-D", "-u", str(path)).splitlines()]
    wanted = {name.split("@")[0] for name in called if any(at in name for at in STOOD_IN)}
    for part in ("driver.c", "driver.py"):
        wanted |= set(DRIVER.findall((packages / "triton" / "backends" / "nvidia" / part).read_text()))
    lacking = sorted(wanted - there)
    stubs = [f"int {name}(void) {{ return {0 if name.startswith('cublas') else NOT_SUPPORTED}; }}" for name in lacking]
    rest = target.with_name(f"stubs.{os.getpid()}.c")
    rest.write_text("\n".join(stubs) + "\n")
    _run("cc", *options, str(SOURCE), str(rest), "-o", str(unfinished), "-ldl", "-lpthread")
    rest.unlink()
    unfinished.replace(target)
    return target


def environment(library: Path, memory: int | None = None) -> dict[str, str]:
    """What a process is started with to run on the stand-in.

    Args:
        library: from ``build``.
        memory: bytes of its GPU; 80 GB without.
    """
    found = {"LD_PRELOAD": str(library), "TRITON_LIBCUDA_PATH": str(library.parent)}
    return found | ({} if memory is None else {"STANDIN_MEMORY": str(memory)})


def in_force() -> bool:
    """Whether this process runs on the stand-in."""
    return hasattr(ctypes.CDLL(None), "standin_counts")


def enter() -> None:
    """Turn off what is not stood in for: cuDNN, and the host code of the extension, which has a runtime of its own."""
    import torch

    from xclip_fast import _extension

    torch.backends.cudnn.enabled = False
    torch.backends.cuda.enable_cudnn_sdp(False)
    if _extension.cuda_refusal() is None:
        _library.append(torch.library.Library("xclip_fast_native", "IMPL"))
        _library[0].impl("patch_rows_cuda", _patch_rows, "CUDA", allow_override=True)


_library: list[Any] = []


def _patch_rows(frames: Any, patch: int, stream: int) -> Any:
    """What the operator of the extension gives back, after the one launch that it makes on the stream it is given."""
    import torch

    patches = len(frames) * (frames.shape[1] // patch) * (frames.shape[2] // patch)
    rows = frames.new_empty(patches, -(-3 * patch**2 // 8) * 8, dtype=torch.float16)
    error = ctypes.CDLL(None).standin_launch(ctypes.c_void_p(stream))
    if error:
        raise RuntimeError(f"the stand-in refused a launch of the extension with {error}")
    return rows


COUNTED = (
    "triton_launches",
    "other_launches",
    "gemms",
    "modules",
    "captures",
    "replays",
    "allocations",
    "refused",
    "strays",
    "captured",
)


def counts() -> dict[str, int]:
    """What this process has done so far; ``captured`` is the nodes of the last graph."""
    found = (ctypes.c_long * len(COUNTED))()
    ctypes.CDLL(None).standin_counts(found)
    return dict(zip(COUNTED, found, strict=True))


def _run(*command: str) -> str:
    try:
        done = subprocess.run(command, capture_output=True, text=True)
    except FileNotFoundError:
        raise OSError(f"{command[0]} is needed to rehearse, and is not installed") from None
    if done.returncode:
        raise OSError(f"{command[0]} failed: {done.stderr.strip().splitlines()[-1:]}")
    return done.stdout


if __name__ == "__main__":
    # for a shell: env $(python -m benchmarks.gpu.standin) python ...
    try:
        print(" ".join(f"{name}={value}" for name, value in environment(build()).items()))
    except OSError as error:
        sys.exit(f"error: {error}")
