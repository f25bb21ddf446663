"""The list of planted faults."""

from __future__ import annotations

from benchmarks.mutants import behaviour, data, elsewhere, engine, evaluation, formulations, kernels, training
from benchmarks.mutants.fault import Fault

FAULTS: list[Fault] = [
    *engine.FAULTS,
    *behaviour.FAULTS,
    *formulations.FAULTS,
    *kernels.FAULTS,
    *elsewhere.FAULTS,
    *evaluation.FAULTS,
    *data.FAULTS,
    *training.FAULTS,
]
