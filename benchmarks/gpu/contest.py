"""Providers of one case in one process: built and checked beside others at work, then timed with the GPU to itself."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor

from benchmarks.gpu.e2e import PEAK_TFLOPS, memory_of_step, peak_share
from benchmarks.gpu.goals import MEMORY
from benchmarks.gpu.lane import FAILED, Desk, Found, last_line
from xclip_fast.bench import models
from xclip_fast.bench.models import Effort
from xclip_fast.bench.providers import PROVIDERS
from xclip_fast.bench.record import TIMED, UNAVAILABLE, WRONG, Case, Check, Row
from xclip_fast.bench.setting import Classify, Setting, UnavailableError, inputs_of, prepared, setting_of, step
from xclip_fast.numerics import exact_float32
from xclip_fast.ops.cases import config_of

EFFORT = Effort(blocks=5, block=0.03, memory=False)
DATA_SHEET = {"bfloat16_tflops": PEAK_TFLOPS, "copy_gbs": 3350.0}  # of an H100
SHOWN = 12  # kernels of a profile


@dataclass
class _Contest:
    """What has been built for a case."""

    setting: Setting
    inputs: tuple[Tensor, Tensor]
    truth: dict[str, Tensor]
    baseline: str
    torch_error: float
    built: dict[str, Classify]
    checks: dict[str, Check] = field(default_factory=dict)
    refused: list[Row] = field(default_factory=list)


def case_of(variant: str, batch: int, input: str = "normalised", direction: str = "forward") -> Case:
    """A whole model in bfloat16 on the GPU, 400 classes."""
    frames = config_of(variant).frames
    return Case("model", variant, frames, batch, 400, "bfloat16", direction, input, "cuda")


def name_of(case: Case) -> str:
    """Of a case in records and goals; normalised frames and inference are not said."""
    said = [f"{case.variant} x{case.batch}", "uint8" * (case.input == "uint8"), "train" * (case.direction == "train")]
    return " ".join(filter(None, said))


def build(desk: Desk, case: Case, providers: Sequence[str]) -> Found:
    """Build providers and hold each to the truth; those that are wrong or missing get their row, and are not timed."""
    with desk.turns.together(), exact_float32():
        contest = desk.keep(f"contest {case}", lambda: _begin(case))
        # what is compared with a baseline that is broken would be right whatever it gives
        sane = math.isfinite(contest.torch_error)
        checks = [{"what": f"the baseline, {contest.baseline}, errs {contest.torch_error:.2e}", "passed": sane}]
        for provider in providers:
            try:
                if provider not in contest.built:
                    contest.built[provider] = prepared(PROVIDERS[provider].build(contest.setting), case)
                classify = contest.built[provider]
                check = models.check_of(
                    provider, classify, contest.setting, contest.inputs, contest.truth, contest.torch_error
                )
            except UnavailableError as error:
                contest.refused.append(Row(case, provider, UNAVAILABLE, str(error)))
                continue
            except Exception as error:
                contest.refused.append(Row(case, provider, FAILED, last_line(error)))
                checks.append({"what": f"{provider}: {last_line(error)}", "passed": False})
                continue
            contest.checks[provider] = check
            checks.append(
                {"what": provider, "error": check.error, "allowance": check.allowance, "passed": check.passed}
            )
            if desk.judged and not check.passed:
                contest.refused.append(Row(case, provider, WRONG, models.beyond(check), check))
    failed = any(row.status == FAILED for row in contest.refused)
    return {"status": FAILED if failed else desk.verdict(all(check["passed"] for check in checks)), "checks": checks}


def warm(desk: Desk, case: Case, providers: Sequence[str]) -> None:
    """One step as it is timed, of each that was built: what it compiles is compiled here."""
    contest = _built(desk, case, ())
    with desk.turns.together(), exact_float32():
        for provider in providers:
            if provider in contest.checks:
                step(contest.built[provider], contest.inputs, case.direction == "train")()


def measure(desk: Desk, case: Case, providers: Sequence[str], methods: Sequence[str], effort: Effort = EFFORT) -> Found:
    """Time what was built and is right, each in turn with the baseline: a row for each provider and method.

    ``providers`` are built here where they are not there: the process that had them may have ended over another case.
    """
    contest = _built(desk, case, providers)
    effort = Effort(blocks=1, block=0.001, memory=False) if not desk.judged else effort
    rows, shares = list(contest.refused), {}
    with desk.turns.alone(), exact_float32():
        for method in methods:
            timed = models.timed(
                contest.baseline, contest.built[contest.baseline], contest.inputs, case, method, effort
            )
            base = models.Base(contest.baseline, timed, case, effort)
            for provider, check in contest.checks.items():
                if desk.judged and not check.passed:
                    continue
                try:
                    same = provider == contest.baseline
                    sample = (
                        None
                        if same
                        else models.timed(provider, contest.built[provider], contest.inputs, case, method, effort)
                    )
                    row = models.row_of(case, provider, check, base.against(sample), {})
                except Exception as error:
                    rows.append(Row(case, provider, FAILED, last_line(error), check))
                    continue
                rows.append(row)
                if (share := peak_share(row, DATA_SHEET)) is not None:
                    shares.setdefault(provider, {})[method] = share
    statuses = {row.status for row in rows}
    failed = FAILED in statuses or TIMED not in statuses
    status = FAILED if failed else desk.verdict(WRONG not in statuses)
    return {"status": status, "rows": [asdict(row) for row in rows], "mfu": shares}


def memory(desk: Desk, case: Case, providers: Sequence[str]) -> Found:
    """What a training step of each that was built keeps; see ``e2e.memory_of_step``."""
    contest = _built(desk, case, providers)
    with desk.turns.together(), exact_float32():
        found = {name: memory_of_step(module, contest.inputs, case) for name, module in contest.built.items()}
    return {"status": desk.verdict(True), MEMORY: found}


def profile(desk: Desk, case: Case, providers: Sequence[str]) -> Found:
    """The kernels of one call of each, longest first."""
    contest = _built(desk, case, providers)
    with desk.turns.alone():
        found = {
            provider: _kernels(step(contest.built[provider], contest.inputs, False), desk.judged)
            for provider in providers
            if provider in contest.checks
        }
    return {"status": desk.verdict(True), "profile": found}


def _built(desk: Desk, case: Case, providers: Sequence[str]) -> _Contest:
    """The contest with all of these in it, right or wrong."""
    contest: _Contest | None = desk.kept(f"contest {case}")
    refused = [] if contest is None else [row.provider for row in contest.refused]
    lacking = [one for one in providers if contest is None or (one not in contest.checks and one not in refused)]
    if lacking:
        build(desk, case, lacking)
    made: _Contest = desk.kept(f"contest {case}")
    return made


def _kernels(run: Callable[[], object], on_gpu: bool) -> list[dict[str, Any]]:
    from torch.profiler import ProfilerActivity
    from torch.profiler import profile as profiled

    run()
    torch.cuda.synchronize()
    # the stand-in driver knows nothing of NVIDIA's profiler
    with profiled(activities=[ProfilerActivity.CUDA if on_gpu else ProfilerActivity.CPU]) as seen:
        run()
        torch.cuda.synchronize()
    rows = [
        {"kernel": event.key[:60], "us": round(event.self_device_time_total, 1), "calls": event.count}
        for event in seen.key_averages()
        if event.self_device_time_total > 0
    ]
    return sorted(rows, key=lambda row: -row["us"])[:SHOWN]


def _begin(case: Case) -> _Contest:
    setting = setting_of(case)
    inputs = inputs_of(setting)
    truth = models.truth_of(setting, inputs)
    name, baseline, torch_error = models.baseline_of(setting, inputs, truth)
    return _Contest(setting, inputs, truth, name, torch_error, {name: baseline})
