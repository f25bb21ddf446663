"""Usage, exit codes and output streams: contracts that hold before any model is loaded."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

import xclip_fast
from xclip_fast.cli import main
from xclip_fast.cli.console import printable, safe, stdout, table
from xclip_fast.cli.options import parse_views
from xclip_fast.errors import InputError

COMMAND = [sys.executable, "-m", "xclip_fast.cli"]
COMMANDS = ("bench", "classify", "convert", "demo", "embed", "evaluate", "flops", "info", "profile", "split", "verify")


def run(*arguments: str, **options: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run([*COMMAND, *arguments], capture_output=True, text=True, timeout=120, **options)  # type: ignore[call-overload, no-any-return]


def test_help_names_every_command_and_the_exit_codes_without_importing_torch() -> None:
    code = (
        "import sys; from xclip_fast.cli import main; code = main(['--help']); "
        "print('torch' in sys.modules or 'numpy' in sys.modules, file=sys.stderr); sys.exit(code)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr) == (0, "False\n")
    for word in (*COMMANDS, "130 interrupted"):
        assert word in done.stdout


@pytest.mark.parametrize("command", COMMANDS)
def test_each_command_explains_itself(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([command, "--help"]) == 0
    out, err = capsys.readouterr()
    assert "Exit codes" in out
    assert not err


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"xclip-fast {xclip_fast.__version__}\n"


def test_no_command_shows_the_help_and_is_a_usage_error(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 2
    assert "classify" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["no-such-command"], "No such command 'no-such-command'"),
        (["classify"], "Missing argument 'VIDEO"),
        (["classify", "a.mp4", "--lables", "x"], "No such option: --lables"),
        (["classify", "a.mp4"], "either --labels a,b,c or --labels-file"),
        (["classify", "a.mp4", "--labels", "x", "--labels-file", "y"], "either --labels a,b,c or --labels-file"),
        (["classify", "a.mp4", "--labels", "x", "--top-k", "0"], "--top-k"),
        (["classify", "a.mp4", "--labels", "x", "--frames", "-3"], "--frames"),
        (["classify", "a.mp4", "--labels", "x", "--frames", "eight"], "--frames"),
        (["classify", "a.mp4", "--labels", "x", "--views", "0x3"], "--views must be CLIPSxCROPS such as 4x3"),
        (["embed", "a.mp4"], "Missing option '--out'"),
        (["embed", "a.mp4", "--out", "features.txt"], "must end in .safetensors, .npz, .parquet"),
        (["embed", "a.mp4", "--out", "/no/such/folder/f.npz"], "there is no folder"),
        (["convert", "a.pth"], "Missing argument 'TARGET'"),
        (["convert", "a.pth", "b", "--format", "onnx"], "unknown format 'onnx'"),
        (["bench", "--variant", "B/17"], "unknown variant 'B/17': choose one of B/32"),
        (["bench", "--providers", "layers,fastest"], "unknown provider 'fastest'"),
        (["bench", "--op", "softmax"], "unknown case 'softmax'"),
        (["bench", "--dtype", "int4"], "unknown dtype 'int4'"),
        (["bench", "--mode", "backward"], "unknown mode 'backward'"),
        (["bench", "--batch", "0"], "--batch"),
        (["bench", "--out", "/no/such/folder/r.json"], "there is no folder"),
        (["bench", "--device", "tpu"], "unknown device 'tpu'"),
        (["bench", "--variant", "L/14-336", "--batch", "4000", "--frames", "64"], "ask for a smaller batch"),
        (["verify", "--op", "softmax"], "unknown op 'softmax'"),
        (["verify", "--dtype", "int4"], "unknown dtype 'int4'"),
        (["verify", "--device", "tpu"], "unknown device 'tpu'"),
        (["profile", "--provider", "fastest"], "unknown provider 'fastest'"),
        (["profile", "--out", "/no/such/folder/t.json"], "there is no folder"),
    ],
)
def test_wrong_usage_is_one_line_and_exit_code_2(
    arguments: list[str], words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(arguments) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    assert words in err


@pytest.mark.parametrize("missing", ["typer", "rich"])
def test_a_missing_library_of_the_command_line_is_one_line(missing: str) -> None:
    code = f"import sys; sys.modules[{missing!r}] = None; from xclip_fast.cli import main; sys.exit(main(['info']))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1
    assert missing in done.stderr
    assert "pip install 'xclip-fast[cli]'" in done.stderr


def test_without_torch_the_line_points_to_info() -> None:
    code = (
        "import sys; sys.modules['torch'] = None; from xclip_fast.cli import main; "
        "sys.exit(main(['classify', 'a.mp4', '--labels', 'a']))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("error: a library does not import (")
    assert "torch" in done.stderr
    assert done.stderr.endswith(": see xclip-fast info\n")
    assert done.stderr.count("\n") == 1


def test_a_closed_pipe_is_no_traceback() -> None:
    read, write = os.pipe()
    os.close(read)
    try:
        done = subprocess.run([*COMMAND, "flops", "B/32"], stdout=write, stderr=subprocess.PIPE, text=True, timeout=120)
    finally:
        os.close(write)
    assert (done.returncode, done.stderr) == (141, "")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs a device that is always full")
def test_a_full_disk_is_one_line() -> None:
    with open("/dev/full", "w") as full:
        done = subprocess.run([*COMMAND, "--help"], stdout=full, stderr=subprocess.PIPE, text=True, timeout=60)
    assert done.returncode == 2
    assert done.stderr == "error: output: No space left on device\n"


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs a device that is always full")
@pytest.mark.slow
def test_a_log_on_a_full_disk_changes_no_exit_code(tmp_path: Path) -> None:
    for command, code in ((["convert", "demo", "a.safetensors"], 0), (["convert", "nothing", "b.safetensors"], 2)):
        with open("/dev/full", "w") as full:
            done = subprocess.run([*COMMAND, *command], stderr=full, stdout=subprocess.PIPE, cwd=tmp_path, timeout=60)
        assert (done.returncode, done.stdout) == (code, b"")
    assert [entry.name for entry in tmp_path.iterdir()] == ["a.safetensors"]


def test_a_closed_stdout_is_no_crash() -> None:
    done = subprocess.run(["sh", "-c", f"{sys.executable} -m xclip_fast.cli --help >&-"], timeout=60)
    assert done.returncode == 0


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("plain Straße 日本", "plain Straße 日本"),
        ("\x1b[2Jgone", r"\x1b[2Jgone"),
        ("two\nlines\r", r"two\nlines\r"),
        ("\x9b31m", r"\x9b31m"),
        ("evil\u202e4pm", r"evil\u202e4pm"),
        ("bad\udcff", r"bad\udcff"),
    ],
)
def test_text_from_outside_cannot_drive_the_terminal(text: str, shown: str) -> None:
    assert printable(text) == shown


def test_markup_in_text_from_outside_stays_text() -> None:
    made = table("title", "label")
    made.title = safe("[red]file[/red]")
    made.add_row(safe("[link=http://x]label[/link]"))
    with stdout.capture() as captured:
        stdout.print(made)
    assert "[red]file[/red]" in captured.get()
    assert "[link=http://x]label[/link]" in captured.get()


@pytest.mark.parametrize(("text", "views"), [("4x3", (4, 3)), ("1", (1, 1)), (" 4X3 ", (4, 3)), ("10", (10, 1))])
def test_views(text: str, views: tuple[int, int]) -> None:
    assert parse_views(text) == views


@pytest.mark.parametrize("text", ["", "x", "4x", "x3", "0", "4x0", "-1", "4x3x2", "1.5", "٤x٣", "99999"])
def test_views_that_are_none(text: str) -> None:
    with pytest.raises(InputError, match="--views"):
        parse_views(text)
