"""The README is short, and leads where it says."""

from __future__ import annotations

import ast
import re
from pathlib import Path

from xclip_fast.engine import Engine

ROOT = Path(__file__).parents[2]
TEXT = (ROOT / "README.md").read_text(encoding="utf-8")
LINK = re.compile(r"\]\((?!https?:)([^)#]+)")


def test_it_is_read_in_a_minute() -> None:
    assert len(TEXT.splitlines()) < 150


def test_its_links_lead_somewhere() -> None:
    links = LINK.findall(TEXT)
    assert "docs/index.md" in links
    assert [link for link in links if not (ROOT / link).exists()] == []


def test_its_use_is_ten_lines_of_what_there_is() -> None:
    (code,) = re.findall(r"```python\n(.*?)```", TEXT, re.DOTALL)
    assert len(code.splitlines()) <= 10
    called = {node.attr for node in ast.walk(ast.parse(code)) if isinstance(node, ast.Attribute)}
    assert {"classify", "report"} <= called
    assert callable(Engine.classify)
    assert callable(Engine.report)
