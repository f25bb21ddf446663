"""Tuning tables: read once, believed where they fit, left out where they do not; every function keeps its default."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.gpu.tune import table_of
from xclip_fast import tuning
from xclip_fast.kernels import frame_attention, frame_attention_bwd, layer_norm, linear_quick_gelu, message_attention
from xclip_fast.ops import _backends
from xclip_fast.tuning import Tile, Tunable

SHAPE = (12608, 768, torch.bfloat16)
KEY = "12608 768 torch.bfloat16"
TUNED = {"rows": 64, "columns": 256, "depth": 64, "num_warps": 8, "num_stages": 4}
KEPT = {"rows": 64, "columns": 0, "num_warps": 4, "num_stages": 2}
ROOT = Path(__file__).parents[2]


def write(path: Path, **parts: Any) -> Path:
    path.write_text(json.dumps({"schema": tuning.SCHEMA, "tiles": {}, "backends": {}} | parts))
    return path


@pytest.fixture
def use(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Make a table that of this machine, and return a function anew, as if it had not been called."""

    def using(function: Tunable, content: dict[str, Any] | None) -> Tunable:
        table = None if content is None else tuning.read(write(tmp_path / "table.json", **content))
        monkeypatch.setattr(tuning, "_read", table)
        facts = function.op, function.backward, function.fixed, function.optional, function.cut, function.sizes
        return Tunable(function.default, function.name, *facts)

    return using


def tiles(name: str, key: str, entry: object) -> dict[str, Any]:
    return {"tiles": {name: {key: entry}}}


def test_an_entry_is_used_for_its_shape_alone(use: Any) -> None:
    found = use(linear_quick_gelu.forward_tile, tiles("linear_quick_gelu", KEY, TUNED))
    assert found(*SHAPE) == Tile(**TUNED)
    assert found(*SHAPE) is found(*SHAPE)
    for other in ((12609, 768, torch.bfloat16), (12608, 768, torch.float16), (1, 16, torch.float32)):
        assert found(*other) == found.default(*other)


def test_tiles_of_other_kernels(use: Any) -> None:
    blocks = {"rows": 128, "columns": 64, "num_warps": 8, "num_stages": 3}
    frames = use(frame_attention.forward_tile, tiles("frame_attention", "197 64 2", blocks))
    assert frames(197, 64, 2) == Tile(128, 64, num_warps=8, num_stages=3)
    rows = use(layer_norm.forward_tile, tiles("layer_norm", "768", {"rows": 2, "num_warps": 8}))
    # what an entry does not name stays the default's
    assert rows(768) == Tile(2, 1024, num_warps=8)


def test_keys_are_kept_where_they_can_be(use: Any) -> None:
    table = {f"{tokens} 64 2": KEPT for tokens in (63, 64, 320, 321)} | {"197 64 2": KEPT | {"rows": 0}}
    found = use(frame_attention.forward_tile, {"tiles": {"frame_attention": table}})
    assert [found(tokens, 64, 2).columns for tokens in (63, 64, 197, 320, 321)] == [64, 0, 64, 0, 64]
    assert found.sizes_of(found(64, 64, 2)) == KEPT
    backward = use(frame_attention_bwd.key_gradient_tile, tiles("frame_attention_bwd_key", "64 64 2", KEPT))
    assert backward(64, 64, 2) == backward.default(64, 64, 2)


@pytest.mark.parametrize(
    "entry",
    [None, 7, "64", [], [64, 256, 64, 8, 4], {"num_stages": 0}, {"num_stages": 99}, {"columns": 255},
     {"depth": 64.0}, {"rows": True}, {"rows": -64}, {"rows": 2**40}, {"block_m": 64}, {"num_warps": 64}, {"rows": 0}],
    ids=str,
)  # fmt: skip
def test_what_are_no_tiles_is_left_out(entry: object, use: Any, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG, "xclip_fast")
    found = use(linear_quick_gelu.forward_tile, tiles("linear_quick_gelu", KEY, entry))
    assert found(*SHAPE) == found.default(*SHAPE)
    assert sum("is left out" in said for said in caplog.messages) == (entry is not None)


def test_what_a_kernel_needs_cannot_be_tuned(use: Any) -> None:
    frames = use(message_attention.fused_tile, tiles("message_attention", "32 64 2", {"rows": 16}))
    assert frames(32, 64, 2) == frames.default(32, 64, 2)
    columns = use(layer_norm.forward_tile, tiles("layer_norm", "768", {"rows": 2, "columns": 512}))
    assert columns(768) == Tile(4, 1024)
    # the kernel knows no steps of a sum
    depth = use(layer_norm.forward_tile, tiles("layer_norm", "768", {"rows": 2, "depth": 64}))
    assert depth(768) == Tile(4, 1024)


BROKEN = ["", "{", "[]", "null", "7", '{"schema": 1}', '{"schema": 2}', "[" * 100_000, "\0"]
BROKEN += ['{"schema": 2, "tiles": [], "backends": {}}', '{"schema": 2, "tiles": {}, "backends": 3}']


