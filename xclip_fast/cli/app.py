"""The typer application, and the one place where errors become a line and an exit code."""

from __future__ import annotations

import inspect
import logging
import os
import sys
from collections.abc import Callable, Sequence
from functools import partial
from typing import Annotated

import typer

import xclip_fast
from xclip_fast.cli.bench import bench
from xclip_fast.cli.classify import classify
from xclip_fast.cli.console import BAD_INPUT, EXIT_CODES, INTERRUPTED, OK, READER_GONE, StderrHandler, problem, stderr
from xclip_fast.cli.convert import convert
from xclip_fast.cli.demo import demo
from xclip_fast.cli.embed import embed
from xclip_fast.cli.evaluate import evaluate
from xclip_fast.cli.flops import flops
from xclip_fast.cli.info import info
from xclip_fast.cli.profile import profile
from xclip_fast.cli.reproduce import reproduce
from xclip_fast.cli.split import COMMANDS, split
from xclip_fast.cli.train import train
from xclip_fast.cli.verify import verify
from xclip_fast.errors import InputError

app = typer.Typer(
    name="xclip-fast",
    help="X-CLIP video recognition: classify and embed videos, convert checkpoints, measure and verify.",
    epilog=EXIT_CODES,
    invoke_without_command=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _help(command: Callable[..., object]) -> str:
    # typer would keep the line breaks of the source
    paragraphs = (inspect.getdoc(command) or "").split("\n\n")
    return "\n\n".join(paragraph.replace("\n", " ") for paragraph in paragraphs)


for command in (demo, reproduce, classify, embed, train, evaluate, convert, bench, verify, profile, flops, info):
    app.command(help=_help(command), epilog=EXIT_CODES)(command)
for name, command in COMMANDS.items():
    split.command(name, help=_help(command), epilog=EXIT_CODES)(command)
app.add_typer(split)


def _show_version(wanted: bool) -> None:
    if wanted:
        print(f"xclip-fast {xclip_fast.__version__}")
        raise typer.Exit


@app.callback()
def _root(
    context: typer.Context,
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Show the version and exit.")
    ] = False,
) -> None:
    log = logging.getLogger("xclip_fast")
    before, log.handlers = log.handlers, [StderrHandler(logging.WARNING)]
    # a program that calls main keeps its own logging
    context.call_on_close(partial(setattr, log, "handlers", before))
    # a failed download is one line of ours, not forty of theirs
    logging.basicConfig(handlers=[logging.NullHandler()])
    os.environ.setdefault("HF_HUB_VERBOSITY", "critical")
    if context.invoked_subcommand is None:
        print(context.get_help())
        raise typer.Exit(BAD_INPUT)


def run(arguments: Sequence[str] | None = None) -> int:
    """Run one command; every expected failure is one line on stderr and a documented exit code."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            # labels may not fit the terminal's encoding
            stream.reconfigure(errors="backslashreplace")
    try:
        code = app(args=arguments, prog_name="xclip-fast", standalone_mode=False) or OK
        print(end="", flush=True)
    except (BrokenPipeError, SystemExit) as end:
        # typer and rich turn a broken pipe into an exit of their own
        if not isinstance(end if isinstance(end, OSError) else end.__context__, BrokenPipeError):
            raise
        # python flushes stdout once more when it ends: that must not fail again
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        return READER_GONE
    except (KeyboardInterrupt, typer.Abort):
        code = INTERRUPTED
    except InputError as error:
        problem(error)
        return BAD_INPUT
    except ImportError as error:
        if (error.name or "").startswith("xclip_fast"):
            raise
        problem(f"a library does not import ({error}): see xclip-fast info")
        return BAD_INPUT
    except OSError as error:
        problem(f"{error.filename or 'output'}: {error.strerror}" if error.errno else error)
        return BAD_INPUT
    except Exception as error:
        # typer's usage errors: their class moved between typer's versions
        if not hasattr(error, "format_message"):
            raise
        command = getattr(getattr(error, "ctx", None), "command_path", "xclip-fast")
        problem(f"{error.format_message().rstrip('.')}: see {command} --help")
        return BAD_INPUT
    if code == INTERRUPTED:
        stderr.print("interrupted: nothing was left half-written")
    return code
