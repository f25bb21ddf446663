"""What the pages need beyond Markdown, made while they are built: a page asks no other host for anything."""

from typing import Any

from latex2mathml.converter import convert


def on_config(config: Any) -> Any:
    """Let every fence named ``math`` be a formula, in MathML; GitHub shows the same fences in the sources."""
    fences = config.mdx_configs.setdefault("pymdownx.superfences", {}).setdefault("custom_fences", [])
    fences.append({"name": "math", "class": "formula", "format": formula})
    return config


def formula(source: str, language: str, css_class: str, options: Any, md: Any, **others: Any) -> str:
    """One displayed formula."""
    return f'<div class="{css_class}" tabindex="0">{convert(source.strip(), display="block")}</div>'


def on_page_markdown(markdown: str, page: Any, **others: Any) -> None:
    """Give the tables of results the whole width, without contents beside them."""
    if "<!-- table: cpu/models -->" in markdown:
        page.meta["hide"] = ["toc"]
