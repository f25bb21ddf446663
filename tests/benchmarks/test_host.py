"""Host time: what is measured on the stand-in for CUDA, and the launches and choices that it depends on."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

pytest.importorskip("triton")

from test_gpu_stand_in import library, rehearse  # noqa: F401  the fixture

from benchmarks.__main__ import main

LAUNCHES = """
from triton import knobs
from xclip_fast.kernels.layer_norm import _layer_norm_fwd_kernel as kernel
from xclip_fast.ops import layer_norm

def launches(rows, offset=0):
    x = torch.ones(rows * 64 + offset, device="cuda", dtype=torch.bfloat16)[offset:].view(rows, 64)
    vector = torch.ones(64, device="cuda", dtype=torch.bfloat16)
    before = standin.counts()["triton_launches"]
    layer_norm(x, vector, vector, backend="triton")
    return standin.counts()["triton_launches"] - before
"""


def test_a_kernel_is_remembered_and_launched_each_time(library: Path) -> None:  # noqa: F811
    script = """
print([launches(8) for _ in range(3)], len(kernel.remembered))
print([launches(9) for _ in range(2)], len(kernel.remembered))
"""
    assert rehearse(library, LAUNCHES + script) == ["[1, 1, 1] 1", "[1, 1] 2"]


def test_addresses_that_are_not_aligned_and_watched_launches_are_left_to_triton(library: Path) -> None:  # noqa: F811
    script = """
launches(8)
print(launches(8, offset=1), len(kernel.remembered))
seen = []
knobs.runtime.launch_enter_hook.add(seen.append)
print(launches(8), len(seen))
knobs.runtime.launch_enter_hook.remove(seen.append)
print(launches(8), len(seen))
"""
    assert rehearse(library, LAUNCHES + script) == ["1 1", "1 1", "1 1"]


def test_an_override_of_a_tile_is_another_launch(library: Path) -> None:  # noqa: F811
    script = """
from xclip_fast.tuning import override
launches(8)
with override("layer_norm", num_warps=8):
    launches(8)
keys = list(kernel.remembered)
print(len(keys), [dict(part for part in key if isinstance(part, tuple))["num_warps"] for key in keys])
"""
    assert rehearse(library, LAUNCHES + script) == ["2 [4, 8]"]


SMALL = """
from xclip_fast import create_model, optimize
from xclip_fast.ops import backend, _backends
from xclip_fast.ops.cases import TINY
from xclip_fast.bench.huggingface import model_of

def kernels_of(call):
    before = standin.counts()["triton_launches"]
    call()
    return standin.counts()["triton_launches"] - before

video = torch.ones(2, 4, 3, 32, 32, device="cuda", dtype=torch.bfloat16)
texts = torch.ones(5, 64, device="cuda", dtype=torch.bfloat16)
model = create_model(TINY).to("cuda", torch.bfloat16)
block, tokens = model.visual.transformer.resblocks[0], torch.ones(2, 4, 5, 64, device="cuda", dtype=torch.bfloat16)
"""


def test_small_eager_batches_run_as_plain_modules(library: Path) -> None:  # noqa: F811
    script = """
print("eager", kernels_of(lambda: block(tokens)), kernels_of(lambda: block(tokens.requires_grad_()).sum().backward()))
with backend("triton"):
    print("asked", kernels_of(lambda: block(tokens)) > 0)
def whole():
    return model.logits(model.encode_video(video), texts)
print("whole", kernels_of(whole))
_backends.HOST_BOUND = 1
print("large", kernels_of(lambda: block(tokens)) > 0, kernels_of(whole) > 0)
"""
    assert rehearse(library, SMALL + script) == ["eager 0 0", "asked True", "whole 4", "large True True"]


def test_optimize_leaves_small_batches_to_the_model(library: Path) -> None:  # noqa: F811
    pytest.importorskip("transformers")
    script = """
with torch.device("cuda"):
    theirs = model_of(TINY, "sdpa").to(torch.bfloat16)
optimize(theirs)
seen = lambda: theirs.vision_model(pixel_values=video.flatten(0, 1))
print(kernels_of(seen))
_backends.HOST_BOUND = 1
print(kernels_of(seen) > 0)
"""
    assert rehearse(library, SMALL + script) == ["0", "True"]


@pytest.mark.parametrize("asked", ["None", "'triton'"])
def test_a_block_takes_part_in_graphed_callables(asked: str, library: Path) -> None:  # noqa: F811
    """PyTorch's own capture of forward and backward pass, where the host limits training of small batches."""
    script = f"""
from contextlib import nullcontext
with backend({asked}) if {asked} else nullcontext():
    fused = kernels_of(lambda: torch.cuda.make_graphed_callables(block, (tokens.requires_grad_(),)))
    graphed = block
print(fused > 0, kernels_of(lambda: graphed(tokens).sum().backward()), standin.counts()["replays"])
"""
    assert rehearse(library, SMALL + script) == [f"{asked != 'None'} 0 2"]


def test_the_command_writes_microseconds(library: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:  # noqa: F811
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
