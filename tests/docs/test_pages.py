"""The pages name what the library has: every op, every rewrite and where it is in force."""

from __future__ import annotations

import re
from pathlib import Path

from xclip_fast import ops
from xclip_fast.engine.packing import CPU_REWRITES, CUDA_REWRITES, REWRITES

DOCS = Path(__file__).parents[2] / "docs"


def test_the_page_of_the_ops_has_each_of_them() -> None:
    text = (DOCS / "ops.md").read_text(encoding="utf-8")
    headings = re.findall(r"^## (\w+)$", text, re.MULTILINE)
    costs = re.findall(r"^\| `(\w+)` \| \d", text, re.MULTILINE)
    every = {name for name in ops.__all__ if callable(getattr(ops, name))} - {"backend", "explain"}
    assert sorted(headings) == sorted(costs) == sorted(every)


def test_the_page_of_the_engine_has_each_rewrite_where_it_is_in_force() -> None:
    text = (DOCS / "engine.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| \[`(\w+)`\]\(#[\w-]+\) \|(.*?)\|(.*?)\|", text, re.MULTILINE)
    assert {name: (cpu.strip(), gpu.strip()) for name, cpu, gpu in rows} == {
        name: ("yes" * (name in CPU_REWRITES), "yes" * (name in CUDA_REWRITES)) for name in REWRITES
    }
