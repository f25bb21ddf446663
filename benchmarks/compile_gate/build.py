"""One kernel compiled for one architecture, and what the machine code says about it."""

from __future__ import annotations

import hashlib
import re
import subprocess
import tempfile
from collections import Counter
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.runtime.driver import driver

from benchmarks.compile_gate.capture import Launch
from xclip_fast.kernels.frame_attention_head import _frame_attention_head_kernel
from xclip_fast.kernels.linear_quick_gelu import _linear_quick_gelu_persistent_fwd_kernel

KILOBYTE = 1024
REGISTERS = 65536
MAX_WARPS = 64
MAX_BLOCKS = 32
TENSOR_MEMORY_COLUMNS = 512
RESERVED_SHARED = KILOBYTE  # of each block, by the system
SHARED = {80: 164 * KILOBYTE, 90: 228 * KILOBYTE, 100: 228 * KILOBYTE}  # of a multiprocessor
# a warpgroup's matrix instruction takes 64 rows or more
TALL = 64
TENSOR_CORES = {80: "HMMA", 90: "HGMMA", 100: "UTCHMMA"}
# the instructions that matter: tensor cores, asynchronous copies, bulk copies either way, fast exponentials
FEATURES = ("HMMA", "HGMMA", "UTCHMMA", "LDGSTS", "UTMALDG", "UTMASTG", "MUFU.EX2")
# kernels that other architectures leave to another kernel
TAKEN_ON = {
    # matrix instructions that read keys where they are kept
    _frame_attention_head_kernel: (90, 100),
    # measured on Hopper alone; four steps of operands need its shared memory
    _linear_quick_gelu_persistent_fwd_kernel: (90,),
}

_INSTRUCTION = re.compile(r"^\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_.]*)", re.MULTILINE)
_PRODUCT = re.compile(r"tt\.dot\b.*-> tensor<(\d+)x\d+x")


@dataclass(frozen=True)
class Build:
    """Machine code of one kernel, one shape and one architecture.

    Attributes:
        kernel, shape, arch: what was built, and a shape that needs it; 90 means sm_90.
        variant: its constants in words, and a digest of all that was specialised: the same whatever shape asked first.
        registers: of a thread.
        stack: bytes of a thread, where spilled registers lie.
        spills: loads and stores of local memory in the code.
        shared: bytes of shared memory of a program.
        blocks: estimate of the programs that one multiprocessor runs at once; 0 where not even one fits.
        instructions: names in the machine code, with all suffixes, and how often each stands there.
        rows: of each dot in the source.
        exponentials: whether the source raises to a power.
    """

    kernel: str
    shape: str
    arch: int
    variant: str
    registers: int
    stack: int
    spills: int
    shared: int
    blocks: int
    instructions: dict[str, int]
    rows: tuple[int, ...]
    exponentials: bool

    @property
    def size(self) -> int:
        """Instructions in all."""
        return sum(self.instructions.values())

    @property
    def wide(self) -> int:
        """Percent of the accesses to global memory that move 128 bits a thread."""
        moves = {name: count for name, count in self.instructions.items() if _stem(name) in ("LDG", "STG", "LDGSTS")}
        wide = sum(count for name, count in moves.items() if "128" in name.split("."))
        return 100 * wide // max(1, sum(moves.values()))

    @cached_property
    def features(self) -> tuple[str, ...]:
        """The instructions that matter and are there."""
        present = {_stem(name) for name in self.instructions}
        return tuple(name for name in FEATURES if name in present)


def _stem(instruction: str) -> str:
    """Its name without suffixes, but with the function that MUFU computes."""
    parts = instruction.split(".")
    return ".".join(parts[:2]) if parts[0] == "MUFU" else parts[0]


def architectures(launch: Launch) -> tuple[int, ...]:
    """Those that make a launch."""
    if launch.kernel in TAKEN_ON:
        return TAKEN_ON[launch.kernel]
    tensors = [value for value in launch.arguments.values() if isinstance(value, torch.Tensor)]
    # no instruction before sm_89 writes e4m3
    oldest = 89 if any(tensor.dtype == torch.float8_e4m3fn for tensor in tensors) else min(SHARED)
    return tuple(arch for arch in SHARED if arch >= oldest)


class _Compiler:
    """Takes the place of Triton's driver, which asks a GPU what it is."""

    def __init__(self, arch: int) -> None:
        self.arch = arch

    def get_current_device(self) -> int:
        """Triton keeps what it compiled by device: each architecture is one."""
        return self.arch

    def get_current_stream(self, device: int) -> int:
        """Nothing is launched on it."""
        return 0

    def get_current_target(self) -> GPUTarget:
        """What is compiled for."""
        return GPUTarget("cuda", self.arch, 32)


def compile_launch(launch: Launch, arch: int) -> Any:
    """Compile exactly what this launch would build: Triton itself specialises the arguments.

    Launches that build the same give the same object.
    """
    driver.set_active(_Compiler(arch))
    return launch.kernel.run(grid=launch.grid, warmup=True, **launch.arguments)


def measure(compiled: Any, kernel: str, shape: str, arch: int) -> Build:
    """Read the machine code of a compiled kernel."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        command = [knobs.nvidia.cuobjdump.path, "-sass", "-res-usage", file.name]
        listing = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    usage = re.search(r"REG:(\d+) STACK:(\d+)", listing)
    assert usage is not None, listing
    registers, stack = map(int, usage.groups())
    instructions = dict(Counter(_INSTRUCTION.findall(listing)))
    metadata = compiled.metadata
    source = compiled.asm["ttir"]
    return Build(
        kernel=kernel,
        shape=shape,
        arch=arch,
        variant=_variant(compiled),
        registers=registers,
        stack=stack,
        spills=sum(count for name, count in instructions.items() if _stem(name) in ("LDL", "STL")),
        shared=metadata.shared,
        blocks=blocks(arch, registers, metadata.num_warps, metadata.shared, getattr(metadata, "tmem_size", None) or 0),
        instructions=instructions,
        rows=tuple(map(int, _PRODUCT.findall(source))),
        exponentials="math.exp2" in source,
    )


def _variant(compiled: Any) -> str:
    source, metadata = compiled.src, compiled.metadata
    names = list(source.signature)
    constants = {names[index]: value for (index, *_), value in source.constants.items()}
    words = [
        name if value is True else f"{name}={value}"
        for name, value in constants.items()
        if name.isupper() and value not in (False, None)
    ]
    aligned = sorted((index, str(facts)) for index, facts in source.attrs.items() if facts)
    launch = metadata.num_warps, metadata.num_stages
    digest = hashlib.sha256(repr((source.signature, constants, aligned, launch)).encode()).hexdigest()
    return f"{' '.join(words)}, {metadata.num_warps} warps, {digest[:8]}"


def blocks(arch: int, registers: int, warps: int, shared: int, columns: int = 0) -> int:
    """How many programs a multiprocessor holds, by registers, warps, shared memory and tensor memory."""
    # registers are given to a warp by 256, and the four schedulers have a quarter of the warps each
    warp = -(-registers * 32 // 256) * 256
    limits = [REGISTERS // warp // 4 * 4 // warps, MAX_WARPS // warps, MAX_BLOCKS]
    limits.append(SHARED[arch] // (-(-shared // 128) * 128 + RESERVED_SHARED))
    if columns:
        limits.append(TENSOR_MEMORY_COLUMNS // columns)
    return min(limits)
