"""``tuning.override``: what is launched is what was asked for, until the context ends and for nobody else."""

from __future__ import annotations

import asyncio
import inspect
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from benchmarks.compile_gate.capture import Launch, captured_launches
from xclip_fast import tuning
from xclip_fast.bench.parity import compare
from xclip_fast.kernels.layer_norm import forward_tile
from xclip_fast.ops import frame_attention, layer_norm
from xclip_fast.ops.inputs import Draw
from xclip_fast.ops.inputs import frame_attention as attention_inputs
from xclip_fast.ops.inputs import layer_norm as norm_inputs
from xclip_fast.tuning import Tile, override, tunables

DRAW = Draw(torch.float32, "cuda" if torch.cuda.is_available() else "cpu")
INPUTS = norm_inputs(DRAW, rows=9, width=40, residual=True)
DEFAULT = forward_tile.default(40)


def launch_of(call: Callable[[], object]) -> Launch:
    with captured_launches() as launches:
        call()
    return launches[0]


def launched() -> tuple[int, int, int]:
    """Rows, warps and programs of a layer norm."""
    launch = launch_of(lambda: layer_norm(**INPUTS, backend="triton"))
    return launch.arguments["BLOCK_ROWS"], launch.arguments["num_warps"], launch.grid[0]


def test_the_tile_asked_for_is_launched_and_then_no_more() -> None:
    assert launched() == (DEFAULT.rows, DEFAULT.num_warps, 3)
    with override("layer_norm", rows=1, num_warps=8):
        assert launched() == (1, 8, 9)
        with override("layer_norm", rows=2):
            assert launched() == (2, DEFAULT.num_warps, 5), "the inner one holds alone"
        with override("clip_logits", rows=1):
            assert launched() == (1, 8, 9)
    assert launched() == (DEFAULT.rows, DEFAULT.num_warps, 3)


def test_it_ends_with_an_exception() -> None:
    with pytest.raises(KeyError), override("layer_norm", rows=1):
        raise KeyError
    assert launched()[0] == DEFAULT.rows
    assert torch._C._is_multithreading_enabled(), "autograd has its threads again"


@pytest.mark.parametrize("rows", [1, 2, 8])
def test_results_are_right_with_any_tile(rows: int) -> None:
    with override("layer_norm", rows=rows), override("layer_norm_bwd", rows=rows, num_warps=2):
        found = list(compare(layer_norm, INPUTS, "triton", gradients=True, ceiling=8e-6))
    assert len(found) == 6
    assert all(row.passed for row in found), found


def test_a_backward_pass_is_overridden_where_it_runs() -> None:
    x = INPUTS["x"].clone().requires_grad_()
    normed, _ = layer_norm(x, INPUTS["weight"], INPUTS["bias"], backend="triton")
    with captured_launches() as launches, override("layer_norm_bwd", rows=8, num_warps=1):
        normed.sum().backward()
    assert [launch.name for launch in launches] == ["_layer_norm_bwd_kernel"]
    assert (launches[0].arguments["BLOCK_ROWS"], launches[0].arguments["num_warps"]) == (8, 1)


def test_other_threads_and_tasks_keep_the_default() -> None:
    found: list[Tile] = []
    with override("layer_norm", rows=1):
        thread = threading.Thread(target=lambda: found.append(forward_tile(40)))
        thread.start()
        thread.join()
    assert found == [DEFAULT]

    async def task(rows: int, entered: asyncio.Event, other: asyncio.Event) -> int:
        with override("layer_norm", rows=rows):
            entered.set()
            await other.wait()
            return forward_tile(40).rows

    async def both() -> list[int]:
        first, second = asyncio.Event(), asyncio.Event()
        return await asyncio.gather(task(1, first, second), task(2, second, first))

    assert asyncio.run(both()) == [1, 2]


def test_without_sizes_a_table_is_left_aside(monkeypatch: pytest.MonkeyPatch) -> None:
    table = {"schema": tuning.SCHEMA, "tiles": {"layer_norm": {"40": {"rows": 1}}}, "backends": {}}
    monkeypatch.setattr(tuning, "_read", table)
    monkeypatch.setattr(forward_tile, "tuned", None)
    assert forward_tile(40).rows == 1
    with override("layer_norm"):
        assert forward_tile(40) == DEFAULT
    assert forward_tile(40).rows == 1


