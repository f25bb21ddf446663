"""The committed reproduction is one of the full recipe, and what the pages say of it is in it."""

from __future__ import annotations

import json
import re
from pathlib import Path

from markupsafe import escape

from xclip_fast.reproduce import FULL
from xclip_fast.reproduce.plan import jobs
from xclip_fast.reproduce.results import FORMAT, summarise

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "benchmarks" / "results" / "reproduce"
FOUND = json.loads((FOLDER / "reproduction.json").read_text(encoding="utf-8"))


def test_it_holds_every_run_of_the_full_recipe() -> None:
    assert FOUND["format"] == FORMAT
    assert FOUND["recipe"] == FULL.to_dict()
    assert [run["job"] for run in FOUND["runs"]] == [vars(job) for job in jobs(FULL)]
    assert all(FOUND["facts"][name] for name in ("processor", "commit", "torch", "python", "utc"))


def test_its_summary_is_that_of_its_runs() -> None:
    assert json.loads(json.dumps(summarise(FOUND["runs"]).to_dict())) == FOUND["summary"]


def test_the_page_is_of_these_figures() -> None:
    page = (FOLDER / "reproduction.html").read_text(encoding="utf-8")
    for claim in summarise(FOUND["runs"]).claims:
        assert str(escape(claim.figures)) in page
    assert FOUND["facts"]["commit"] in page


def test_nothing_says_on_whose_machine_it_ran() -> None:
    for path in FOLDER.iterdir():
        assert not re.search(r"/(home|root|tmp|work|Users)/", path.read_text(encoding="utf-8")), path.name


def test_the_demos_page_says_what_the_runs_say_of_messages() -> None:
    text = " ".join((ROOT / "xclip_fast" / "demo" / "README.md").read_text(encoding="utf-8").split())
    ladder = summarise(FOUND["runs"]).ladder
    ours, without = (f"{100 * ladder[name].mean:.0f} %" for name in ("full", "no_cfa"))
    assert f"X-CLIP is right on {ours} of the test clips, and without CFA on {without}" in text
