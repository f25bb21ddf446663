"""``xclip-fast reproduce``: the paper in miniature, on two cores and without a download."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from xclip_fast.cli.batch import progress_bar
from xclip_fast.cli.console import CHECK_FAILED, emit_json, needs_extra, note, safe, stdout, table
from xclip_fast.cli.options import AsJson

if TYPE_CHECKING:
    from xclip_fast.reproduce import Summary


def reproduce(
    quick: Annotated[
        bool, typer.Option("--quick", help="One seed and fewer steps: figures without intervals.")
    ] = False,
    out: Annotated[
        Path | None,
        typer.Option(
            metavar="FOLDER",
            help="For the runs, the page and the results; what is in it is not run again.",
            show_default="reproduction, or reproduction-quick",
        ),
    ] = None,
    as_json: AsJson = False,
) -> int:
    """Reproduce the paper in small: pretrain a tiny CLIP, expand it to video part by part, and compare.

    Synthetic clips, two processes of one thread. A stopped run goes on where it was. The exit code is 1 when a claim
    does not hold in the figures.
    """
    with needs_extra("the reproduction", "train"):
        from xclip_fast.reproduce import FULL, QUICK
        from xclip_fast.reproduce import reproduce as run
    from xclip_fast.reproduce.results import summarise
    from xclip_fast.reproduce.run import PAGE, RESULTS

    folder = out or Path("reproduction-quick" if quick else "reproduction")
    with progress_bar() as progress:
        task = progress.add_task("", total=None)
        found = run(
            folder,
            QUICK if quick else FULL,
            lambda stage, done, total: progress.update(task, description=stage, completed=done, total=total),
        )
    summary = summarise(found["runs"])
    if as_json:
        emit_json(found)
    else:
        _show(summary)
        stdout.print(safe(f"Page and results: {folder / PAGE}, {folder / RESULTS}"), soft_wrap=True)
    if all(claim.holds for claim in summary.claims):
        return 0
    note("a claim does not hold in these figures")
    return CHECK_FAILED


def _show(summary: Summary) -> None:
    from xclip_fast.reproduce.models import TITLES
    from xclip_fast.reproduce.plan import SCRATCH, STARTS
    from xclip_fast.reproduce.results import WORDS, percent, shown

    ladder = table("Miniature: top-1 on test clips, mean over seeds (95 % interval)", "model", "top-1", *WORDS)
    for name, one in summary.ladder.items():
        ladder.add_row(TITLES[name], shown(one), *(percent(summary.words[name][word].mean) for word in WORDS))
    stdout.print(ladder)
    few_shot = table("Few-shot, of new classes", "K", *STARTS.values())
    for k in summary.few_shot[SCRATCH]:
        few_shot.add_row(str(k), *(shown(summary.few_shot[start][k]) for start in STARTS))
    stdout.print(few_shot)
    for claim in summary.claims:
        stdout.print(safe("holds: " if claim.holds else "DOES NOT HOLD: ", "green" if claim.holds else "red"), end="")
        stdout.print(safe(f"{claim.text} {claim.figures}"))
