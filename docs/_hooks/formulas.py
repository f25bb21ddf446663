"""Formulas as MathML, made while the pages are built: a page needs no script and no network to show them."""

from typing import Any

from latex2mathml.converter import convert


def on_config(config: Any) -> Any:
    """Let every fence named ``math`` be a formula; GitHub shows the same fences in the sources."""
    fences = config.mdx_configs.setdefault("pymdownx.superfences", {}).setdefault("custom_fences", [])
    fences.append({"name": "math", "class": "formula", "format": formula})
    return config


def formula(source: str, language: str, css_class: str, options: Any, md: Any, **others: Any) -> str:
    """One displayed formula."""
    return f'<div class="{css_class}" tabindex="0">{convert(source.strip(), display="block")}</div>'