@pytest.mark.parametrize(
    ("name", "sizes", "said"),
    [
        ("layer_norms", {}, "unknown kernel 'layer_norms': choose one of clip_logits, "),
        ("layer_norm", {"warps": 4}, "layer_norm: a tile has rows, .*, num_stages, found 'warps'"),
        ("layer_norm", {"rows": 3}, "layer_norm: rows must be a power of two, found 3"),
        ("layer_norm", {"rows": -1}, "layer_norm: rows must be a size, found -1"),
        ("layer_norm", {"rows": True}, "layer_norm: rows must be a size, found True"),
        ("layer_norm", {"num_warps": 64}, "layer_norm: num_warps is at most 32, found 64"),
        ("layer_norm", {"num_stages": 0}, "layer_norm: num_stages must be a size, found 0"),
    ],
)  # fmt: skip
def test_what_is_no_tile_is_refused_at_once(name: str, sizes: dict[str, int], said: str) -> None:
    with pytest.raises(ValueError, match=f"^{said}"), override(name, **sizes):
        pytest.fail("it was entered")


@pytest.mark.parametrize(
    ("sizes", "said"),
    [
        ({"columns": 32}, "layer_norm at 40: columns must be 64, found 32"),
        ({"depth": 16}, "layer_norm at 40: depth must be 0, found 16"),
        ({"rows": 0}, "layer_norm at 40: rows cannot be 0"),
        ({"rows": 1024}, "layer_norm at 40: rows is too large, found 1024"),
    ],
)
def test_what_does_not_fit_a_launch_is_refused_there(sizes: dict[str, int], said: str) -> None:
    with override("layer_norm", **sizes), pytest.raises(ValueError, match=said):
        layer_norm(**INPUTS, backend="triton")


def test_keys_that_cannot_be_kept_are_refused() -> None:
    inputs = attention_inputs(DRAW, frames=1, tokens=50, width=64, heads=1)
    with override("frame_attention", columns=0), pytest.raises(ValueError, match="keys of 50 tokens are not kept"):
        frame_attention(**inputs, backend="triton")


SHAPES = {
    "clip_logits": (512,),
    "clip_logits_bwd": (512,),
    "frame_attention": (197, 64, 2),
    "frame_attention_bwd_key": (197, 64, 2),
    "frame_attention_bwd_query": (197, 64, 2),
    "layer_norm": (768,),
    "layer_norm_bwd": (768,),
    "linear_quick_gelu": (12608, 768, torch.bfloat16),
    "mean_norm_over_frames": (196, 8, 768),
    "mean_norm_over_frames_bwd": (768,),
    "message_attention": (8, 64, 2),
    "message_attention_long": (64, 2),
    "prompt_attention": (400, 196, torch.bfloat16),
    "prompt_attention_bwd": (400, 196, torch.bfloat16),
    "quantize_rows": (768,),
    "quick_gelu_bwd": (torch.bfloat16,),
    "skinny_linear": (64, 768, 1536, 2),
}


def test_every_kernel_has_candidates_that_begin_with_its_default() -> None:
    assert tunables().keys() == SHAPES.keys()
    for name, kernel in tunables().items():
        found = kernel.candidates(*SHAPES[name])
        assert found[0] == kernel.default(*SHAPES[name])
        assert 3 <= len(found) <= tuning.MOST_CANDIDATES, name
        assert len(set(found)) == len(found)
        for tile in found:
            assert kernel.made(SHAPES[name], kernel.sizes_of(tile)) == tile


def test_the_page_says_what_is_there() -> None:
    page = (Path(__file__).parents[2] / "docs" / "tuning.md").read_text(encoding="utf-8")
    assert inspect.getsource(forward_tile.default) in page
    assert repr(forward_tile.default(768)) in page


def test_candidates_that_come_to_the_same_are_tried_once() -> None:
    attention = tunables()["frame_attention"]
    # where all keys can be kept, that is tried early
    assert [tile.columns for tile in attention.candidates(197, 64, 2)][:3] == [64, 0, 0]
    assert all(tile.columns for tile in attention.candidates(50, 64, 2))
    # 5 tokens fit any block of queries
    tiles = attention.candidates(5, 64, 2)
    assert len({(tile.columns, tile.num_warps, tile.num_stages) for tile in tiles}) == len(tiles)
