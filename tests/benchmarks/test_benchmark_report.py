"""The report: one file without network or script, whatever the results hold; figures only of what was measured."""

from __future__ import annotations

import json
import re
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from xclip_fast.bench.figures import figures, label
from xclip_fast.bench.models import Effort
from xclip_fast.bench.record import Amdahl, Case, Check, Roof, Row, Run, Timing
from xclip_fast.bench.report import render, write_figure, write_report
from xclip_fast.cli import main
from xclip_fast.cli.bench import _show as show
from xclip_fast.errors import InputError
from xclip_fast.pages import COLOURS

CASE = Case("model", "B/32", 8, 1, 5, "float32", "forward", "normalised", "cpu")
CHECK = Check("the definition in float64", 1e-7, 2e-7, 6e-7, True, bit_repeat=True)
TIMING = Timing("wall", "warm", 10.0, 9.0, 11.0, 0.5, "hf-sdpa", 1.5, 1.4, 1.6, 0.05, "faster", 5)
BASE = replace(TIMING, ratio=1.0, ratio_p10=0.98, ratio_p90=1.02, verdict="no difference")
ROOF = Roof(10**9, 10**7, 5.0, 0.5)
CEILINGS = {"float32_tflops": 0.1, "bfloat16_tflops": 0.2, "copy_gbs": 10.0}
FACTS = {
    "utc": "2026-01-01T00:00:00+00:00",
    "commit": "abc",
    "xclip_fast": "0.1.0",
    "processor": "a processor",
    "gpu": None,
}


@pytest.fixture
def _short(monkeypatch: pytest.MonkeyPatch) -> None:
    # measuring takes longer than what is tested here
    monkeypatch.setattr("xclip_fast.bench.run.ceilings", lambda *arguments, **named: CEILINGS)
    monkeypatch.setattr("xclip_fast.bench.run.QUICK", Effort(blocks=1, block=0.001, memory=False))


def rows(batch: int) -> list[Row]:
    case, op = replace(CASE, batch=batch), replace(CASE, name="layer_norm", batch=batch)
    return [
        Row(case, "hf-sdpa", "timed", None, CHECK, BASE, ROOF, memory_mb=900.0),
        Row(case, "layers", "timed", None, CHECK, TIMING, ROOF, launches=160, memory_mb=800.0),
        Row(case, "engine", "unavailable", "why <not>"),
        Row(op, "reference", "timed", None, CHECK, replace(BASE, baseline="reference"), ROOF, Amdahl(0.1, 1.0, 1.1)),
        Row(op, "torch", "timed", None, CHECK, replace(TIMING, baseline="reference"), ROOF, Amdahl(0.1, 1.05, 1.1)),
    ]


def whole(*batches: int) -> Run:
    found = [row for batch in batches for row in rows(batch)]
    return Run(FACTS, {"float32_tflops": 0.1, "copy_gbs": 10.0}, found)


def test_every_figure_is_there_when_its_numbers_are() -> None:
    found = figures(whole(1, 4))
    assert list(found) == [
        "Times as fast as the baseline",
        "Latency against batch",
        "Ops: times as fast as the definition",
        "Roofline",
        "Peak memory",
    ]
    assert "Time of the parts" in figures(whole(1))
    assert all(svg.startswith("<svg") and svg.rstrip().endswith("</svg>") for svg in found.values())
    assert "layers" in found["Times as fast as the baseline"]
    assert "mathdefault" not in "".join(found.values())


def test_a_provider_has_one_colour_in_every_figure() -> None:
    found = figures(whole(1, 4))
    # the second provider of the run: its bars, its line, its points
    for title in ("Times as fast as the baseline", "Latency against batch", "Roofline", "Peak memory"):
        assert COLOURS[1] in found[title]


