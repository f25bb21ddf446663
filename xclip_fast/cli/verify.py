"""``xclip-fast verify``: whether every op is right here; a yes or no for the checks of other projects."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Annotated
from xml.etree import ElementTree

import typer

from xclip_fast.cli.console import CHECK_FAILED, emit_json, safe, stdout, table
from xclip_fast.cli.options import AsJson
from xclip_fast.files import check_writable, replacing

if TYPE_CHECKING:
    from xclip_fast.bench.verify import Result


def verify(
    device: Annotated[
        str, typer.Option(help="cpu (kernels in Triton's interpreter), cuda or cuda:N; auto for either.")
    ] = "cpu",
    dtype: Annotated[
        list[str] | None, typer.Option(help="float32, float16, bfloat16; may be given several times.")
    ] = None,
    op: Annotated[list[str] | None, typer.Option(help="Of one op; may be given several times. All without.")] = None,
    backend: Annotated[
        list[str] | None, typer.Option(help="triton, torch, extension; may be given several times.")
    ] = None,
    seed: Annotated[int, typer.Option(min=0, help="Of the random inputs.")] = 0,
    forward_only: Annotated[bool, typer.Option("--forward-only", help="Leave the gradients out.")] = False,
    as_json: AsJson = False,
    junit: Annotated[Path | None, typer.Option(metavar="FILE", help="Write a JUnit XML file too.")] = None,
) -> int:
    """Check every op against float64, forward and backward, on awkward shapes.

    Errors are relative; a kernel passes with at most twice the error of plain torch in the same dtype, plus a rounding.
    The same seed gives the same numbers again. Exit code 0: all right, 1: something is wrong, or nothing could be
    checked.
    """
    if junit is not None:
        check_writable(junit)

    from xclip_fast.bench.verify import BACKENDS, DTYPES, FAILED, PASSED
    from xclip_fast.bench.verify import verify as check
    from xclip_fast.devices import find_device

    device = str(find_device(device))
    found = []
    with stdout.status("checking") if stdout.is_terminal and not as_json else nullcontext():
        for result in check(op or (), device, dtype or DTYPES, backend or BACKENDS, seed, not forward_only):
            found.append(result)
    right = any(result.status == PASSED for result in found) and all(result.status != FAILED for result in found)
    if junit is not None:
        with replacing(junit) as temporary:
            temporary.write_text(to_junit(found), encoding="utf-8")
    if as_json:
        emit_json({"passed": right, "seed": seed, "device": device, "results": [vars(result) for result in found]})
    else:
        _show(found, right)
    return 0 if right else CHECK_FAILED


def _show(found: list[Result], right: bool) -> None:
    from xclip_fast.bench.verify import FAILED, SKIPPED

    figures = ("error", "torch", "allowed")
    columns = ("op", "backend", "dtype", *figures, "verdict")
    shown = table("The case that uses most of its allowance", *columns, numbers=columns)
    for column in (*shown.columns[:3], shown.columns[-1]):
        column.justify = "left"
    groups: dict[tuple[str, str, str], list[Result]] = {}
    for result in found:
        groups.setdefault((result.op, result.backend, result.dtype), []).append(result)
    for (op, backend, dtype), results in groups.items():
        compared = [result for result in results if result.allowance]
        if all(result.status == SKIPPED for result in results):
            continue
        worst = max(compared, key=_used, default=None)
        said = ["-"] * 3
        if worst is not None:
            said = [_figure(value) for value in (worst.error, worst.torch_error, worst.allowance)]
        bad = any(result.status == FAILED for result in results)
        verdict = safe("failed", "bold red") if bad else safe("passed", "green")
        shown.add_row(op, backend, dtype, *said, verdict)
    stdout.print(shown)
    for result in found:
        if result.status == FAILED:
            line = f"failed: {result.op}, {result.case}, {result.backend}, {result.dtype}, {result.worst}: "
            stdout.print(safe(f"{line}error {_figure(result.error)}, {result.reason}"), soft_wrap=True)
    skipped = {f"{result.op}, {result.backend}: {result.reason}" for result in found if result.status == SKIPPED}
    for line in sorted(skipped):
        stdout.print(safe(f"skipped: {line}"), soft_wrap=True)
    counts = {status: sum(result.status == status for result in found) for status in ("passed", FAILED, SKIPPED)}
    outcome = ", ".join(f"{count} {status}" for status, count in counts.items())
    seed, device = (found[0].seed, found[0].device) if found else (0, "")
    stdout.print(
        safe(f"{outcome}; seed {seed} on {device}: {'all right' if right else 'not all right'}"), soft_wrap=True
    )


def _used(result: Result) -> float:
    return float("inf") if result.error is None else result.error / (result.allowance or 1.0)


def _figure(value: float | None) -> str:
    return "-" if value is None else f"{value:.1e}"


def to_junit(found: list[Result]) -> str:
    """The results as JUnit XML: a suite an op, a test a case."""
    root = ElementTree.Element("testsuites", name="xclip-fast verify")
    suites: dict[str, ElementTree.Element] = {}
    for result in found:
        suite = suites.setdefault(result.op, ElementTree.Element("testsuite", name=result.op))
        name = f"{result.case}, {result.backend}, {result.dtype}, seed {result.seed}"
        case = ElementTree.SubElement(suite, "testcase", classname=result.op, name=name, time=f"{result.seconds:.3f}")
        if result.status in ("failed", "skipped"):
            kind = "failure" if result.status == "failed" else "skipped"
            ElementTree.SubElement(case, kind, message=_xml_text(f"error {_figure(result.error)}: {result.reason}"))
    for suite in suites.values():
        suite.set("tests", str(len(suite)))
        suite.set("failures", str(len(suite.findall("testcase/failure"))))
        suite.set("skipped", str(len(suite.findall("testcase/skipped"))))
        root.append(suite)
    return '<?xml version="1.0" encoding="utf-8"?>\n' + ElementTree.tostring(root, encoding="unicode") + "\n"


def _xml_text(text: str) -> str:
    # control characters have no place in XML
    return "".join(char if char.isprintable() else " " for char in text)