@pytest.mark.parametrize("content", BROKEN, ids=lambda text: text[:40])
def test_a_broken_file_is_no_table(content: str, tmp_path: Path) -> None:
    path = tmp_path / "table.json"
    path.write_text(content)
    assert tuning.read(path) == {}
    assert tuning.read(tmp_path / "none.json") == {}
    assert tuning.read(tmp_path) == {}


@pytest.mark.parametrize("entries", [None, [], 3, "x", {}])
def test_a_part_that_is_no_table(entries: object, use: Any) -> None:
    found = use(linear_quick_gelu.forward_tile, {"tiles": {"linear_quick_gelu": entries}})
    assert found(*SHAPE) == found.default(*SHAPE)


def test_no_table_before_there_is_a_gpu(use: Any) -> None:
    if torch.cuda.is_initialized():
        pytest.skip("CUDA is in use")
    found = use(linear_quick_gelu.forward_tile, None)
    assert tuning.table() is None
    assert found(*SHAPE) == found.default(*SHAPE)
    assert found.tuned is None


def test_the_table_names_backends_of_calls(use: Any) -> None:
    x, weight = torch.empty(3, 8, device="meta"), torch.empty(8, device="meta")
    key = tuning.call_key([x, weight, None])
    assert key == "torch.float32:3x8 torch.float32:8 -"
    use(
        linear_quick_gelu.forward_tile,
        {"backends": {"layer_norm": {key: "torch", "other": "triton"}, "clip_logits": 3}},
    )
    assert tuning.tuned_backend("layer_norm", [x, weight, None]) == "torch"
    assert tuning.tuned_backend("layer_norm", [x, weight, x]) is None
    assert tuning.tuned_backend("clip_logits", [x]) is None
    assert tuning.tuned_backend("patch_embed", [x]) is None
    use(linear_quick_gelu.forward_tile, {"backends": {"layer_norm": {key: "cuda"}}})
    assert tuning.tuned_backend("layer_norm", [x, weight, None]) is None


class OnGpu:
    """What the choice of a backend looks at in a tensor."""

    is_cuda = True


@pytest.mark.parametrize(
    ("tuned", "extension", "chosen"),
    [("torch", None, "torch"), ("triton", None, "triton"), (None, None, "extension"), (None, "none", "triton"),
     ("torch", "none", "torch")],
)  # fmt: skip
def test_the_automatic_choice_asks_the_table(
    tuned: str | None, extension: str | None, chosen: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_backends, "tuned_backend", lambda op, tensors: tuned)
    monkeypatch.setattr(_backends, "_tensor_refusal", lambda tensors: None)
    assert _backends.choose("patch_embed", None, OnGpu(), extension=extension) == chosen
    # who asks for a backend gets it
    assert _backends.choose("patch_embed", "triton", OnGpu(), extension=extension) == "triton"
    # on a CPU nothing was measured
    assert _backends.choose("patch_embed", None, torch.empty(1), extension="none") == "torch"


def test_every_table_that_is_there_fits_the_functions() -> None:
    known = tuning.tunables()
    assert len(known) >= 15
    for path in tuning.path_of("x").parent.glob("*.json"):
        found = tuning.read(path)
        assert found, path
        assert path == tuning.path_of(found["gpu"])
        for name, entries in found["tiles"].items():
            for key, entry in entries.items():
                # none is left out, whole and as it was measured
                tile = known[name].made(tuple(int(part) if part.isdecimal() else part for part in key.split()), entry)
                assert known[name].sizes_of(tile) == entry


def test_the_table_of_the_h200_says_what_its_sweep_found(use: Any) -> None:
    path = tuning.path_of("NVIDIA H200")
    sweep = json.loads((ROOT / "benchmarks" / "results" / "windows" / "h200-sweep-03b59c7.json").read_text())
    timed = {tuple(row["numbers"]): row["ratio"] for row in sweep["cases"]["frame_attention B/16 x8"]["rows"]}
    # queries, keys, warps and stages, as tables had them then
    assert max(timed, key=lambda numbers: timed[numbers]) == (64, 0, 4, 2)
    found = use(frame_attention.forward_tile, tuning.read(path))
    assert found(197, 64, 2) == Tile(rows=64, columns=0, num_warps=4, num_stages=2)
    assert found(257, 64, 2) == found.default(257, 64, 2)


def test_the_table_of_the_h100_is_what_tune_makes_of_its_sweep() -> None:
    sweep = json.loads((ROOT / "benchmarks" / "results" / "windows" / "h100-sweep-ecf2132.json").read_text())
    assert table_of(sweep) == tuning.read(tuning.path_of("NVIDIA H100 80GB HBM3"))


def test_results_are_kept_and_not_without_end(use: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    found = use(linear_quick_gelu.forward_tile, tiles("linear_quick_gelu", KEY, TUNED))
    monkeypatch.setattr(tuning, "KEPT", 5)
    for rows in range(1, 40):
        assert found(rows, 64, torch.float16) == found.default(rows, 64, torch.float16)
        assert len(found.tuned) <= 5
    assert found(*SHAPE) == Tile(**TUNED)


def test_names_of_files() -> None:
    assert tuning.slug("NVIDIA H100 80GB HBM3") == "nvidia-h100-80gb-hbm3"
    assert tuning.slug("../../x") == "x"
    assert tuning.path_of("NVIDIA H100 80GB HBM3").parent.name == "tuning"
