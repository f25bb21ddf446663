"""PyTorch's profiler around one provider: what takes longest, and a trace."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

from torch.profiler import ProfilerActivity, profile

from xclip_fast.bench.providers import PROVIDERS, check_names
from xclip_fast.bench.record import Case
from xclip_fast.bench.setting import UnavailableError, inputs_of, prepared, setting_of, step
from xclip_fast.errors import InputError
from xclip_fast.files import replacing

WARM_UP = 2


class Entry(NamedTuple):
    """One operator (on a CPU) or kernel (on a GPU), per call of the model.

    share: of the time of all of them; an operator's own time, without the operators it calls.
    """

    name: str
    milliseconds: float
    share: float
    calls: float


def record(case: Case, provider: str, steps: int, trace: Path | None) -> list[Entry]:
    """Profile some calls; the entries that take longest come first.

    Args:
        case: of a model.
        provider: a name in ``providers.PROVIDERS``.
        steps: calls that are recorded.
        trace: file for the Chrome trace format, which Perfetto opens.

    Raises:
        InputError: there is no such provider, or it cannot run here.
    """
    check_names([provider])
    setting = setting_of(case)
    try:
        classify = prepared(PROVIDERS[provider].build(setting), case)
    except UnavailableError as error:
        raise InputError(f"{provider} cannot run here: {error}") from error
    run = step(classify, inputs_of(setting), case.direction == "train")
    for _ in range(WARM_UP):
        run()
    on_gpu = case.device.startswith("cuda")
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_gpu else [])]
    with profile(activities=activities) as recorded:
        for _ in range(steps):
            run()
            if on_gpu:
                import torch

                torch.cuda.synchronize()
    if trace is not None:
        with replacing(trace) as temporary:
            recorded.export_chrome_trace(str(temporary))
    entries = []
    for event in recorded.key_averages():
        spent = event.self_device_time_total if on_gpu else event.self_cpu_time_total
        if spent > 0:
            entries.append((event.key, spent / 1e3 / steps, event.count / steps))
    total = sum(milliseconds for _, milliseconds, _ in entries)
    entries.sort(key=lambda entry: -entry[1])
    return [Entry(name, milliseconds, milliseconds / total, calls) for name, milliseconds, calls in entries]
