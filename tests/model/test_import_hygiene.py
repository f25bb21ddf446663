"""Optional libraries stay unimported, and the oracle stands on its own."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import xclip_fast.reference

OPTIONAL = (
    "triton",
    "transformers",
    "open_clip",
    "av",
    "decord",
    "torchcodec",
    "torchvision",
    "typer",
    "rich",
)
REFERENCE = sorted(Path(xclip_fast.reference.__file__).parent.glob("*.py"))
ALLOWED = ("xclip_fast.config", "xclip_fast.reference", "torch", "einops", *sys.stdlib_module_names)

# every public name, then the path from random weights to logits
USE_EVERYTHING = """
import torch
import xclip_fast
for name in xclip_fast.__all__:
    getattr(xclip_fast, name)
config = xclip_fast.XCLIPConfig(image_size=16, patch_size=8, vision_width=64, vision_layers=1, embed_dim=64,
                                context_length=8, vocab_size=20, text_width=64, text_layers=1)
model = xclip_fast.create_model(config, seed=0)
logits = model(torch.zeros(1, 8, 16, 16, 3, dtype=torch.uint8), torch.tensor([[1, 19, 0]]))
assert logits.isfinite().all()
"""


def run(program: str) -> str:
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.slow
def test_import_brings_no_optional_library() -> None:
    # torch may bring some of them itself: what it brings does not count
    program = f"""
import sys
import torch
before = set(sys.modules)
import xclip_fast
new = {{name.split(".")[0] for name in set(sys.modules) - before}}
print(sorted(new & set({OPTIONAL!r})))
"""
    assert run(program).strip() == "[]"


def test_import_alone_brings_no_torch() -> None:
    assert run("import sys, xclip_fast; print('torch' in sys.modules)").strip() == "False"


@pytest.mark.slow
def test_model_runs_without_any_optional_library() -> None:
    blocked = f"import sys\nsys.modules.update(dict.fromkeys({OPTIONAL!r}))\n"
    run(blocked + USE_EVERYTHING)


def test_kernels_are_interpreted_exactly_where_there_is_no_gpu() -> None:
    triton = pytest.importorskip("triton", reason="triton has wheels for Linux alone")
    assert triton.knobs.runtime.interpret is not torch.cuda.is_available()


def imported_modules(source: str) -> set[str]:
    """The modules that a piece of source imports, anywhere in it."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            found.add("." * node.level + (node.module or ""))
            found.update(f"{node.module}.{alias.name}" for alias in node.names if node.module == "xclip_fast")
    return found


def foreign(modules: set[str]) -> set[str]:
    """The ones the oracle may not import."""
    return {name for name in modules if not any(name == home or name.startswith(f"{home}.") for home in ALLOWED)}


def test_oracle_imports_plain_torch_alone() -> None:
    assert {path.stem for path in REFERENCE} >= {"model", "vision", "prompts", "mit", "transformer", "positions"}
    assert {path.name: foreign(imported_modules(path.read_text())) for path in REFERENCE} == {
        path.name: set() for path in REFERENCE
    }


@pytest.mark.parametrize(
    "line",
    [
        "from xclip_fast.ops import layer_norm",
        "import xclip_fast.kernels.layer_norm",
        "from xclip_fast import ops",
        "def f():\n    import triton",
        "from . import ops",
    ],
)
def test_the_check_of_imports_sees_a_foreign_one(line: str) -> None:
    assert foreign(imported_modules(line))
