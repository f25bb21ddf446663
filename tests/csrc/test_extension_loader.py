"""The compiled library: whatever is wrong with its file is a sentence, never a crash; it calls stable functions."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from xclip_fast import _extension

built = pytest.mark.skipif(_extension.refusal() is not None, reason=_extension.refusal() or "")

LOAD = """
import json, sys
from pathlib import Path
import torch
from xclip_fast import _extension, diagnostics
from xclip_fast.ops import patch_embed
answers = {}
for name in sys.argv[2:]:
    _extension.LIBRARY, _extension.INTERFACE = Path(name), int(sys.argv[1])
    answers[name] = diagnostics._look_up("extension")
    frames = torch.zeros(1, 4, 4, 3, dtype=torch.uint8)
    tokens = patch_embed(frames, torch.ones(2, 3, 2, 2), torch.zeros(2), torch.zeros(5, 2))
    assert tokens.shape == (1, 5, 2)
print(json.dumps(answers))
"""


def load(*paths: Path, interface: int = _extension.INTERFACE) -> list[dict[str, object]]:
    """What a process finds that loads these files one after the other."""
    command = [sys.executable, "-c", LOAD, str(interface), *map(str, paths)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stderr) == (0, "")
    return list(json.loads(done.stdout).values())


def reasons(*paths: Path, interface: int = _extension.INTERFACE) -> list[str]:
    found = [answer["reason"] for answer in load(*paths, interface=interface)]
    assert all(isinstance(reason, str) and "\n" not in reason and len(reason) < 400 for reason in found), found
    return found  # type: ignore[return-value]


def other_library() -> Path | None:
    return next(Path(torch.__file__).parent.glob("lib/libshm*.so*"), None)


def test_missing_and_foreign_files_are_a_sentence(tmp_path: Path) -> None:
    contents = {"empty": b"", "text": b"not a library" * 100, "half a header": b"\x7fELF\x02\x01", "zeros": bytes(4096)}
    files = [tmp_path / name for name in contents]
    for file, content in zip(files, contents.values(), strict=True):
        file.write_bytes(content)
    files += [tmp_path / "nothing", tmp_path]
    if other := other_library():
        files.append(tmp_path / "_native.so")
        shutil.copy(other, files[-1])
    # one process for all of them: none loads, and each starts with a second of torch
    found = reasons(*files)
    if other:
        assert f"does not load with torch {torch.__version__}" in found.pop()
    *damaged, missing, folder = found
    assert all("is damaged (it is not a 64-bit ELF library): build it again" in reason for reason in damaged)
    assert missing == "the extension is not built: `make ext` builds it"
    assert "damaged" in folder


@built
def test_a_file_cut_short_another_torch_and_another_machine_are_a_sentence_each(tmp_path: Path) -> None:
    whole = _extension.LIBRARY.read_bytes()
    files = []
    for index, share in enumerate((0.0001, 0.01, 0.3, 0.7, 0.95, 0.9999)):
        files.append(tmp_path / f"{index}.so")
        files[-1].write_bytes(whole[: max(64, int(len(whole) * share))])
    renamed, machine = tmp_path / "renamed.so", tmp_path / "machine.so"
    renamed.write_bytes(whole.replace(b"torch_parallel_for\0", b"torch_parallel_far\0"))
    machine.write_bytes(whole[:18] + b"\xf3\x00" + whole[20:])
    *short, symbol, processor = reasons(*files, renamed, machine)
    for reason in short:
        assert f"is damaged ({len(whole)} bytes long when built" in reason
    assert "undefined symbol: torch_parallel_far" in symbol
    assert "make ext" in symbol
    assert "does not load" in processor


@built
def test_another_version_is_a_sentence(tmp_path: Path) -> None:
    good = tmp_path / "good.so"
    shutil.copy(_extension.LIBRARY, good)
    assert reasons(good, interface=99) == [
        f"the extension has interface {_extension.INTERFACE}, this xclip_fast needs 99: build it again with `make ext`"
    ]


@built
def test_the_built_library_is_found_and_described() -> None:
    (facts,) = load(_extension.LIBRARY)
    assert facts["available"]
    abilities = [] if _extension.linear_refusal() else ["float32 products"]
    abilities += [] if _extension.attention_refusal() else ["bfloat16 attention"]
    assert facts["version"] == ", ".join(["cpu", *abilities, *_extension.architectures()])
    assert (_extension.cuda_refusal() is None) == bool(_extension.architectures())


@built
def test_importing_loads_nothing() -> None:
    code = "import xclip_fast, xclip_fast.layers; print('_native' in open('/proc/self/maps').read())"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert (done.stdout, done.stderr) == ("False\n", "")


@built
def test_only_stable_functions_of_torch_are_called() -> None:
    if shutil.which("nm") is None:
        pytest.skip("nm is not installed")
    table = subprocess.run(["nm", "-D", "--undefined-only", str(_extension.LIBRARY)], capture_output=True, text=True)
    needed = [line.split()[-1] for line in table.stdout.splitlines() if " U " in line]
    system = re.compile(r".*@(GLIBC|GLIBCXX|CXXABI|GCC)_.*")
    torch_calls = [name for name in needed if not system.match(name)]
    assert len(torch_calls) > 10
    assert [name for name in torch_calls if not re.match(r"(aoti_torch|torch)_[a-z0-9_]+$", name)] == []
    # of the C++ runtime nothing carries a class of torch in its name either
    assert [name for name in needed if re.search(r"c10|2at|5torch", name)] == []


@built
def test_the_operators_are_registered_for_what_was_built() -> None:
    for name in ("patch_rows", "pack_weights", "patch_tokens", "frame_attention", "int8_rows", "pack_linear", "linear"):
        assert torch._C._dispatch_has_kernel_for_dispatch_key(f"xclip_fast_native::{name}", "CPU")
    on_cuda = torch._C._dispatch_has_kernel_for_dispatch_key("xclip_fast_native::patch_rows_cuda", "CUDA")
    assert on_cuda == bool(_extension.architectures())
    # the caller hands the stream over, as a number
    assert "int stream" in str(torch.ops.xclip_fast_native.patch_rows_cuda.default._schema)
