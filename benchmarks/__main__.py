"""``python -m benchmarks``: what can be measured or counted, a command each."""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from xclip_fast.errors import InputError
from xclip_fast.files import check_writable


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command of these arguments, by default those of the command line; its exit code."""
    options = _parser().parse_args(arguments)
    try:
        return int(options.run(options))
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    commands = parser.add_subparsers(required=True)

    run = commands.add_parser("run", help="measure a suite, or one case at the shape that a model gives it")
    what = run.add_mutually_exclusive_group(required=True)
    what.add_argument("--suite", help="cpu, ops, rivals or tiny")
    what.add_argument("--case", help="model, or an op")
    run.add_argument("--variant", help="of the case, B/32 without; of a suite these alone")
    run.add_argument("--batch", type=int, help="the same, 1 without")
    run.add_argument("--dtype", help="the same, float32 without")
    run.add_argument("--input", help="of the models: normalised, or uint8; training takes normalised frames")
    run.add_argument("--cache", default="warm", help="warm, or cold: caches are overwritten before each call")
    run.add_argument("--device", default="cpu")
    run.add_argument("--full", action="store_true", help="long blocks and peak memory, or three short blocks")
    run.add_argument("--json", type=Path, metavar="FILE", help="write the results there, after each row")
    run.add_argument("--add", action="store_true", help="to the rows that FILE has, of the same machine and versions")
    run.set_defaults(run=_run)

    launches = commands.add_parser("launches", help="kernel launches of one call, counted on meta tensors")
    launches.add_argument("--batch", type=int, default=1, help="videos in the batch")
    launches.add_argument("--json", action="store_true", help="variant to input to provider to launches, as JSON")
    launches.set_defaults(run=_launches)

    tune = commands.add_parser("tune", help="try the tiles of an op's kernels on this GPU, checked and then timed")
    tune.add_argument("op")
    tune.add_argument("--shape", action="append", default=[], help="variant and batch; B/16x8 without; again for more")
    tune.add_argument("--json", type=Path, metavar="FILE", help="write what was found there, for a tuning table")
    tune.add_argument("--dry-run", action="store_true", help="without a GPU: tiny, in the interpreter")
    tune.set_defaults(run=_tune)

    host = commands.add_parser("host", help="host time of ops and models, on a stand-in for CUDA that computes nothing")
    host.add_argument("cases", nargs="*", help="norm, ops, block, forward or train; all without")
    host.add_argument("--json", type=Path, metavar="FILE", help="write the microseconds there")
    host.set_defaults(run=_host)

    decode = commands.add_parser("decode", help="training batches beside the bare pool: clips a second, in turns")
    decode.add_argument("videos", nargs="*", help="files; without any some are made")
    decode.add_argument("--clips", type=int, default=160, help="of a turn, 160 without")
    decode.add_argument("--workers", type=int, default=2, help="processes, 2 without")
    decode.add_argument("--rounds", type=int, default=3, help="turns of each kind, 3 without")
    decode.add_argument("--json", type=Path, metavar="FILE", help="write the figures there")
    decode.set_defaults(run=_decode)

    training = commands.add_parser("training", help="a training step on the CPU: its time, and the memory it keeps")
    training.add_argument("others", nargs="*", help="providers beside Hugging Face's, layers and optimized")
    training.add_argument("--json", type=Path, metavar="FILE", help="write the rows there")
    training.set_defaults(run=_training)

    tables = commands.add_parser("tables", help="write the tables and figures of docs/ from benchmarks/results")
    tables.set_defaults(run=_tables)

    report = commands.add_parser("report", help="a page (.html) or a figure (.svg, .png) of a file of results")
    report.add_argument("results", type=Path)
    report.add_argument("out", type=Path)
    report.set_defaults(run=_report)

    compare = commands.add_parser("compare", help="two files of results of one machine")
    compare.add_argument("first", type=Path)
    compare.add_argument("second", type=Path)
    compare.set_defaults(run=_compare)

    against = commands.add_parser("against", help="this tree beside another commit, measured in turns")
    against.add_argument("base", help="a commit, such as HEAD~1 or main")
    against.add_argument("--suite", default="ops")
    against.add_argument("--rounds", type=int, default=2)
    against.set_defaults(run=_against)
    return parser


def _run(options: argparse.Namespace) -> int:
    from benchmarks.gpu.e2e import describe
    from benchmarks.suites import OP_BACKENDS, effort, jobs
    from xclip_fast.bench.providers import QUICK
    from xclip_fast.bench.record import Run
    from xclip_fast.bench.run import MODEL, Job, make_case, run

    if options.json is not None and not options.json.absolute().parent.is_dir():
        raise InputError(f"there is no folder {str(options.json.absolute().parent)!r} to write to")
    if options.add and options.json is None:
        raise InputError("rows can be added to a file: name it with --json")
    given = {name: getattr(options, name) for name in ("variant", "batch", "dtype")}
    given = {name: value for name, value in given.items() if value is not None}
    if options.suite is None:
        case = make_case(options.case, **{"variant": "B/32", "device": options.device, "input": options.input} | given)
        wanted = [Job(case, QUICK if options.case == MODEL else OP_BACKENDS)]
    else:
        wanted = jobs(options.suite, options.input)
        wanted = [job for job in wanted if all(getattr(job.case, name) == value for name, value in given.items())]
        if not wanted:
            raise InputError(f"the suite {options.suite!r} has no such case")
    before = Run.load(options.json) if options.add and options.json.exists() else None
    found = run(
        wanted,
        effort(options.suite, options.full, options.cache),
        lambda row: print(describe(row), flush=True),
        options.json,
        before,
    )
    minutes, seconds = divmod(round(found.facts["seconds"]), 60)
    print(f"{len(found.rows)} rows in {minutes} min {seconds} s")
    return 0 if found.sound else 1


def _launches(options: argparse.Namespace) -> int:
    from xclip_fast.bench.launches import CLASSES, table

    rows = table(options.batch)
    if options.json:
        print(json.dumps(rows))
        return 0
    print(f"kernel launches of one call: batch {options.batch}, {CLASSES} encoded class texts, bfloat16")
    providers = list(rows["B/32"]["uint8"])
    print(f"{'variant':10}{'input':12}" + "".join(f"{provider:>12}" for provider in providers))
    for variant, inputs in rows.items():
        for input, row in inputs.items():
            print(f"{variant:10}{input:12}" + "".join(f"{row[provider]:12}" for provider in providers))
    print("engine: of its graph; frames are copied into it and logits out of it, two more")
    return 0


def _tune(options: argparse.Namespace) -> int:
    if options.dry_run:
        os.environ["TRITON_INTERPRET"] = "1"  # before triton reads it
    from benchmarks.tune import main as tune

    return tune(options.op, options.shape, options.json, options.dry_run)


def _host(options: argparse.Namespace) -> int:
    from benchmarks.host import measure

    return measure(options.json, options.cases)


def _decode(options: argparse.Namespace) -> int:
    from benchmarks.decode import measure

    return measure(options.videos, options.clips, options.workers, options.rounds, options.json)


def _training(options: argparse.Namespace) -> int:
    from benchmarks.training import measure

    if options.json is not None:
        check_writable(options.json)
    return measure(options.json, options.others)


def _tables(options: argparse.Namespace) -> int:
    from benchmarks import figures, tables

    for page in tables.PAGES:
        if tables.write(page):
            print(f"{page.name}: written")
    if figures.write():
        print(f"{figures.FOLDER.name}: drawn")
    return 0


def _report(options: argparse.Namespace) -> int:
    from xclip_fast.bench.record import Run
    from xclip_fast.bench.report import write_figure, write_report

    write = write_report if options.out.suffix == ".html" else write_figure
    write(Run.load(options.results), options.out)
    return 0


def _compare(options: argparse.Namespace) -> int:
    from benchmarks.compare import main as compare

    return compare(options.first, options.second)


def _against(options: argparse.Namespace) -> int:
    from benchmarks.history import main as against

    return against(options.base, options.suite, options.rounds)


if __name__ == "__main__":
    sys.exit(main())
