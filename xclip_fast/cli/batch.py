"""What classify and embed share: opening the model, going through the files, reporting the bad ones."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, TypeVar

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from xclip_fast.cli.console import printable, problem, stderr

Result = TypeVar("Result")


def open_model(weights: str, frames: int | None, device: str, dtype: str) -> Any:
    """The model of ``--weights``, ready on its device; a note says what the demo's weights are worth."""
    from xclip_fast.pipeline import resolve_device, resolve_dtype

    place, precision = resolve_device(device), resolve_dtype(dtype)
    if weights != "demo":
        from xclip_fast.checkpoints import load_model

        return load_model(weights, frames=frames, dtype=precision, device=place)
    raise NotImplementedError


def through_files(
    videos: list[str], work: Callable[[str], Result], what: str
) -> Iterator[tuple[str, Result | None, str | None]]:
    """(file, result, None) or (file, None, problem) for each file; problems go to stderr as they come."""
    from xclip_fast.pipeline import each_file

    columns = (TextColumn(what), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    quiet = len(videos) < 2 or not stderr.is_terminal
    with Progress(*columns, console=stderr, transient=True, disable=quiet) as progress:
        task = progress.add_task(what, total=len(videos))
        for path, result, error in each_file(videos, work):
            found = None if error is None else printable(error if path in str(error) else f"{path}: {error}")
            if found is not None:
                problem(found)
            yield path, result, found
            progress.advance(task)
