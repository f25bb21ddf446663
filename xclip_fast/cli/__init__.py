"""The ``xclip-fast`` command: one file per subcommand, and nothing heavy imported before one runs."""

from __future__ import annotations

import sys
from collections.abc import Sequence


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code that ``xclip-fast --help`` documents.

    Args:
        arguments: what follows the program's name; by default those of this process.
    """
    try:
        from xclip_fast.cli.app import run
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] not in ("typer", "rich", "click"):
            raise
        print(
            f"error: the command line needs typer and rich, found no {error.name}: pip install 'xclip-fast[cli]'",
            file=sys.stderr,
        )
        return 2
    return run(arguments)
