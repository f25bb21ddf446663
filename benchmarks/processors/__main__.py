"""``python -m benchmarks.processors MASK COMMAND...``: a command on a processor that seems to have fewer features."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from benchmarks.processors import MASKS, run
from xclip_fast.errors import InputError


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command of these arguments, by default those of the command line; its exit code."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.processors", description=__doc__)
    parser.add_argument("mask", help=", ".join(MASKS))
    parser.add_argument("command", nargs=argparse.REMAINDER, help="a program and its arguments")
    options = parser.parse_args(arguments)
    if not options.command:
        parser.error("a command is needed behind the mask")
    try:
        return run(options.mask, options.command)
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
