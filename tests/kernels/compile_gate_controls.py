"""What the compile gate says of builds it must refuse, and of one it must not, as JSON; and what its command prints.

Run as a process of its own, with a folder for budgets: under the interpreter nothing is compiled.
"""

from __future__ import annotations

import io
import json
import sys
from contextlib import AbstractContextManager, redirect_stdout
from pathlib import Path

import torch

from benchmarks.compile_gate import calls
from benchmarks.compile_gate.__main__ import main
from benchmarks.compile_gate.build import Build, compile_launch, measure
from benchmarks.compile_gate.capture import captured_launches
from benchmarks.compile_gate.gate import broken_laws, budget_file, read_budgets, write_budgets
from xclip_fast.ops.inputs import Draw
from xclip_fast.tuning import Tile, override

ARCH = 90


def tiles(*sizes: int) -> AbstractContextManager[None]:
    """Another tile of the GEMM than its default."""
    return override("linear_quick_gelu", **Tile(*sizes)._asdict())


def product(dtype: torch.dtype, width: int = 64) -> Build:
    """The GEMM compiled for inputs of this dtype."""
    with captured_launches() as launches:
        calls.linear_quick_gelu(Draw(dtype, "meta"), rows=4096, width=width, hidden=256, training=False)
    return measure(compile_launch(launches[0], ARCH), launches[0].name, "control", ARCH)


def controls() -> dict[str, list[str]]:
    """What the gate says of each."""
    found = {}
    with tiles(64, 64, 16, 4, 2):
        found["sound"] = list(broken_laws(product(torch.bfloat16)))
        # exact float32 products have no tensor core
        found["no tensor cores"] = list(broken_laws(product(torch.float32)))
    # 256 sums a thread, of 255 registers
    with tiles(128, 256, 16, 4, 2):
        found["spills"] = list(broken_laws(product(torch.bfloat16)))
    with tiles(128, 128, 64, 8, 8):
        found["too large"] = list(broken_laws(product(torch.bfloat16, 1024)))
    return found


def command(*arguments: str) -> tuple[int, str]:
    """Exit status and output of the command on two small builds."""
    output = io.StringIO()
    with redirect_stdout(output):
        status = main(["--arch", str(ARCH), "--shape", "B/16 8f x8 temporal residual", *arguments])
    return status, output.getvalue()


def commands(folder: Path) -> list[tuple[int, str]]:
    """The command without budgets, taking them, with one lowered, and taking them again."""
    to = ("--budgets", str(folder))
    found = [command(*to), command(*to, "--update")]
    path = budget_file(folder)
    budgets = read_budgets(path) or {}
    write_budgets(path, {name: budget._replace(registers=8) for name, budget in budgets.items()})
    return [*found, command(*to), command(*to, "--update")]


if __name__ == "__main__":
    print(json.dumps({"controls": controls(), "commands": commands(Path(sys.argv[1]))}))
