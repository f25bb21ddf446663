"""``pytest benchmarks --benchmark-only``: nothing is interpreted here, since that is no measure of a kernel."""

from __future__ import annotations

import pytest


def pytest_benchmark_update_machine_info(config: pytest.Config, machine_info: dict[str, object]) -> None:
    """Keep what tells machines and versions apart; no name of a host."""
    import torch

    from xclip_fast.bench.machine import facts

    machine_info.clear()
    machine_info.update(facts("cuda" if torch.cuda.is_available() else "cpu"))
