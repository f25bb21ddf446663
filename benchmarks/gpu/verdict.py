"""What a window has found, in one table that fits into the end of a log: what failed, what is measured, what is not."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from benchmarks.gpu.lane import FAILED, TOOLS, WRONG

MOST = 10_000  # characters
FAILURES = 25
REASON = 160
ROW = 118
DETAILS = "…"


def sound(content: dict[str, Any]) -> bool:
    """Whether nothing failed or was wrong, and every lane came to its end but for the sanitizers, which are slow."""
    complete = all(lane["complete"] for name, lane in content["lanes"].items() if name not in TOOLS)
    return complete and not any(case["status"] in (FAILED, WRONG) for case in content["cases"].values())


def table(out: Path, content: dict[str, Any]) -> str:
    """The table of a window's record; what does not fit is left to the file in ``out``."""
    parts = [_head(content), _section("lanes that did not come to their end, or began again", _lanes(content))]
    parts.append(_section("failed or wrong", _failures(content)))
    parts.append(_section("figures", [*_goals(content), *_figures(content)]))
    parts.append(_section("profiles", list(_profiles(content))))
    lines = [line for part in parts for line in part]
    # the end names what is missing, so that nobody takes a cut table for a whole one
    left, kept = MOST - 200, []
    for index, line in enumerate(lines):
        line = line if len(line) <= ROW * 2 else line[: ROW * 2 - 1] + DETAILS
        if left < len(line) + 1:
            kept.append(f"{DETAILS} {len(lines) - index} more lines: see {out / content['window']}.json")
            break
        kept.append(line)
        left -= len(line) + 1
    return "\n".join(kept)


def by_provider(content: dict[str, Any]) -> dict[str, Any]:
    """The rows of whole models as cases of their own, ``B/16 x8 engine``; all other cases as they are."""
    found: dict[str, Any] = {}
    for name, case in content["cases"].items():
        rows = case.get("rows", [])
        for provider, kept in case.get("memory", {}).items():
            # of "memory B/16 x8 train ...", what a step of each keeps
            found[f"{' '.join(name.split()[1:3])} train {provider} memory"] = {"memory": kept}
        if not rows or "provider" not in rows[0]:
            found[name] = case
            continue
        said = rows[0]["case"]
        shape = f"{said['variant']} x{said['batch']}{' uint8' * (said['input'] == 'uint8')}"
        shape += " train" * (said["direction"] == "train")
        for row in rows:
            entry = found.setdefault(f"{shape} {row['provider']}", {"rows": [], "mfu": {}})
            entry["rows"].append(row)
            entry["mfu"] |= case.get("mfu", {}).get(row["provider"], {})
    return found


def _head(content: dict[str, Any]) -> list[str]:
    facts, kit = content["facts"], content["kit"]
    statuses = [case["status"] for case in content["cases"].values()]
    counts = ", ".join(f"{statuses.count(one)} {one}" for one in dict.fromkeys(statuses))
    kernels = [kernel for case in content["cases"].values() for kernel in case.get("kernels", [])]
    found = sum(kernel["found"] for kernel in kernels)
    rehearsed = " REHEARSED WITHOUT A GPU: no number below means anything" if content["rehearsed"] else ""
    return [
        f"{content['window']}: {facts['commit']} on {facts['gpu'] or 'no GPU'}, {content.get('wall_s')} s of "
        f"{content['limit_s']:.0f};{rehearsed} {counts}",
        f"Triton's cache: {kit['unpacked']} unpacked, {found} asked for and found, {len(kernels) - found} compiled by "
        f"the lanes, {kit.get('compiled_here')} entries new in all",
    ]


def _section(name: str, lines: list[str]) -> list[str]:
    return [f"-- {name}" + ("" if lines else ": none"), *lines]


def _failures(content: dict[str, Any]) -> list[str]:
    found = []
    for name, case in content["cases"].items():
        if case["status"] not in (FAILED, WRONG):
            continue
        said = [_check(check) for check in case.get("checks", []) if not check["passed"]]
        said += [f"{_who(row)}: {row['reason']}" for row in case.get("rows", []) if row.get("reason")]
        said += [case["reason"]] if case.get("reason") else []
        found.append(f"{name} {case['status']}: {'; '.join(said)[:REASON]}")
    more = len(found) - FAILURES
    return found[:FAILURES] + ([f"{DETAILS} {more} more failed or wrong"] if more > 0 else [])


def _who(row: dict[str, Any]) -> str:
    return str(row.get("provider") or row.get("contender"))


def _check(check: dict[str, Any]) -> str:
    if "error" not in check:
        return str(check["what"])
    error = "not finite" if check["error"] is None else f"{check['error']:.2e}"
    return f"{check['what']} errs {error}, {check['allowance']:.2e} allowed"


def _goals(content: dict[str, Any]) -> list[str]:
    if content["rehearsed"]:
        return []
    from benchmarks.gpu.goals import goals_of

    goals = goals_of(by_provider(content))
    missing = len([goal for goal in goals if goal.found is None])
    return [*(str(goal) for goal in goals if goal.found is not None), f"{missing} of {len(goals)} goals not measured"]


def _figures(content: dict[str, Any]) -> Iterator[str]:
    for name, case in content["cases"].items():
        for row in case.get("rows", []):
            if "provider" in row and row["timing"]:
                timing = row["timing"]
                yield (f"{name} {row['provider']} {timing['method']}: {timing['median_ms']:.3f} ms, "
                       f"{timing['ratio']:.3f} ({timing['ratio_p10']:.3f}-{timing['ratio_p90']:.3f}) of "
                       f"{timing['baseline']}")  # fmt: skip
            elif "contender" in row and "median_ms" in row:
                rates = " ".join(f"{row[key]:g} {key}" for key in ("tflops", "gbs") if key in row)
                yield f"{name} {row['contender']}: {row['median_ms'] * 1e3:.1f} us {rates} {row['ratio']:.3f}"
            elif "modules" in row:
                times = ", ".join(f"{how} {row[how]:.1f}" for how in ("kernels", "modules", "hf"))
                yield f"{name} x{row['batch']} {row['direction']}, ms as used: {times}"


def _profiles(content: dict[str, Any]) -> Iterator[str]:
    for name, case in content["cases"].items():
        for provider, rows in case.get("profile", {}).items():
            yield f"{name} {provider}: " + ", ".join(
                f"{row['kernel'][:36]} {row['us']} us/{row['calls']}" for row in rows[:6]
            )


def _lanes(content: dict[str, Any]) -> list[str]:
    found = []
    for name, lane in content["lanes"].items():
        if not lane["complete"] or lane["restarts"]:
            log = lane["log"].strip().splitlines()[-1:] if lane["log"] else []
            found.append(
                f"{name}: {'complete' if lane['complete'] else 'UNFINISHED'}, {lane['restarts']} restarts {log}"
            )
    return found
