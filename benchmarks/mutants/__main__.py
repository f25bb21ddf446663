"""``python -m benchmarks.mutants``: which planted faults the tests catch."""

from __future__ import annotations

import argparse
import os
import re
import sys
import tempfile
from importlib import import_module
from pathlib import Path

from benchmarks.mutants.fault import FaultError
from benchmarks.mutants.faults import FAULTS
from benchmarks.mutants.run import Outcome, read, run_faults, write

# what the tests of every fault would import again: each runs in a fork of this process
_LIBRARIES = "numpy", "torch", "torch._dynamo", "triton", "hypothesis", "safetensors.torch", "einops"


def main() -> int:
    """0 where every fault is caught or equivalent, 1 where one survives, 2 where one fits no longer."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.mutants", description=__doc__)
    parser.add_argument(
        "--only", metavar="PATTERN", default="", help="faults whose name or place matches this expression"
    )
    parser.add_argument(
        "--json", metavar="FILE", type=Path, help="write the outcomes there, and go on where it left off"
    )
    options = parser.parse_args()
    chosen = [fault for fault in FAULTS if re.search(options.only, f"{fault.place} {fault.name}")]
    known = read(options.json) if options.json else {}
    names = {fault.name for fault in FAULTS}
    done = {name: outcome for name, outcome in known.items() if name in names}

    def say(outcome: Outcome) -> None:
        print(f"{outcome.outcome:10}  {outcome.seconds:6.1f} s  {outcome.name}: {outcome.by}", flush=True)
        done[outcome.name] = outcome
        if options.json:
            write(options.json, list(done.values()))

    os.nice(10)
    # before torch and triton read them, as in tests/conftest.py
    os.environ.update({"OMP_NUM_THREADS": "1", "TRITON_INTERPRET": "1"})
    for library in _LIBRARIES:
        import_module(library)
    try:
        with tempfile.TemporaryDirectory() as folder:
            outcomes = run_faults(chosen, Path(folder), known, say)
    except FaultError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    survived = sum(outcome.outcome == "survived" for outcome in outcomes)
    equivalent = sum(outcome.outcome == "equivalent" for outcome in outcomes)
    told = len(outcomes) - equivalent
    print(f"{told - survived} of {told} caught, {equivalent} equivalent")
    return int(survived > 0)


if __name__ == "__main__":
    sys.exit(main())
