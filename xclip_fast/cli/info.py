"""``xclip-fast info``: what runs here, and why the rest does not."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from xclip_fast.cli.console import emit_json, safe, stdout, table


def info(as_json: Annotated[bool, typer.Option("--json", help="One JSON object instead of tables.")] = False) -> None:
    """Versions, devices, and which backends can be used here or why not."""
    from xclip_fast.diagnostics import report

    facts = report()
    if as_json:
        emit_json(facts)
    else:
        _show(facts)


def _show(facts: dict[str, Any]) -> None:
    versions = table("Versions and devices", "what", "found")
    versions.add_row("xclip_fast", safe(facts["version"]))
    versions.add_row("python", safe(f"{facts['python']}, {facts['platform']}"))
    versions.add_row("torch", _found(facts["torch"], facts["torch_reason"]))
    versions.add_row(
        "triton", _found(facts["triton"], None if facts["triton"] else facts["backends"]["triton"]["reason"])
    )
    versions.add_row("cuda", _found(facts["cuda"], facts["cuda_reason"]))
    for device in facts["devices"]:
        versions.add_row(safe(device["name"]), safe(device["description"]))
    if facts["devices"]:
        half = (
            f"{' and '.join(facts['native'])} natively" if facts["native"] else "half precision falls back to float32"
        )
        versions.add_row("cpu GEMMs", safe(f"float32, {half}"))
    stdout.print(versions)

    backends = table("Backends", "backend", "for", "usable", "version, or why not")
    for name, backend in facts["backends"].items():
        usable = safe("yes", "green") if backend["available"] else safe("no", "yellow")
        backends.add_row(name, safe(backend["purpose"]), usable, _found(backend["version"], backend["reason"]))
    stdout.print(backends)


def _found(version: str | None, reason: str | None) -> Any:
    words = [word for word in (version, reason) if word]
    return safe(": ".join(words) or "-", "" if reason is None else "yellow")
