"""A whole model measured: every provider checked against float64 first, then timed in turn with the baseline."""

from __future__ import annotations

import gc
import logging
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor

from xclip_fast.bench.launches import launches_of
from xclip_fast.bench.machine import Sensors
from xclip_fast.bench.memory import memory_refusal, peak_memory
from xclip_fast.bench.parity import same_bits
from xclip_fast.bench.providers import BASELINES, PROVIDERS, check_names
from xclip_fast.bench.record import FAILED, TIMED, UNAVAILABLE, WRONG, Case, Check, Roof, Row, Timing, finite
from xclip_fast.bench.setting import Classify, Setting, UnavailableError, inputs_of, prepared, setting_of, step
from xclip_fast.bench.timing import BLOCK, LEAST, SPENT, Blocks, Sample, alternate, noise_of, sampler, timing_of, wall
from xclip_fast.errors import InputError
from xclip_fast.flops import count
from xclip_fast.numerics import exact_float32, model_allowance, poisoned_memory, relative_error
from xclip_fast.ops import backend
from xclip_fast.ops.cases import config_of

_log = logging.getLogger("xclip_fast")


@dataclass(frozen=True)
class Effort:
    """How long to measure.

    Attributes:
        blocks: of baseline, provider, provider, baseline.
        block: seconds of one of these four.
        memory: measure the peak memory too, in a process of its own.
        spent, least: seconds that all blocks of two contenders may take, and how many there are anyway.
        cold: overwrite the caches before each call, outside of the time.
    """

    blocks: int = 5
    block: float = BLOCK
    memory: bool = True
    spent: float = SPENT
    least: int = LEAST
    cold: bool = False

    @property
    def cache(self) -> str:
        """As a row names it."""
        return "cold" if self.cold else "warm"


def measure_model(case: Case, providers: Sequence[str], effort: Effort, ceilings: dict[str, float]) -> Iterator[Row]:
    """A row (on a GPU two: replayed graph, and as a user sees it) for each provider, as soon as it is known.

    float32 is float32 for everyone, without TF32, in the truth, at the gate and on the clock: what is timed is what was
    checked, and a graph keeps the arithmetic that it was captured with. It is read, or closed, in one thread.

    Raises:
        InputError: an unknown provider, or less memory than the case needs.
    """
    check_names(list(providers))
    if reason := memory_refusal(case):
        raise InputError(reason)
    with TemporaryDirectory() as folder, exact_float32():
        yield from _measured(case, Path(folder), providers, effort, ceilings)


def _measured(
    case: Case, folder: Path, providers: Sequence[str], effort: Effort, ceilings: dict[str, float]
) -> Iterator[Row]:
    setting = setting_of(case, folder)
    inputs = inputs_of(setting)
    truth = truth_of(setting, inputs)
    name, baseline, torch_error = baseline_of(setting, inputs, truth)
    methods = methods_of(case)
    bases = {
        method: Base(name, timed(name, baseline, inputs, case, method, effort), case, effort) for method in methods
    }
    for provider in providers:
        built: Any = None
        try:
            built = baseline if provider == name else prepared(PROVIDERS[provider].build(setting), case)
            check = check_of(provider, built, setting, inputs, truth, torch_error)
            if not check.passed:
                yield Row(case, provider, WRONG, beyond(check), check)
                continue
            memory = peak_memory(case, provider, folder) if effort.memory else None
            for method in methods:
                timing = bases[method].against(
                    None if provider == name else timed(provider, built, inputs, case, method, effort)
                )
                yield replace(row_of(case, provider, check, timing, ceilings), memory_mb=memory)
                # a graph keeps the memory of a whole step
                _free(case)
        except UnavailableError as error:
            yield Row(case, provider, UNAVAILABLE, str(error))
        except Exception as error:
            # the other providers still have their turn
            _log.debug("%s failed", provider, exc_info=True)
            yield Row(case, provider, FAILED, f"{type(error).__name__}: {error}"[:300])
        finally:
            del built
            _free(case)


def methods_of(case: Case) -> tuple[str, ...]:
    """How a case is timed: on a GPU by replays of a graph of one step, forward or training, and as a user sees it."""
    return ("wall",) if case.device == "cpu" else ("graph", "wall")


def _answers(classify: Classify, inputs: tuple[Tensor, Tensor], train: bool) -> dict[str, Tensor]:
    """What is compared: logits, and in training the gradient of the frames, which every layer has passed."""
    video, text = inputs
    if not train:
        with torch.inference_mode():
            return {"logits": classify(video, text)}
    video = video.detach().requires_grad_()
    logits = classify(video, text)
    (grad,) = torch.autograd.grad(logits.float().square().mean() * logits.numel(), video)
    return {"logits": logits.detach(), "d video": grad}


def truth_of(setting: Setting, inputs: tuple[Tensor, Tensor]) -> dict[str, Tensor]:
    """The answers of the definition in float64, a video at a time: it takes eight bytes a number."""
    exact = Setting(replace(setting.case, dtype="float64"), setting.config, setting.state)
    model = prepared(PROVIDERS["reference"].build(exact), setting.case)
    video, text = (x if x.dtype == torch.uint8 else x.double() for x in inputs)
    train = setting.case.direction == "train"
    found = [_answers(model, (one, text), train) for one in video.split(1)]
    return {name: torch.cat([answers[name] for answers in found]).cpu() for name in found[0]}


def _poisoned(classify: Classify, inputs: tuple[Tensor, Tensor], train: bool) -> dict[str, Tensor]:
    # nothing that a provider leaves unwritten may look like a result
    with poisoned_memory():
        return _answers(classify, inputs, train)


