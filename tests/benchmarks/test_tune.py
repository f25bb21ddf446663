"""``python -m benchmarks tune``: right before fast, a table and a file, and one line where there is no GPU."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("triton")

from benchmarks import tune
from benchmarks.__main__ import main
from benchmarks.gpu import sweep
from benchmarks.gpu.tune import table_of
from xclip_fast.errors import InputError
from xclip_fast.tuning import tunables

IN_THE_INTERPRETER = pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")


@IN_THE_INTERPRETER
def test_a_rehearsal_tries_forward_and_backward(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "tune.json"
    assert main(["tune", "layer_norm", "--dry-run", "--json", str(path)]) == 0
    said = capsys.readouterr().out
    assert "layer_norm tiny x1\n  launched at 64\n" in said
    assert "layer_norm_bwd tiny x1\n" in said
    assert said.count("(default)") == 2
    assert said.count(" us  x ") == 4
    cases = json.loads(path.read_text())["cases"]
    assert cases.keys() == {"layer_norm tiny x1", "layer_norm_bwd tiny x1"}
    assert all(row["status"] == "right" for case in cases.values() for row in case["rows"])
    # what comes of it is a table
    assert table_of({"facts": {}, "cases": cases})["tiles"].keys() <= tunables().keys()


@IN_THE_INTERPRETER
def test_the_tiles_tried_are_those_launched(monkeypatch: pytest.MonkeyPatch) -> None:
    from benchmarks.compile_gate.capture import captured_launches

    launched: list[tuple[int, int]] = []

    def sampler(call: Callable[[], object], *_: Any, **__: Any) -> Callable[[], float]:
        with captured_launches() as found:
            call()
        launched.extend((one.arguments["BLOCK_ROWS"], one.arguments["num_warps"]) for one in found)
        return lambda: 1.0

    monkeypatch.setattr(sweep, "sampler", sampler)
    kernel = tunables()["layer_norm"]
    found = sweep.tiles_of(sweep.Sweep("layer_norm", kernel, "tiny", 1, True))
    tiles = kernel.candidates(64)[:2]
    # the default in front of the first, which it is
    assert launched == [(tile.rows, tile.num_warps) for tile in (tiles[0], *tiles)]
    assert [row["tile"] for row in found["rows"]] == [kernel.sizes_of(tile) for tile in tiles]


@IN_THE_INTERPRETER
def test_a_wrong_tile_is_not_timed_and_the_code_is_1(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    right = sweep.run_op

    def wrong(op: Any, arguments: Any, wanted: Any, backend: str, gradients: bool) -> Any:
        found = right(op, arguments, wanted, backend, gradients)
        return {name: x * (1.1 if backend == "triton" else 1) for name, x in found.items()}

    monkeypatch.setattr(sweep, "run_op", wrong)
    assert main(["tune", "mean_norm_over_frames", "--dry-run"]) == 1
    said = capsys.readouterr().out
    assert said.count("WRONG: error 0.") == 4
    assert " us " not in said


@IN_THE_INTERPRETER
def test_without_a_gpu_it_says_so_in_a_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["tune", "layer_norm"]) == 2
    said = capsys.readouterr().err
    assert said == "error: torch finds no GPU here: --dry-run tries two tiles of each kernel in the interpreter\n"


@pytest.mark.parametrize("arguments", [["conv"], ["layer_norm", "--shape", "B/16"], ["layer_norm", "--shape", "C/3x1"]])
def test_what_is_no_op_and_no_shape_is_named(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["tune", *arguments]) == 2
    assert arguments[-1].rpartition("x")[0] in capsys.readouterr().err


def test_shapes() -> None:
    assert tune.shape_of("L/14-336x16") == ("L/14-336", 16)
    assert tune.shape_of("tinyx1") == ("tiny", 1)
    for text in ("", "x", "B/16x", "B/16x0", "B/16x-1", "8"):
        with pytest.raises(InputError):
            tune.shape_of(text)
