"""``xclip-fast embed`` and ``convert``: files that are whole, or not there."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from cli_support import TINY, Cli, one_line
from safetensors.torch import load_file, save_file

from xclip_fast import Engine, create_model, pipeline
from xclip_fast.checkpoints import load_model, save_model
from xclip_fast.video import load_video

ADDED = re.compile("message_|mit|prompts")  # what X-CLIP has and CLIP has not


def read_npz(path: Path) -> dict[str, np.ndarray]:
    with np.load(path, allow_pickle=False) as opened:
        return dict(opened)


def test_the_features_are_the_mean_of_the_views(cli: Cli, tiny: Path, bikes: Path, tmp_path: Path) -> None:
    out = tmp_path / "features.npz"
    code, shown, err = cli("embed", bikes, "--weights", tiny, "--out", out, "--patches", "--views", "2x3")
    assert (code, shown) == (0, "")
    assert err == f"note: wrote {out}: 1 of 1 videos, 64 numbers each\n"
    found = read_npz(out)
    with torch.inference_mode():
        expected = load_model(tiny).encode_video(load_video(bikes, frames=4, size=32, clips=2, crops=3))
    assert found["names"].tolist() == [str(bikes)]
    np.testing.assert_allclose(found["video"][0], expected.video.mean(0), rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(found["patches"][0], expected.patches.mean(0), rtol=1e-4, atol=1e-5)


def test_a_bad_file_is_left_out_and_the_rest_written(
    cli: Cli, tiny: Path, bikes: Path, one_frame: Path, bad_files: dict[str, Path], tmp_path: Path
) -> None:
    out = tmp_path / "features.safetensors"
    files = [bikes, bad_files["truncated"], one_frame, bad_files["audio"]]
    code, shown, err = cli("embed", *files, "--weights", tiny, "--out", out)
    assert (code, shown) == (2, "")
    # a file is told of when its batch is done, a warning when it is read
    said = [line.split(":")[0] for line in err.splitlines()]
    assert sorted(said) == ["error", "error", "note", "warning"]
    assert said[-1] == "note"
    from safetensors import safe_open

    with safe_open(out, framework="np") as opened:
        assert json.loads(opened.metadata()["names"]) == [str(bikes), str(one_frame)]
        assert list(opened.keys()) == ["video"]
        assert opened.get_tensor("video").shape == (2, 64)


def test_when_no_file_can_be_used_nothing_is_written(
    cli: Cli, tiny: Path, bad_files: dict[str, Path], tmp_path: Path
) -> None:
    out = tmp_path / "features.npz"
    code, _, err = cli("embed", *bad_files.values(), "--weights", tiny, "--out", out)
    assert code == 2
    assert err.splitlines()[-1] == f"error: no file could be used: {out} was not written"
    assert len(err.splitlines()) == len(bad_files) + 1
    assert not os.listdir(tmp_path)


@pytest.mark.parametrize("step", ["embed_files", "save_features"])
def test_ctrl_c_leaves_no_file(
    step: str, cli: Cli, tiny: Path, bikes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(Engine if step == "embed_files" else pipeline, step, interrupt)
    code, shown, err = cli("embed", bikes, bikes, "--weights", tiny, "--out", tmp_path / "features.npz")
    assert (code, shown) == (130, "")
    assert err.strip() == "interrupted: nothing was left half-written"
    assert not os.listdir(tmp_path)


@pytest.mark.slow
def test_a_signal_interrupts_the_real_process(bikes: Path, tmp_path: Path) -> None:
    labels = tmp_path / "labels"
    os.mkfifo(labels)
    command = [sys.executable, "-m", "xclip_fast.cli", "classify", bikes, "--labels-file", labels]
    # a shell that runs the tests in the background has them ignore the signal, and a child would inherit that
    process = subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=partial(signal.signal, signal.SIGINT, signal.SIG_DFL),
    )
    # opening the pipe waits until the process reads its labels
    with process, labels.open("w"):
        process.send_signal(signal.SIGINT)
        try:
            process.wait(timeout=10)
        except subprocess.TimeoutExpired:
            # python looks for signals just before it waits for the pipe: one in between is seen with the next
            process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=60)
    assert (process.returncode, out) == (130, "")
    assert err.strip() == "interrupted: nothing was left half-written"


def test_an_unknown_ending_is_refused_before_anything_is_read(cli: Cli, tmp_path: Path) -> None:
    code, out, err = cli("embed", "no-such-video.mp4", "--weights", "no-such-weights.pth", "--out", tmp_path / "f.txt")
    assert (code, out) == (2, "")
    one_line(err, "must end in .safetensors, .npz, .parquet")


def test_options_of_shards_without_shards_are_refused_before_anything_is_read(cli: Cli, tmp_path: Path) -> None:
    files = ("no-such-video.mp4", "--weights", "no-such-weights.pth")
    code, out, err = cli("embed", *files, "--out", tmp_path / "folder")
    assert (code, out) == (2, "")
    one_line(err, "no ending such as .safetensors", "--shard-size")
    code, out, err = cli("embed", *files, "--out", tmp_path / "f.npz", "--shard-format", "parquet")
    assert (code, out) == (2, "")
    one_line(err, "--shard-format was given without --shard-size")


@pytest.mark.parametrize(("form", "name"), [("xclip_fast", "a.safetensors"), ("official", "a.pth"), ("hf", "a")])
def test_convert_keeps_every_bit(form: str, name: str, cli: Cli, tiny: Path, tmp_path: Path) -> None:
    target = tmp_path / name
    code, out, err = cli("convert", tiny, target, "--format", form)
    assert (code, out) == (0, "")
    count = len(create_model(TINY).state_dict())
    assert err.splitlines() == [
        f"note: read {tiny} as xclip_fast: {count} tensors",
        f"note: wrote {target} in the {form} format",
    ]
    before, after = create_model(TINY, seed=0).state_dict(), load_model(target).state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_convert_refuses_what_the_format_cannot_hold(cli: Cli, tmp_path: Path) -> None:
    save_model(create_model(replace(TINY, activation="gelu"), seed=0), tmp_path / "gelu.safetensors")
    code, out, err = cli("convert", tmp_path / "gelu.safetensors", tmp_path / "out.pth", "--format", "official")
    assert (code, out) == (2, "")
    one_line(err, "gelu")
    assert os.listdir(tmp_path) == ["gelu.safetensors"]


def test_clip_weights_are_said_to_be_no_trained_model(cli: Cli, bikes: Path, tiny: Path, tmp_path: Path) -> None:
    state = load_file(tiny)
    clip = {name: tensor for name, tensor in state.items() if not ADDED.search(name)}
    save_file(clip, tmp_path / "clip.safetensors")
    added = len(state) - len(clip)
    code, out, err = cli("embed", bikes, "--weights", tmp_path / "clip.safetensors", "--out", tmp_path / "f.npz")
    assert (code, out) == (0, "")
    assert err.splitlines()[0].startswith("warning: ")
    assert f"{added} tensors that X-CLIP adds are random" in err.splitlines()[0]
    code, out, err = cli("convert", tmp_path / "clip.safetensors", tmp_path / "x.safetensors")
    assert (code, out) == (0, "")
    assert f"as clip: {len(clip)} tensors, {added} start random" in err.splitlines()[0]


@pytest.mark.parametrize("target", ["no/such/folder/x.safetensors", "pipe"])
def test_convert_to_a_place_that_cannot_be_written(target: str, cli: Cli, tiny: Path, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    code, out, err = cli("convert", tiny, tmp_path / target)
    assert (code, out) == (2, "")
    one_line(err, target)
    assert os.listdir(tmp_path) == ["pipe"]
