"""Host time: what is measured on the stand-in for CUDA, and the launches and choices that it depends on."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

pytest.importorskip("triton")
pytest.importorskip("transformers")

from test_gpu_stand_in import library, rehearse  # noqa: F401  the fixture

from benchmarks.__main__ import main

# one process runs them all, each in names of its own
COMMON = """
from contextlib import nullcontext
from triton import knobs
from xclip_fast import create_model, optimize
from xclip_fast.bench.huggingface import model_of
from xclip_fast.kernels.layer_norm import _layer_norm_fwd_kernel as kernel
from xclip_fast.ops import _backends, backend, layer_norm
from xclip_fast.ops.cases import TINY
from xclip_fast.tuning import override

def kernels_of(call):
    before = standin.counts()["triton_launches"]
    call()
    return standin.counts()["triton_launches"] - before

def launches(rows, offset=0):
    x = torch.ones(rows * 64 + offset, device="cuda", dtype=torch.bfloat16)[offset:].view(rows, 64)
    vector = torch.ones(64, device="cuda", dtype=torch.bfloat16)
    return kernels_of(lambda: layer_norm(x, vector, vector, backend="triton"))

video = torch.ones(2, 4, 3, 32, 32, device="cuda", dtype=torch.bfloat16)
texts = torch.ones(5, 64, device="cuda", dtype=torch.bfloat16)
tokens = torch.ones(2, 4, 5, 64, device="cuda", dtype=torch.bfloat16)

def small():
    model = create_model(TINY).to("cuda", torch.bfloat16)
    return model, model.visual.transformer.resblocks[0]
"""
SCRIPTS = {
    "remembered": """
print([launches(8) for _ in range(3)], len(kernel.remembered))
print([launches(9) for _ in range(2)], len(kernel.remembered))
""",
    "left to Triton": """
launches(8)
print(launches(8, offset=1), len(kernel.remembered))
seen = []
knobs.runtime.launch_enter_hook.add(seen.append)
print(launches(8), len(seen))
knobs.runtime.launch_enter_hook.remove(seen.append)
print(launches(8), len(seen))
""",
    "override": """
launches(8)
with override("layer_norm", num_warps=8):
    launches(8)
print([dict(part for part in key if isinstance(part, tuple))["num_warps"] for key in kernel.remembered])
""",
    "small batches": """
model, block = small()
print("eager", kernels_of(lambda: block(tokens)), kernels_of(lambda: block(tokens.requires_grad_()).sum().backward()))
with backend("triton"):
    print("asked", kernels_of(lambda: block(tokens)) > 0)

def whole():
    return model.logits(model.encode_video(video), texts)

few = kernels_of(whole)
_backends.HOST_BOUND = _backends.HOST_BOUND_WITH_GRADIENT = 1
print("large", kernels_of(lambda: block(tokens)) > 0, kernels_of(whole) > few)
_backends.HOST_BOUND_WITH_GRADIENT = 1 << 25
print("between", kernels_of(lambda: block(tokens)), kernels_of(lambda: torch.no_grad()(block)(tokens)) > 0)
""",
    "optimize": """
with torch.device("cuda"):
    theirs = model_of(TINY, "sdpa").to(torch.bfloat16)
optimize(theirs)
seen = lambda: theirs.vision_model(pixel_values=video.flatten(0, 1))
print(kernels_of(seen))
_backends.HOST_BOUND = _backends.HOST_BOUND_WITH_GRADIENT = 1
print(kernels_of(seen) > 0)
""",
    "checkpointed": """
model, _ = small()
model.train().gradient_checkpointing_enable()
with backend("triton"):
    print(kernels_of(lambda: model.encode_video(video).video.sum().backward()) > 0)
""",
    "norms": """
_, block = small()
for norm in (block.ln_1, block.ln_2, block.message_ln):
    norm.float()
print(kernels_of(lambda: block(tokens)) > 0)
""",
    "graphed": """
for name in (None, "triton"):
    _, block = small()
    before = standin.counts()["replays"]
    with backend(name) if name else nullcontext():
        fused = kernels_of(lambda: torch.cuda.make_graphed_callables(block, (tokens.detach().requires_grad_(),)))
    launched = kernels_of(lambda: block(tokens.detach().requires_grad_()).sum().backward())
    print(name, fused > 0, launched, standin.counts()["replays"] - before)
""",
}


@pytest.fixture(scope="module")
def printed(library: Path) -> dict[str, list[str]]:  # noqa: F811
    """The lines of each script."""
    bound = "_backends.HOST_BOUND = _backends.HOST_BOUND_WITH_GRADIENT = 1 << 25\nkernel.remembered.clear()\n"
    runs = [f"print({name!r})\n{bound}exec({script!r}, dict(globals()))\n" for name, script in SCRIPTS.items()]
    found: dict[str, list[str]] = {}
    for line in rehearse(library, COMMON + "".join(runs)):
        if line in SCRIPTS:
            lines = found.setdefault(line, [])
        else:
            lines.append(line)
    return found


def test_a_kernel_is_remembered_and_launched_each_time(printed: dict[str, list[str]]) -> None:
    assert printed["remembered"] == ["[1, 1, 1] 1", "[1, 1] 2"]


def test_addresses_that_are_not_aligned_and_watched_launches_are_left_to_triton(printed: dict[str, list[str]]) -> None:
    assert printed["left to Triton"] == ["1 1", "1 1", "1 1"]


def test_an_override_of_a_tile_is_another_launch(printed: dict[str, list[str]]) -> None:
    assert printed["override"] == ["[4, 8]"]


def test_small_eager_batches_run_as_plain_modules(printed: dict[str, list[str]]) -> None:
    assert printed["small batches"] == ["eager 0 0", "asked True", "large True True", "between 0 True"]


def test_optimize_leaves_small_batches_to_the_model(printed: dict[str, list[str]]) -> None:
    assert printed["optimize"] == ["0", "True"]


def test_checkpointed_blocks_are_computed_again_by_the_backend_asked_for(printed: dict[str, list[str]]) -> None:
    assert printed["checkpointed"] == ["True"]


def test_norms_of_another_dtype_are_left_to_the_kernels(printed: dict[str, list[str]]) -> None:
    assert printed["norms"] == ["True"]


def test_a_block_takes_part_in_graphed_callables(printed: dict[str, list[str]]) -> None:
    """PyTorch's own capture of forward and backward pass, where the host limits training of small batches."""
    assert printed["graphed"] == ["None False 0 2", "triton True 0 2"]


def test_the_command_writes_microseconds(
    library: Path,  # noqa: F811
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    out = tmp_path / "host.json"
    assert main(["host", "norm", "--json", str(out)]) == 0
    written = json.loads(out.read_text())
    found = written["microseconds"]["norm"]
    assert written["machine"]["commit"]
    assert all(microseconds > 0 for microseconds in found.values())
    printed = capsys.readouterr().out
    assert all(what in printed for what in found)
    assert main(["host", "nothing"]) == 2
    assert "unknown case nothing: choose of norm, ops" in capsys.readouterr().err