def test_nothing_measured_is_a_report_without_figures() -> None:
    empty = Run(FACTS, {}, [Row(CASE, "engine", "failed", "out of luck")])
    assert figures(empty) == {}
    text = render(empty)
    assert "<svg" not in text
    assert "out of luck" in text
    assert "<h1>How fast X-CLIP is on a processor</h1>" in render(Run(FACTS, {}, []))


def test_the_report_needs_no_network_and_no_script(tmp_path: Path) -> None:
    path = tmp_path / "report.html"
    write_report(whole(1, 4), path)
    text = path.read_text()
    assert [path] == list(tmp_path.iterdir())
    # names of XML vocabularies are no addresses to fetch
    outside = set(re.findall(r'(?:src|href|url)\s*[=(]\s*["\']?(?!#)([^"\')\s>]+)', text))
    assert outside == set()
    assert "<script" not in text
    assert "default-src 'none'" in text
    shown = ["B/32, batch 4, float32", "1.500 (1.400 to 1.600)", "10.0 (9.0 to 11.0)", "6.0e-07", "why &lt;not&gt;"]
    for words in (*shown, "160", "50 %", "<td>yes</td>", ">800<", "Memory is the peak of a step"):
        assert words in text
    # what was not looked at is neither yes nor no
    bare = [replace(row, check=replace(CHECK, bit_repeat=None), memory_mb=None) for row in rows(1) if row.check]
    text = render(Run(FACTS, {}, bare))
    for words in ("<td>yes</td>", "<td>no</td>", "Memory is the peak"):
        assert words not in text


def test_a_row_is_named_by_all_that_sets_it_apart() -> None:
    bytes_in, training = replace(CASE, input="uint8"), replace(CASE, direction="train")
    assert label(Row(CASE, "layers", "timed", timing=TIMING)) == "B/32, batch 1, float32"
    assert label(Row(bytes_in, "layers", "timed", timing=replace(TIMING, cache="cold"))) == (
        "B/32, batch 1, float32, bytes, cold"
    )
    assert label(Row(training, "layers", "failed", "why")) == "B/32, batch 1, float32, train"
    # every patch embedding takes bytes
    assert (
        label(Row(replace(bytes_in, name="patch_embed"), "torch", "failed", "why")) == "patch_embed, batch 1, float32"
    )


def test_pages_of_paper_cut_no_figure_and_repeat_the_header() -> None:
    text = render(whole(1, 4))
    printed = text[text.index("@media print") : text.index("</style>")]
    assert "break-inside: avoid" in printed
    assert "max-height" in printed
    assert text.count("<thead>") == text.count("</thead>") == 2


@pytest.mark.parametrize(
    "hostile",
    ["<script>alert(1)</script>", '"><img src=x onerror=alert(1)>', "{{ 7 * 7 }}", "$\\frac{1}{2}$", "]]></svg><b>"],
)
def test_text_of_results_stays_text(hostile: str) -> None:
    run = Run(
        {**FACTS, "processor": hostile, "commit": hostile},
        {"float32_tflops": 0.1, "copy_gbs": 10.0},
        [
            Row(CASE, hostile, "timed", None, CHECK, TIMING, ROOF, memory_mb=1.0),
            Row(CASE, "engine", "failed", hostile),
        ],
    )
    text = render(run)
    assert "<script" not in text
    assert "<img" not in text
    assert "<b>" not in text
    assert "49" not in re.sub(r"<svg.*?</svg>", "", text, flags=re.DOTALL)


def test_the_same_run_gives_the_same_bytes() -> None:
    assert render(whole(1, 4)) == render(whole(1, 4))


@pytest.mark.parametrize(("suffix", "begin"), [("svg", b"<?xml"), ("png", b"\x89PNG")])
def test_a_figure_for_a_readme(suffix: str, begin: bytes, tmp_path: Path) -> None:
    path = tmp_path / f"speed.{suffix}"
    write_figure(whole(1), path)
    assert path.read_bytes().startswith(begin)


