"""``xclip-fast flops``: the published figures, both conventions, and its contract."""

from __future__ import annotations

import json

import pytest
from cli_support import Cli

from xclip_fast.cli.flops import PARTS


@pytest.mark.parametrize(
    ("variant", "frames", "gmacs", "millions"),
    [
        ("B/32", 8, 39.01, 196.586),
        ("B/16", 32, 570.08, None),
        ("L/14", 8, 659.05, 575.674),
        ("L/14-336", 16, 3075.29, 576.007),
    ],
)
def test_the_published_sizes(variant: str, frames: int, gmacs: float, millions: float | None, cli: Cli) -> None:
    code, out, err = cli("flops", variant, "--frames", frames, "--json")
    assert (code, err) == (0, "")
    facts = json.loads(out)
    assert facts.keys() >= {"macs", "flops", "parameters", "parts"}
    assert facts["macs"] / 1e9 == pytest.approx(gmacs, abs=0.005)
    assert facts["flops"] == 2 * facts["macs"]
    assert millions is None or facts["parameters"] / 1e6 == pytest.approx(millions, abs=5e-4)
    for count in (facts, facts["fused"]):
        assert sum(count["parts"].values()) == count["macs"]
        assert count["parts"].keys() == PARTS.keys()
    assert facts["macs"] - facts["fused"]["macs"] == sum(facts["fused"]["rewrites"].values()) > 0
    assert sum(facts["parameter_parts"].values()) == facts["parameters"]


def test_views_multiply_all_but_the_texts(cli: Cli) -> None:
    one, twelve = (json.loads(cli("flops", "B/32", "--views", views, "--json")[1]) for views in ("1", "4x3"))
    assert (one["views"], twelve["views"]) == (1, 12)
    text = one["parts"]["text"]
    assert twelve["parts"]["text"] == text
    assert twelve["macs"] - text == 12 * (one["macs"] - text)


def test_no_class_is_the_embedding_alone(cli: Cli) -> None:
    code, out, _ = cli("flops", "B/32", "--classes", "0", "--json")
    assert code == 0
    assert [json.loads(out)["parts"][part] for part in ("text", "prompts", "logits")] == [0, 0, 0]


def test_the_tables_show_both_conventions_and_fit_80_columns(cli: Cli) -> None:
    code, out, err = cli("flops", "B/16", "--views", "4x3", "--classes", "400")
    assert (code, err) == (0, "")
    for shown in ("GMACs (the paper's GFLOPs)", "2,922.091", "GFLOPs (2 for each MAC)", "5,844.182", "194,929,153"):
        assert shown in out
    assert max(map(len, out.splitlines())) <= 80


def test_the_headline_recomputes_the_paper(cli: Cli) -> None:
    code, out, err = cli("flops", "--headline")
    assert (code, err) == (0, "")
    for shown in ("X-CLIP-B/16, 8 frames", "144.91", "3075.29", "ViViT-H"):
        assert shown in out
    assert max(map(len, out.splitlines())) <= 80
    code, out, _ = cli("flops", "--headline", "--json")
    assert code == 0
    rows = {row["what"]: row for row in json.loads(out)["headline"]}
    for what, published in (("X-CLIP-B/32, 8 frames", 39), ("X-CLIP-L/14-336, 16 frames", 3086)):
        assert rows[what]["published"] == published
        assert rows[what]["official"] == pytest.approx(published, rel=0.01)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("flops",), "either a variant"),
        (("flops", "B/16", "--headline"), "either a variant"),
        (("flops", "B/17"), "unknown variant 'B/17': choose one of B/32"),
        (("flops", "B/16", "--frames", "0"), "--frames"),
        (("flops", "B/16", "--classes", "-1"), "--classes"),
        (("flops", "B/16", "--views", "all"), "--views"),
    ],
)
def test_wrong_use_is_one_line(arguments: tuple[str, ...], words: str, cli: Cli) -> None:
    code, out, err = cli(*arguments)
    assert (code, out) == (2, "")
    assert err.count("\n") == 1
    assert words in err
