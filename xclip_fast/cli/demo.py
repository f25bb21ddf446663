"""``xclip-fast demo``: the tiny shipped model on clips where only time tells the classes apart."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from xclip_fast.cli.batch import progress_bar
from xclip_fast.cli.classify import show_ranking
from xclip_fast.cli.console import CHECK_FAILED, emit_json, note, safe, stdout, table
from xclip_fast.cli.options import AsJson

if TYPE_CHECKING:
    from xclip_fast.demo import DemoResult, RealVideo


def demo(
    video: Annotated[
        str | None, typer.Option(metavar="FILE", help="Also encode this video, of any kind.", show_default=False)
    ] = None,
    out: Annotated[
        Path | None, typer.Option(metavar="FOLDER", help="Keep the written mp4 files there.", show_default=False)
    ] = None,
    clips_per_class: Annotated[int, typer.Option(min=1, max=1000, help="Held-out clips of each class.")] = 16,
    as_json: AsJson = False,
) -> None:
    """Show that the model sees time: write mp4 files, decode them, classify them.

    The classes are moving shapes that only the order of the frames tells apart. The exit code is 1 when X-CLIP is right
    on less than 95 % of the clips, or the average of frames better than 60 % between a class and its reversal.
    """
    from xclip_fast.demo import run

    with progress_bar() as progress:
        task = progress.add_task("", total=None)
        result = run(
            video,
            out,
            clips_per_class,
            lambda stage, done, total: progress.update(task, description=stage, completed=done, total=total),
        )
    ours, *_, average = result.scores
    passed = ours.top1 >= 0.95 and average.pair_accuracy <= 0.6
    if as_json:
        emit_json({**result.to_dict(), "passed": passed})
    else:
        _show(result)
        if result.video is not None:
            _show_video(result.video)
    if not passed:
        note("the check failed: X-CLIP should be right on 95 % of the clips, and the average of frames by chance")
        raise typer.Exit(CHECK_FAILED)


def _show(result: DemoResult) -> None:
    ours, *_, average = result.scores
    titles = [score.title for score in result.scores]
    title = f"Right answers on {result.clips} held-out clips, {result.frames} frames each, read from mp4 files"
    figures = table(title, "", *titles, numbers=tuple(titles))
    figures.add_row(f"all {len(result.classes)} classes", *(f"{score.top1:.1%}" for score in result.scores))
    figures.add_row("a class or its reversal", *(f"{score.pair_accuracy:.1%}" for score in result.scores))
    for pair in ours.pairs:
        figures.add_row(
            f"  {pair.partition(' / ')[0]}", *(f"{score.pairs[pair]:.1%}" for score in result.scores), style="dim"
        )
    stdout.print(figures)
    stdout.print(f"X-CLIP is right on [bold green]{ours.top1:.1%}[/] of the clips.")
    stdout.print(f"With its frames averaged, a class or its reversal: [bold yellow]{average.pair_accuracy:.1%}[/].")
    for sentence in result.notes:
        stdout.print(sentence, style="dim")
    if result.folder is not None:
        stdout.print(safe(f"The mp4 files are in {result.folder}"), soft_wrap=True)
    stdout.print(f"{result.seconds:.1f} s", style="dim")


def _show_video(video: RealVideo) -> None:
    stdout.print()
    show_ranking(video.path, video.top)
    shape = " x ".join(map(str, video.shape))
    stdout.print(f"Read as {shape}; a feature of {video.embedding_size} numbers, norm {video.embedding_norm:.2f}.")
    stdout.print(video.note, style="dim")
