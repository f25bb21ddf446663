"""``xclip-fast reproduce``: a reproduction of a few steps, by the command."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
from cli_support import Cli, one_line

import xclip_fast.reproduce
from xclip_fast.reproduce import QUICK

TINY = replace(QUICK, pretraining_steps=2, steps=2, few_shot_steps=2, shots=(2,), tested=24)


@pytest.mark.slow
def test_it_runs_goes_on_and_says_what_does_not_hold(cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(xclip_fast.reproduce, "QUICK", TINY)
    out = tmp_path / "out"
    code, text, err = cli("reproduce", "--quick", "--out", str(out))
    # two steps teach nothing
    assert code == 1
    assert "does not hold" in err
    assert "DOES NOT HOLD" in text
    assert "X-CLIP without cross-frame attention" in text
    assert (out / "reproduction.html").is_file()

    # all runs are kept, so this is only read; and JSON is all there is on stdout
    code, text, _ = cli("reproduce", "--quick", "--out", str(out), "--json")
    assert code == 1
    assert json.loads(text) == json.loads((out / "reproduction.json").read_text(encoding="utf-8"))

    code, _, err = cli("reproduce", "--out", str(out))
    assert code == 2
    one_line(err, "another recipe", "choose another folder")


def test_a_file_in_the_place_of_the_folder_is_refused(cli: Cli, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    code, _, err = cli("reproduce", "--quick", "--out", str(tmp_path / "file"))
    assert code == 2
    one_line(err, "cannot make the folder")
