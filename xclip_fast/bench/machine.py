"""The machine of a run: versions and hardware, free memory, GEMM and copy rates, GPU sensors."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from collections.abc import Callable
from datetime import datetime, timezone
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

import xclip_fast
from xclip_fast import processor
from xclip_fast.bench.timing import Reading, sampler
from xclip_fast.numerics import exact_float32

RIVALS = ("onnxruntime", "openvino", "nncf")
LIBRARIES = ("triton", "transformers", "open_clip_torch", "numpy", *RIVALS)


def facts(device: str) -> dict[str, Any]:
    """Machine, versions, commit, settings and date, JSON-ready; no user, host or path is in it."""
    found: dict[str, Any] = {
        "utc": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "commit": _commit(),
        "xclip_fast": xclip_fast.__version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "processor": _processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "capability": torch.backends.cpu.get_cpu_capability(),
        "features": list(processor.features()),
        # by python -m benchmarks.processors: the processor has them all the same
        "hidden": os.environ.get("HIDDEN_CPU_FEATURES"),
        "system": platform.system(),
        "gpu": None,
    }
    for library in LIBRARIES:
        try:
            found[library] = version(library)
        except PackageNotFoundError:
            found[library] = None
    if device.startswith("cuda"):
        properties = torch.cuda.get_device_properties(device)
        found["gpu"] = properties.name
        found["gpu_memory_gib"] = round(properties.total_memory / 2**30, 1)
        found["cuda"] = torch.version.cuda
        found["cudnn"] = torch.backends.cudnn.version()
        found["driver"] = _driver()
        matmul = torch.backends.cuda.matmul
        found["tf32"] = False  # whatever is measured is under numerics.exact_float32
        found["bf16_reduced_precision_reduction"] = matmul.allow_bf16_reduced_precision_reduction
    return found


@exact_float32()
def ceilings(device: str, dtypes: tuple[str, ...], seconds: float = 0.5) -> dict[str, float]:
    """GEMM rate of each dtype in TFLOP/s (square, random numbers), and copy rate in GB/s, reads and writes counted."""
    on_gpu = device.startswith("cuda")
    side = 8192 if on_gpu else 2048
    found = {}
    for dtype in dtypes:
        left, right = (torch.randn(side, side, device=device).to(getattr(torch, dtype)) for _ in range(2))
        out = torch.empty_like(left)
        found[f"{dtype}_tflops"] = 2 * side**3 / _best(_gemm(left, right, out), device, seconds) / 1e12
    source = torch.randn((1 << 30 if on_gpu else 1 << 28) // 4, device=device)
    target = torch.empty_like(source)
    found["copy_gbs"] = 2 * source.nbytes / _best(lambda: target.copy_(source), device, seconds) / 1e9
    return found


def _gemm(left: torch.Tensor, right: torch.Tensor, out: torch.Tensor) -> Callable[[], object]:
    return lambda: torch.mm(left, right, out=out)


def _best(run: Callable[[], object], device: str, seconds: float) -> float:
    run()
    sample = sampler(run, device, seconds / 3, graph=False)
    return min(sample() for _ in range(3))


def available_memory(device: str) -> int:
    """Bytes of memory that are free: of the GPU, or of the system within the limit of its container."""
    if device.startswith("cuda"):
        return torch.cuda.mem_get_info(device)[0]
    found = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    try:
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                found = int(line.split()[1]) * 1024
        # a container may allow less
        limit = Path("/sys/fs/cgroup/memory.max").read_text().strip()
        used = Path("/sys/fs/cgroup/memory.current").read_text().strip()
        return found if limit == "max" else min(found, int(limit) - int(used))
    except (OSError, ValueError):
        return found


class Sensors:
    """SM clock, power and temperature of a GPU, each where it can be read: with NVIDIA's nvidia-ml-py installed."""

    def __init__(self, device: str) -> None:
        self.device = device
        sensors = {"clock_mhz": _clock, "power_w": _power, "temperature_c": _temperature}
        self.sensors = sensors if device.startswith("cuda") else {}

    def __call__(self) -> Reading:
        """What they say now."""
        found = {}
        for name, sensor in list(self.sensors.items()):
            try:
                found[name] = sensor(self.device)
            except Exception:
                # without the library, without permission, or not on this GPU: it is not asked again
                del self.sensors[name]
        return Reading(**found)


def _clock(device: str) -> float:
    return float(torch.cuda.clock_rate(device))


def _power(device: str) -> float:
    return torch.cuda.power_draw(device) / 1e3


def _temperature(device: str) -> float:
    return float(torch.cuda.temperature(device))


def _commit() -> str:
    root = Path(xclip_fast.__file__).parents[1]
    if not (root / ".git").exists():
        return "installed"
    command = ["git", "-C", str(root), "describe", "--always", "--dirty", "--abbrev=7", "--exclude=*"]
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=20).stdout.strip() or "unknown"
    except (OSError, subprocess.TimeoutExpired):
        return "unknown"


def _driver() -> str | None:
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=20).stdout.split("\n")[0] or None
    except (OSError, subprocess.TimeoutExpired):
        return None


def _processor() -> str:
    if sys.platform == "linux":
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()