def test_what_cannot_be_drawn_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(InputError, match=r"\.svg or \.png, found 'speed.gif'"):
        write_figure(whole(1), tmp_path / "speed.gif")
    with pytest.raises(InputError, match="nothing to draw"):
        write_figure(Run(FACTS, {}, []), tmp_path / "speed.svg")
    monkeypatch.setitem(sys.modules, "jinja2", None)
    with pytest.raises(InputError, match=r"found no jinja2: pip install 'xclip-fast\[bench\]'"):
        render(whole(1))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.usefixtures("_short")
def test_the_command_writes_all_forms(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    paths = {form: tmp_path / f"bench.{form}" for form in ("json", "csv", "html")}
    arguments = ["bench", "--variant", "tiny", "--dtype", "float32", "--providers", "hf-sdpa,layers", "--json"]
    arguments += ["--out", str(paths["json"]), "--csv", str(paths["csv"]), "--html", str(paths["html"])]
    assert main(arguments) == 0
    out = capsys.readouterr().out
    assert Run.load(paths["json"]).to_dict() == json.loads(out)
    assert paths["csv"].read_text().count("\n") == 3
    assert "<svg" in paths["html"].read_text()
    assert sorted(tmp_path.iterdir()) == sorted(paths.values())


@pytest.mark.usefixtures("_short")
def test_the_table_of_the_command_fits_80_columns(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["bench", "--variant", "tiny", "--op", "mean_norm_over_frames", "--dtype", "float32,bfloat16"]
    assert main(arguments) == 0
    out, err = capsys.readouterr()
    assert "note: bfloat16 torch: timed" in err
    assert "baseline" in out
    assert " s in all" in out.splitlines()[-1]
    assert max(len(line) for line in out.splitlines() if not line.startswith(("ceilings", "triton", "extension"))) <= 80


@pytest.mark.usefixtures("_short")
def test_the_command_measures_from_bytes_with_cold_caches(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["bench", "--variant", "tiny", "--dtype", "float32", "--providers", "layers"]
    assert main([*arguments, "--input", "uint8", "--cache", "cold"]) == 0
    out = capsys.readouterr().out
    assert "uint8 frames, cold caches" in " ".join(out.split())


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--input", "jpeg"], "unknown input 'jpeg': choose one of normalised, uint8"),
        (["--cache", "hot"], "unknown cache 'hot': choose one of warm, cold"),
        (["--op", "layer_norm", "--input", "uint8"], "layer_norm has its own"),
        (["--mode", "train", "--input", "uint8"], "bytes have no gradient to check"),
    ],
)
def test_options_that_cannot_be_are_a_line(
    arguments: list[str], words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["bench", "--variant", "tiny", *arguments]) == 2
    out, err = capsys.readouterr()
    assert err.startswith("error: ")
    assert words in err
    assert (out, err.count("\n")) == ("", 1)


def test_bits_that_do_not_repeat_are_said(capsys: pytest.CaptureFixture[str]) -> None:
    restless = replace(CHECK, bit_repeat=False)
    run = Run({**FACTS, "seconds": 12.3}, {}, [Row(CASE, "layers", "timed", None, restless, TIMING, ROOF)])
    show(run)
    assert "layers, float32: two runs differ in their bits" in capsys.readouterr().out
    assert "<td>no</td>" in render(run)


def test_profile_shows_what_takes_time_and_writes_a_trace(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    trace = tmp_path / "trace.json"
    assert main(["profile", "--variant", "tiny", "--steps", "1", "--top", "4", "--out", str(trace), "--json"]) == 0
    answer = json.loads(capsys.readouterr().out)
    assert len(answer["top"]) == 4
    shares = [entry["share"] for entry in answer["top"]]
    assert shares == sorted(shares, reverse=True)
    assert 0 < sum(shares) <= 1
    assert json.loads(trace.read_text())["traceEvents"]
    assert list(tmp_path.iterdir()) == [trace]
