"""One part of ``make gpu`` in this process: ``python -m benchmarks.gpu.part NAME FOLDER SECONDS``."""

from __future__ import annotations

import argparse
import sys
from importlib import import_module
from pathlib import Path

from benchmarks.gpu.journal import Journal
from benchmarks.gpu.prepare import facts


def main() -> int:
    """Run the part; 0 when it is complete and nothing failed, 1 when not."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu.part", description=__doc__)
    parser.add_argument("part")
    parser.add_argument("out", type=Path)
    parser.add_argument("deadline", type=float)
    parser.add_argument("--dry-run", action="store_true")
    options = parser.parse_args()
    # a dry run measures nothing: whatever the code, it may go on
    known = facts() | ({"commit": "dry run"} if options.dry_run else {})
    journal = Journal(options.out / f"{options.part}.json", known, options.deadline)
    try:
        done = import_module(f"benchmarks.gpu.{options.part}").main(journal, options.out, options.dry_run)
    except Exception as error:
        # what is broken stands beside the cases that were done
        journal.content["broken"] = f"{type(error).__name__}: {error}"
        journal.write()
        print(f"  broken: {type(error).__name__}: {error}", flush=True)
        return 1
    return 0 if done else 1


if __name__ == "__main__":
    sys.exit(main())
