"""The first step: the package importable as it is installed, kernels included, and the extension built if it can be."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
EXTENSION_DEADLINE = 240.0
SOURCES = ROOT / "xclip_fast" / "_native.so.sources"  # whoever builds the library writes it
ASK = "import json; from xclip_fast import _extension as x; print(json.dumps([x.refusal(), x.architectures()]))"


def run(
    command: list[str],
    deadline: float,
    environment: dict[str, str] | None = None,
    cwd: Path = ROOT,
    said: int | None = 4000,
) -> dict[str, Any]:
    """Run a command to its end or its deadline: exit code (None: killed), seconds, the end of what it said or all."""
    start = time.monotonic()
    settings = os.environ | (environment or {})
    try:
        # a session of its own, so that its children end with it
        child = subprocess.Popen(
            command,
            cwd=cwd,
            env=settings,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            start_new_session=True,
        )
    except OSError as error:
        return {"code": 127, "seconds": 0.0, "output": str(error)}
    code: int | None
    try:
        output, _ = child.communicate(timeout=max(1.0, deadline))
        code = child.returncode
    except subprocess.TimeoutExpired:
        os.killpg(child.pid, 9)
        output, _ = child.communicate()
        code = None
    return {
        "code": code,
        "seconds": round(time.monotonic() - start, 1),
        "output": output if said is None else output[-said:],
    }


def make_importable() -> dict[str, Any]:
    """``import xclip_fast.kernels`` works afterwards: by an editable install without network, else by a link."""
    look = [sys.executable, "-c", "import xclip_fast.kernels; print(xclip_fast.kernels.__file__)"]
    if (found := run(look, 120))["code"] == 0:
        return {"how": "it was installed", **found}
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-build-isolation", "--no-index"]
    settings = {"XCLIP_FAST_BUILD_EXT": "0", "PIP_BREAK_SYSTEM_PACKAGES": "1"}
    installed = run([*command, "--editable", "."], 180, settings)
    if (found := run(look, 120))["code"] == 0:
        return {"how": "pip install --editable, without network", **found}
    # the folder as a part of the package: what the install maps, without an installer
    link = ROOT / "xclip_fast" / "kernels"
    if not link.exists():
        link.symlink_to(Path("..") / "kernels", target_is_directory=True)
    return {"how": "a link xclip_fast/kernels", "pip": installed["output"], **run(look, 120)}


def build_extension(architecture: str) -> dict[str, Any]:
    """What ``make ext`` does, with this Python, unless a library of these sources is there for the architecture.

    The rest goes on where it cannot be built. 9.0 is built as 9.0a, with Hopper's own instructions.
    """
    architecture += "a" * architecture.startswith("9.")
    reason = lack_of_extension(architecture)
    if reason is None:
        return {"code": 0, "seconds": 0.0, "output": f"carried: it is of these sources, for {architecture}"}
    settings = {"XCLIP_FAST_BUILD_EXT": "1", "TORCH_CUDA_ARCH_LIST": architecture}
    command = [sys.executable, "setup.py", "--quiet", "build_ext", "--inplace", "--force"]
    return run(command, EXTENSION_DEADLINE, settings) | {"built": reason}


def other_sources() -> str | None:
    """Why a library that is there is not of these sources. Returns the reason, or None."""
    if not SOURCES.exists():
        return f"there is no {SOURCES.name} that says what a library was built of"
    stale = run(["sha256sum", "--check", "--strict", "--quiet", str(SOURCES)], 30)
    return f"it is of other sources: {stale['output'].strip()}" if stale["code"] != 0 else None


def lack_of_extension(architecture: str) -> str | None:
    """Why a library that is there is not for this GPU. Returns the reason, or None.

    It is asked in a process of its own: one that has loaded it could load no other.
    """
    if stale := other_sources():
        return stale
    asked = run([sys.executable, "-c", ASK], 120)
    if asked["code"] != 0:
        return f"its loader fails: {asked['output'].strip()}"
    refusal, architectures = json.loads(asked["output"].splitlines()[-1])
    if refusal is not None:
        return str(refusal)
    if architecture not in [name.removesuffix("+PTX") for name in architectures]:
        return f"it is for {', '.join(architectures) or 'no GPU'}, and this one is {architecture}"
    return None


def facts() -> dict[str, Any]:
    """The code and the machine; cases of another one are not carried on."""
    import torch

    commit = os.environ.get("COMMIT")
    if not commit:
        asked = run(["git", "rev-parse", "--short", "HEAD"], 20)
        commit = asked["output"].strip() if asked["code"] == 0 else "unknown"
    found = {
        "commit": commit,
        "python": sys.version.split()[0],
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
    }
    try:
        import triton

        found["triton"] = triton.__version__
    except ImportError:
        found["triton"] = None
    return found
