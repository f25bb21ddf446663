"""What classify and embed share: opening the model, going through the files, reporting the bad ones."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, TypeVar

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from xclip_fast.cli.console import note, printable, problem, stderr, warning
from xclip_fast.errors import InputError

if TYPE_CHECKING:
    from torch import Tensor

DTYPES = ("float32", "bfloat16", "float16")

Result = TypeVar("Result")


def open_model(weights: str, frames: int | None, device: str, dtype: str) -> Any:
    """The model of ``--weights``, ready on its device; a note says what the demo's weights are worth."""
    if dtype not in DTYPES:
        raise InputError(f"unknown dtype {dtype!r}: choose one of {', '.join(DTYPES)}")

    import torch

    from xclip_fast.checkpoints import load_model

    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if weights == "demo":
        from xclip_fast.demo import CLASSES, WEIGHTS

        note(f"the demo model knows only its synthetic motions ({', '.join(CLASSES)}): see --weights")
        weights = WEIGHTS
    model = load_model(weights, frames=frames, dtype=getattr(torch, dtype), device=device)
    if fresh := len(model.load_report.initialised):
        warning(f"{weights} are CLIP's weights: {fresh} tensors that X-CLIP adds are random, so train it first")
    return model


def view_loader(model: Any, plan: dict[str, Any]) -> Callable[[str], Tensor]:
    """A function that reads the views of a file as the model takes them; ``plan`` is what ``plan_views`` checked."""
    from xclip_fast.video import load_video

    def load(path: str) -> Tensor:
        return load_video(path, frames=model.config.frames, size=model.config.image_size, **plan)

    return load


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
            message = None
            if error is not None:
                named = path in str(error) or ascii(path) in str(error)
                message = printable(error if named else f"{path}: {error}")
                problem(message)
            yield path, result, message
            progress.advance(task)
