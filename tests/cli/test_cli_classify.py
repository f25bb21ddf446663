"""``xclip-fast classify``: real clips, every bad input, and the contract of its output."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from cli_support import TINY, Cli, one_line

from xclip_fast import Engine, XCLIPConfig, create_model, pipeline
from xclip_fast.checkpoints import load_model, save_model
from xclip_fast.engine.texts import TextTower
from xclip_fast.errors import InputError
from xclip_fast.reference import XCLIP
from xclip_fast.text import get_tokenizer
from xclip_fast.video import load_video

LABELS = "riding a bike,cooking,sleeping"
BAD = ("missing", "empty", "truncated", "text", "folder", "pipe", "audio", "sound", "huge")


def test_a_real_clip_has_the_probabilities_of_the_model(cli: Cli, tiny: Path, bikes: Path) -> None:
    code, out, err = cli("classify", bikes, "--labels", LABELS, "--weights", tiny, "--views", "2x3", "--json")
    assert (code, err) == (0, "")
    answer = json.loads(out)
    assert (answer["frames"], answer["clips"], answer["crops"], answer["classes"]) == (4, 2, 3, 3)
    (result,) = answer["results"]
    assert result["file"] == str(bikes)

    # the same by hand: softmax of each view, then the mean
    model = load_model(tiny)
    views = load_video(bikes, frames=4, size=32, clips=2, crops=3)
    tokens = get_tokenizer(TINY)(LABELS.split(","))
    with torch.inference_mode():
        expected = torch.stack([model(view[None], tokens)[0].softmax(-1) for view in views]).mean(0)
    order = expected.argsort(descending=True)
    assert [prediction["index"] for prediction in result["predictions"]] == order.tolist()
    assert [prediction["label"] for prediction in result["predictions"]] == [LABELS.split(",")[i] for i in order]
    found = torch.tensor([prediction["probability"] for prediction in result["predictions"]])
    torch.testing.assert_close(found, expected[order])


def test_the_table_names_the_file_and_the_best_labels(cli: Cli, tiny: Path, bikes: Path) -> None:
    code, out, err = cli("classify", bikes, "--labels", LABELS, "--weights", tiny, "--top-k", "2")
    assert (code, err) == (0, "")
    assert out.splitlines()[0] == str(bikes)
    assert sum(label in out for label in LABELS.split(",")) == 2
    assert max(map(len, out.splitlines()[1:])) <= 80


def test_a_template_changes_the_texts(cli: Cli, tiny: Path, bikes: Path) -> None:
    plain = cli("classify", bikes, "--labels", LABELS, "--weights", tiny, "--json")
    framed = cli("classify", bikes, "--labels", LABELS, "--weights", tiny, "--json", "--template", "a video of {}")
    assert (plain[0], framed[0]) == (0, 0)
    first, second = (json.loads(out)["results"][0]["predictions"] for _, out, _ in (plain, framed))
    assert {entry["label"] for entry in first} == {entry["label"] for entry in second}
    assert [entry["probability"] for entry in first] != [entry["probability"] for entry in second]


@pytest.mark.parametrize("kind", BAD)
def test_a_bad_file_is_one_line_and_exit_code_2(kind: str, cli: Cli, tiny: Path, bad_files: dict[str, Path]) -> None:
    code, out, err = cli("classify", bad_files[kind], "--labels", LABELS, "--weights", tiny)
    assert (code, out) == (2, "")
    one_line(err, str(bad_files[kind]))


def test_in_a_batch_the_bad_files_are_reported_and_the_rest_done(
    cli: Cli, tiny: Path, bikes: Path, bad_files: dict[str, Path]
) -> None:
    files = [bikes, *bad_files.values(), bikes]
    code, out, err = cli("classify", *files, "--labels", LABELS, "--weights", tiny, "--json")
    assert code == 2
    results = json.loads(out)["results"]
    assert [result["file"] for result in results] == [str(file) for file in files]
    assert "error" not in results[0]
    assert results[0] == results[-1]
    for result in results[1:-1]:
        assert result.keys() == {"file", "error"}
        assert "\n" not in result["error"]
    assert err.splitlines() == [f"error: {result['error']}" for result in results[1:-1]]


def test_a_video_of_one_frame_is_classified_with_a_warning(cli: Cli, tiny: Path, one_frame: Path) -> None:
    code, out, err = cli("classify", one_frame, "--labels", LABELS, "--weights", tiny, "--json")
    assert code == 0
    assert len(json.loads(out)["results"][0]["predictions"]) == 3
    assert err.startswith("warning: ")
    assert err.count("\n") == 1


def test_hostile_names_neither_drive_the_terminal_nor_break_the_table(
    cli: Cli, tiny: Path, bikes: Path, tmp_path: Path
) -> None:
    video = tmp_path / "\x1b[2J[red]clip[bold]\n.mp4"
    shutil.copy(bikes, video)
    label = "\x1b]0;owned\x07[blink]x[/blink]"
    code, out, err = cli("classify", video, tmp_path / "\x1b[2Jgone.mp4", "--labels", label, "--weights", tiny)
    assert code == 2
    for text in (out, err):
        assert "\x1b" not in text
        assert "\x07" not in text
    assert out.splitlines()[0].endswith(r"/\x1b[2J[red]clip[bold]\n.mp4")
    assert "[blink]x[/blink]" in out
    assert err.count("\n") == 1


@pytest.mark.parametrize(
    ("labels", "words"),
    [
        ("", "blank"),
        ("a,,b", "label 2 is blank"),
        (" , ", "blank"),
        ("run,walk,run", "labels 1 and 3 are the same"),
        ("Run,run", "labels 1 and 2 are the same"),
    ],
)
def test_labels_that_cannot_be_used(labels: str, words: str, cli: Cli, tiny: Path, bikes: Path) -> None:
    code, out, err = cli("classify", bikes, "--labels", labels, "--weights", tiny, "--json")
    assert (code, out) == (2, "")
    one_line(err, words)


@pytest.mark.parametrize("device", ["banana", "meta", "mps", "", "CPU", "cpu:x", "cuda:300"])
@pytest.mark.parametrize("command", [("classify", "--labels", "a,b"), ("embed", "--out", "f.npz")], ids=str)
def test_other_devices_are_refused(command: tuple[str, ...], device: str, cli: Cli, tiny: Path, bikes: Path) -> None:
    code, out, err = cli(*command, bikes, "--weights", tiny, "--device", device)
    assert (code, out) == (2, "")
    one_line(err, f"unknown device {device!r}: choose auto, cpu, cuda or cuda:N")


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (None, "No such file"),
        (b"", "holds no label"),
        (b"\n \n", "holds no label"),
        (b"\xff\xfe\x00binary", "not UTF-8"),
        (b"a\nb\na\n", "the same"),
        (b"x" * ((16 << 20) + 1), "larger than 16 MiB"),
    ],
    ids=["missing", "empty", "blank", "binary", "repeated", "huge"],
)
def test_label_files_that_cannot_be_used(
    content: bytes | None, words: str, cli: Cli, tiny: Path, bikes: Path, tmp_path: Path
) -> None:
    file = tmp_path / "labels.txt"
    if content is not None:
        file.write_bytes(content)
    code, out, err = cli("classify", bikes, "--labels-file", file, "--weights", tiny)
    assert (code, out) == (2, "")
    one_line(err, words)


def test_a_file_without_a_name_is_named_in_its_refusal(cli: Cli, tiny: Path) -> None:
    code, out, err = cli("classify", "", "--labels", "a,b", "--weights", tiny)
    assert (code, out) == (2, "")
    one_line(err, "error: '': cannot be read (No such file")


def test_a_label_file_may_have_a_byte_order_mark_commas_and_blank_lines(tmp_path: Path) -> None:
    file = tmp_path / "labels.txt"
    file.write_bytes("\ufeffrun, fast\r\n\r\n  Straße \n".encode())
    assert pipeline.read_labels(str(file)) == ["run, fast", "Straße"]


def test_ten_thousand_labels(cli: Cli, tiny: Path, bikes: Path, tmp_path: Path) -> None:
    labels = [f"class {number}" for number in range(10_000)]
    (tmp_path / "labels.txt").write_text("\n".join(labels))
    code, out, err = cli(
        "classify", bikes, "--labels-file", tmp_path / "labels.txt", "--weights", tiny, "--json", "--top-k", "10000"
    )
    assert (code, err) == (0, "")
    predictions = json.loads(out)["results"][0]["predictions"]
    assert {prediction["label"] for prediction in predictions} == set(labels)
    shares = [prediction["probability"] for prediction in predictions]
    assert shares == sorted(shares, reverse=True)
    assert sum(shares) == pytest.approx(1, abs=1e-3)


@pytest.mark.parametrize(
    ("option", "value", "words"),
    [
        ("--preset", "nope", "unknown preset 'nope': choose one of official"),
        ("--backend", "vlc", "unknown backend 'vlc': choose one of auto"),
        ("--dtype", "int8", "unknown dtype 'int8': choose one of float32"),
        ("--device", "toaster", "toaster"),
        ("--device", "cuda:99", "cuda:99"),
        ("--views", "4x2", "1 or 3 crops"),
        ("--views", "5000", "up to 100 clips"),
        ("--template", "no place", "{}"),
    ],
)
def test_options_that_cannot_be_used(option: str, value: str, words: str, cli: Cli, tiny: Path, bikes: Path) -> None:
    code, out, err = cli("classify", bikes, "--labels", LABELS, "--weights", tiny, option, value)
    assert (code, out) == (2, "")
    one_line(err, words)


class Bomb:
    """Runs a command when it is unpickled."""

    def __init__(self, witness: Path) -> None:
        self.witness = witness

    def __reduce__(self) -> tuple[Any, ...]:
        import os

        return os.mkdir, (str(self.witness),)


def write_bad_weights(kind: str, path: Path, tiny: Path) -> None:
    from safetensors.torch import load_file, save_file

    state = load_file(tiny)
    if kind == "pickle code":
        torch.save({"model": state, "bomb": Bomb(path.with_suffix(".ran"))}, path)
    elif kind == "missing keys":
        state.pop("visual.proj")
        torch.save(state, path)
    elif kind == "wrong shapes":
        state["visual.proj"] = torch.zeros(3, 3)
        torch.save(state, path)
    elif kind == "not a number":
        state["visual.proj"] = torch.full((64, 64), torch.nan)
        torch.save(state, path)
    elif kind == "other tensors":
        save_file({"weight": torch.zeros(2, 2)}, path)
    elif kind == "text":
        path.write_text("weights? no\n")
    elif kind == "empty":
        path.touch()
    elif kind == "truncated":
        path.write_bytes(tiny.read_bytes()[:1000])
    elif kind == "folder":
        path.mkdir()


@pytest.mark.parametrize(
    "kind",
    [
        "pickle code",
        "missing keys",
        "wrong shapes",
        "not a number",
        "other tensors",
        "text",
        "empty",
        "truncated",
        "folder",
        "missing",
    ],
)
def test_weights_that_cannot_be_used(kind: str, cli: Cli, tiny: Path, bikes: Path, tmp_path: Path) -> None:
    weights = tmp_path / "weights.pth"
    write_bad_weights(kind, weights, tiny)
    commands = (
        ("classify", bikes, "--labels", LABELS, "--weights", weights, "--json"),
        ("embed", bikes, "--weights", weights, "--out", tmp_path / "out.npz"),
        ("convert", weights, tmp_path / "out.safetensors"),
    )
    before = sorted(tmp_path.iterdir())
    for command in commands:
        code, out, err = cli(*command)
        assert (code, out) == (2, "")
        one_line(err)
    assert sorted(tmp_path.iterdir()) == before


def test_ctrl_c_in_the_middle_is_one_line(cli: Cli, tiny: Path, bikes: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(self: object, views: object, count: int) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(pipeline.Classifier, "top", interrupt)
    code, out, err = cli("classify", bikes, bikes, "--labels", LABELS, "--weights", tiny, "--json")
    assert (code, out) == (130, "")
    assert err.strip() == "interrupted: nothing was left half-written"


def test_too_little_memory_is_the_fault_of_one_file(
    cli: Cli, tiny: Path, bikes: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    top = pipeline.Classifier.top
    faults: list[BaseException | None] = [
        MemoryError(),
        torch.OutOfMemoryError("CUDA out of memory"),
        RuntimeError("[enforce fail at alloc_cpu.cpp] DefaultCPUAllocator: can't allocate memory"),
        None,
    ]

    def starve(self: pipeline.Classifier, views: torch.Tensor, count: int) -> list[pipeline.Prediction]:
        if fault := faults.pop(0):
            raise fault
        return top(self, views, count)

    monkeypatch.setattr(pipeline.Classifier, "top", starve)
    code, out, err = cli("classify", *[bikes] * 4, "--labels", LABELS, "--weights", tiny, "--json")
    assert code == 2
    results = json.loads(out)["results"]
    assert ["error" in result for result in results] == [True, True, True, False]
    assert err.count("not enough memory") == 3


def test_a_fault_of_the_program_is_not_hidden(
    tiny: Path, bikes: Path, cli: Cli, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(self: object, views: object, count: int) -> None:
        raise RuntimeError("a fault")

    monkeypatch.setattr(pipeline.Classifier, "top", fail)
    with pytest.raises(RuntimeError, match="a fault"):
        cli("classify", bikes, "--labels", LABELS, "--weights", tiny)


@pytest.mark.parametrize("reference", [(), ("--reference",)], ids=["engine", "reference"])
def test_weights_that_overflow_are_said_to(reference: tuple[str, ...], tmp_path: Path, cli: Cli, bikes: Path) -> None:
    model = create_model(TINY, seed=0)
    with torch.no_grad():
        model.logit_scale.fill_(1000)
    save_model(model, tmp_path / "overflow.safetensors")
    code, out, err = cli(
        "classify", bikes, "--labels", LABELS, "--weights", tmp_path / "overflow.safetensors", "--json", *reference
    )
    assert code == 2
    one_line(err, str(bikes), "not numbers")
    assert "error" in json.loads(out)["results"][0]


def test_equal_labels_for_the_model_keep_their_order() -> None:
    # more labels than one sort network block, all alike for a text tower without weights
    config = XCLIPConfig.from_dict({**TINY.to_dict(), "frames": 2})
    model = create_model(config, seed=0)
    with torch.no_grad():
        model.text_projection.zero_()
        model.prompts_generator.alpha.zero_()
    classifier = pipeline.Classifier(model, [f"label {n}" for n in range(50)], get_tokenizer(config))
    views = torch.zeros(1, 2, 32, 32, 3, dtype=torch.uint8)
    assert [prediction.index for prediction in classifier.top(views, 50)] == list(range(50))


@pytest.mark.parametrize("reference", [False, True])
def test_encoded_class_names_are_kept_for_the_next_run(
    reference: bool, cli: Cli, tiny: Path, bikes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    command = ["classify", bikes, "--labels", LABELS, "--weights", tiny, "--json", "--text-cache", tmp_path / "texts"]
    command[2:2] = ["--reference"] if reference else []
    first = cli(*command)
    assert first[0] == 0
    assert len(os.listdir(tmp_path / "texts")) == 1

    def fail(*_: object) -> None:
        raise AssertionError("the texts are known")

    monkeypatch.setattr(XCLIP, "encode_text", fail)
    monkeypatch.setattr(TextTower, "encode_text", fail)
    assert cli(*command) == first
    code, out, err = cli(*command[:-1], tiny)
    assert (code, out) == (2, "")
    one_line(err, str(tiny), "another folder")


def test_the_library_refuses_what_the_command_line_refuses() -> None:
    model = create_model(TINY, seed=0)
    with pytest.raises(InputError, match="blank"):
        pipeline.Classifier(model, ["a", " "], get_tokenizer(TINY))
    with pytest.raises(InputError, match=r"\{\}"):
        pipeline.Classifier(model, ["a"], get_tokenizer(TINY), template="no place")
    with pytest.raises(ValueError, match=r"give it to Engine\(model, text_cache=...\)"):
        pipeline.Classifier(Engine(model), ["a"], get_tokenizer(TINY), text_cache="texts")


@pytest.mark.slow
def test_the_real_process_keeps_json_alone_on_stdout(tiny: Path, bikes: Path, bad_files: dict[str, Path]) -> None:
    command = [sys.executable, "-m", "xclip_fast.cli", "classify", bad_files["truncated"], bikes]
    done = subprocess.run(
        [*command, "--labels", LABELS, "--weights", tiny, "--json"], capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 2
    assert [result.keys() >= {"error"} for result in json.loads(done.stdout)["results"]] == [True, False]
    assert "Traceback" not in done.stderr
    one_line(done.stderr)


def on_a_terminal(command: list[object], stdout: int | None = None) -> tuple[int, str]:
    """Run a command with stderr, and stdout unless one is given, on a pseudo-terminal: exit code, what it shows."""
    terminal, end = os.openpty()
    with subprocess.Popen(command, stdout=end if stdout is None else stdout, stderr=end) as process:
        os.close(end)
        shown = b""
        try:
            while part := os.read(terminal, 1 << 16):
                shown += part
        except OSError:
            pass  # how Linux says that the other side is closed
        os.close(terminal)
    return process.returncode, shown.decode()


@pytest.mark.slow
def test_the_progress_bar_keeps_out_of_redirected_output(tiny: Path, bikes: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "xclip_fast.cli", "classify", bikes, bikes, "--labels", LABELS, "--weights", tiny]
    with (tmp_path / "out.txt").open("wb") as file:
        code, shown = on_a_terminal(command, stdout=file.fileno())
    out = (tmp_path / "out.txt").read_text()
    assert code == 0
    assert "2/2" in shown
    assert "cooking" not in shown
    assert out.count(f"{bikes}\n") == out.count("cooking") == 2
    assert "\x1b" not in out


@pytest.mark.slow
def test_the_progress_bar_makes_room_on_the_terminal(tiny: Path, bikes: Path) -> None:
    command = [sys.executable, "-m", "xclip_fast.cli", "classify", bikes, bikes, "--labels", LABELS, "--weights", tiny]
    code, shown = on_a_terminal(command)
    assert code == 0
    assert "2/2" in shown
    # a cleared line, the style of the name, the name
    assert len(re.findall(rf"\x1b\[2K(\x1b\[[0-9;]*m)?{re.escape(str(bikes))}", shown)) == 2
