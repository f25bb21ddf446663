"""What every subcommand shares to speak: safe text, tables, problems, JSON and the exit codes."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from rich.text import Text

from xclip_fast.errors import InputError

OK, CHECK_FAILED, BAD_INPUT, INTERRUPTED, READER_GONE = 0, 1, 2, 130, 141

EXIT_CODES = (
    "Exit codes: 0 done; 1 a check failed; 2 bad input or usage, also when one file of a batch failed; "
    "130 interrupted; 141 the reader of the output went away."
)

stdout = Console(highlight=False)
stderr = Console(stderr=True, highlight=False)


def printable(text: object) -> str:
    """The text on one line, with every control, bidirectional or undecodable character spelled out.

    File names, labels and messages come from outside: shown raw they could drive the terminal.
    """
    return "".join(
        char if char.isprintable() else char.encode("unicode_escape", "backslashreplace").decode() for char in str(text)
    )


def safe(text: object, style: str = "") -> Text:
    """Text from outside for a table or a line: no terminal escapes, no rich markup."""
    return Text(printable(text), style=style, overflow="fold")


def problem(message: object) -> None:
    """One ``error:`` line on stderr."""
    _say("error", "bold red", message)


def warning(message: object) -> None:
    """One ``warning:`` line on stderr."""
    _say("warning", "bold yellow", message)


def note(message: object) -> None:
    """One ``note:`` line on stderr."""
    _say("note", "bold cyan", message)


def _say(word: str, style: str, message: object) -> None:
    try:
        stderr.print(Text.assemble((f"{word}: ", style), printable(message)), soft_wrap=True)
    except BrokenPipeError:
        raise
    except OSError:
        # a log on a full disk must not stop the work, nor change the exit code when python ends
        os.dup2(os.open(os.devnull, os.O_WRONLY), 2)


@contextmanager
def needs_extra(what: str, extra: str) -> Iterator[None]:
    """Say of a library that does not import which extra brings it.

    Raises:
        InputError: it is not installed.
    """
    try:
        yield
    except ImportError as error:
        if (error.name or "").startswith("xclip_fast"):
            raise
        raise InputError(f"{what} needs {error.name}: pip install 'xclip-fast[{extra}]'") from error


def emit_json(payload: dict[str, Any]) -> None:
    """The one JSON object of a run, on stdout; it escapes everything that is not ASCII."""
    print(json.dumps(payload, indent=2, allow_nan=False))


def table(title: str | None, *columns: str, numbers: tuple[str, ...] = ()) -> Table:
    """An empty table in the house style; the columns named in ``numbers`` are aligned to the right."""
    made = Table(title=title, title_justify="left", title_style="bold", header_style="cyan", box=SIMPLE_HEAD)
    for column in columns:
        right = column in numbers
        made.add_column(column, justify="right" if right else "left", no_wrap=right, overflow="fold")
    return made


class StderrHandler(logging.Handler):
    """The library's log, from warnings upwards, as ``warning:`` lines on stderr."""

    def emit(self, record: logging.LogRecord) -> None:
        """Print one record on one line."""
        warning(record.getMessage())
