"""The list of planted faults."""

from __future__ import annotations

from benchmarks.mutants import elsewhere, engine, formulations, kernels
from benchmarks.mutants.fault import Fault

FAULTS: list[Fault] = [*engine.FAULTS, *formulations.FAULTS, *kernels.FAULTS, *elsewhere.FAULTS]
