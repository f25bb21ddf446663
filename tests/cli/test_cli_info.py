"""``xclip-fast info`` answers whatever is broken or missing."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import xclip_fast
from xclip_fast import diagnostics

KEYS = {"version", "torch", "triton", "cuda", "extension", "backends"}


def info(*arguments: str, path: Path | None = None) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "COLUMNS": "100"}
    if path is not None:
        environment["PYTHONPATH"] = os.pathsep.join([str(path), *sys.path])
    command = [sys.executable, "-m", "xclip_fast.cli", "info", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, env=environment)


@pytest.mark.slow
def test_a_healthy_machine_has_all_keys_and_says_so() -> None:
    import torch

    done = info("--json")
    assert (done.returncode, done.stderr) == (0, "")
    facts = json.loads(done.stdout)
    assert facts.keys() >= KEYS
    assert facts["extension"].keys() == {"loaded", "reason"}
    assert facts["version"] == xclip_fast.__version__
    assert facts["torch"] == torch.__version__
    assert (facts["cuda"] is not None) == torch.cuda.is_available()
    for backend in facts["backends"].values():
        assert backend["available"] or backend["reason"]


@pytest.mark.slow
def test_broken_missing_crashing_and_noisy_libraries_are_a_sentence_each(tmp_path: Path) -> None:
    breakages = {
        "torch": "raise OSError('libcudart.so.13: cannot open shared object file\\nmore')",
        "triton": "import os; os.abort()",
        "open_clip": "raise ModuleNotFoundError('No module named open_clip', name='open_clip')",
        "pyarrow": "print('chatter'); import os; os.write(1, b'chatter')",
        "transformers": "import sys; sys.exit(5)",
    }
    for name, code in breakages.items():
        (tmp_path / f"{name}.py").write_text(code)
    done = info("--json", path=tmp_path)
    assert done.returncode == 0, done.stderr
    facts = json.loads(done.stdout)
    backends = facts["backends"]
    assert facts["torch_reason"] == "OSError: libcudart.so.13: cannot open shared object file"
    assert facts["cuda"] is None
    assert facts["triton"] is None
    assert "signal 6" in backends["triton"]["reason"]
    assert backends["open_clip"]["reason"] == "not installed"
    assert backends["pyarrow"]["available"]
    assert "ended the process with code 5" in backends["transformers"]["reason"]

    shown = info(path=tmp_path)
    assert (shown.returncode, shown.stderr) == (0, "")
    assert "libcudart" in shown.stdout


def test_a_hanging_import_ends_at_the_deadline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "decord.py").write_text("while True: pass")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(diagnostics, "DEADLINE", 1.0)
    facts = diagnostics._ask(["decord", "no_such_library"])
    assert facts["decord"]["reason"] == "no answer within 1 s"
    assert facts["no_such_library"]["reason"] == "not installed"


def test_no_interpreter_to_ask_is_a_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "executable", "/no/such/python")
    facts = diagnostics.report()
    assert facts.keys() >= KEYS
    assert "cannot start" in facts["torch_reason"]