def _error(found: dict[str, Tensor], truth: dict[str, Tensor]) -> float:
    return max(relative_error(found[name], exact) for name, exact in truth.items())


def baseline_of(
    setting: Setting, inputs: tuple[Tensor, Tensor], truth: dict[str, Tensor]
) -> tuple[str, Classify, float]:
    train = setting.case.direction == "train"
    for name in BASELINES:
        try:
            built = prepared(PROVIDERS[name].build(setting), setting.case)
            return name, built, _error(_poisoned(built, inputs, train), truth)
        except UnavailableError as error:
            _log.debug("%s is no baseline here: %s", name, error)
    raise InputError("no baseline runs here")


def check_of(
    provider: str,
    built: Classify,
    setting: Setting,
    inputs: tuple[Tensor, Tensor],
    truth: dict[str, Tensor],
    torch_error: float,
) -> Check:
    found = PROVIDERS[provider]
    train = setting.case.direction == "train"
    allowed = found.limit or model_allowance(torch_error, setting.dtype, gradients=train)
    # what the first call of an engine captures is what is timed
    keeps = found.compiled or (found.own_graph and setting.case.device != "cpu")
    with asked_for_kernels(provider, setting.case):
        first = (_answers if keeps else _poisoned)(built, inputs, train)
        repeats = same_bits(first, _answers(built, inputs, train))
    if not found.same:
        return Check("none: it computes something else", None, torch_error, allowed, True, repeats)
    # as a user sees it, a small batch may be plain modules
    seen = [first, _answers(built, inputs, train)] if found.fused and setting.case.device != "cpu" else [first]
    errors = [_error(answers, truth) for answers in seen]
    # NaN is no maximum
    error = next((one for one in errors if not one <= allowed), max(errors))
    return Check("the definition in float64", finite(error), torch_error, allowed, error <= allowed, repeats)


def asked_for_kernels(provider: str, case: Case) -> AbstractContextManager[None]:
    """What a provider that is to be captured runs in."""
    return backend("triton") if PROVIDERS[provider].fused and case.device != "cpu" else nullcontext()


def beyond(check: Check) -> str:
    """Why a provider is wrong, with its numbers."""
    error = "not finite" if check.error is None else f"{check.error:.2e}"
    return (
        f"beyond the allowance: its error is {error}, {check.allowance:.2e} is allowed, plain torch errs "
        f"{check.torch_error:.2e}; nothing is timed"
    )


def timed(
    provider: str, built: Classify, inputs: tuple[Tensor, Tensor], case: Case, method: str, effort: Effort
) -> tuple[Sample, str]:
    """How to time a provider, and the method that came of it: what cannot be captured is timed between events."""
    run = step(built, inputs, case.direction == "train")
    run()  # compilers and caches work outside of the time
    sample = partial(sampler, run, case.device, effort.block, cold=effort.cold)
    if case.device == "cpu":
        return sample(graph=False), "wall"
    if method == "wall":
        return wall(run, effort.block, cold=effort.cold), method
    if PROVIDERS[provider].own_graph:
        return sample(graph=False), "graph"
    try:
        with asked_for_kernels(provider, case):
            run()  # what is captured has to be loaded
            return sample(graph=True), "graph"
    except RuntimeError as error:
        _log.warning("%s cannot be captured into a CUDA graph: %s", provider, error)
        return sample(graph=False), "events"


class Base:
    """The baseline by one method, and how far it strays from itself."""

    def __init__(self, name: str, timed: tuple[Sample, str], case: Case, effort: Effort) -> None:
        self.name, self.effort = name, effort
        self.sample, self.method = timed
        self.sensors = Sensors(case.device)
        self.itself = self._blocks(self.sample)
        self.noise = noise_of(self.itself)

    def against(self, other: tuple[Sample, str] | None) -> Timing:
        """The baseline in turn with another provider, or with itself."""
        cache = self.effort.cache
        if other is None:
            return timing_of(self.itself, self.name, self.noise, method=self.method, cache=cache)
        return timing_of(self._blocks(other[0]), self.name, self.noise, method=other[1], cache=cache)

    def _blocks(self, other: Sample) -> Blocks:
        effort = self.effort
        return alternate(self.sample, other, effort.blocks, self.sensors, effort.spent, effort.least)


def row_of(case: Case, provider: str, check: Check, timing: Timing, ceilings: dict[str, float]) -> Row:
    # the rates are those of the case's dtype: what computes something else, or narrower, is not under them
    alike = PROVIDERS[provider].same and PROVIDERS[provider].limit is None
    roof = roof_of(case, timing, ceilings) if alike else None
    return Row(case, provider, TIMED, None, check, timing, roof, launches=launches_of(case, provider))


def roof_of(case: Case, timing: Timing, ceilings: dict[str, float]) -> Roof | None:
    """The roofline: FLOPs after exact rewrites at the measured GEMM rate, or weights and frames read once."""
    rate = ceilings.get(f"{case.dtype}_tflops")
    if rate is None:
        return None
    config = config_of(case.variant, case.frames)
    counted = count(config, case.frames, case.classes, case.batch, formulation="fused")
    flops = 2 * (counted.macs - counted.parts["text"]) * (3 if case.direction == "train" else 1)
    itemsize = getattr(torch, case.dtype).itemsize
    pixels = case.batch * case.frames * 3 * config.image_size**2
    moved = itemsize * counted.parameters + pixels * (1 if case.input == "uint8" else itemsize)
    floor = max(flops / (rate * 1e12), moved / (ceilings["copy_gbs"] * 1e9)) * 1e3
    return Roof(flops, moved, floor, floor / timing.median_ms)


def _free(case: Case) -> None:
    gc.collect()
    if case.device != "cpu":
        torch.cuda.empty_cache()
