"""What classify and embed share: opening the model, going through the files, reporting the bad ones."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from typing import TYPE_CHECKING, Any, TypeVar, cast

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from xclip_fast.cli.console import note, printable, problem, stderr, stdout, warning
from xclip_fast.cli.options import DEMO
from xclip_fast.errors import InputError

if TYPE_CHECKING:
    from torch import Tensor

    from xclip_fast.checkpoints import LoadReport
    from xclip_fast.config import XCLIPConfig

DTYPES = ("float32", "bfloat16", "float16")

Result = TypeVar("Result")


def find_weights(name: str) -> str:
    """What ``load_model`` takes for a ``--weights``: the same, but for the demo's the file in the package."""
    if name != DEMO:
        return name

    from xclip_fast.demo.models import weights_path

    return str(weights_path("xclip"))


def open_model(weights: str, frames: int | None, device: str, dtype: str) -> Any:
    """The model of ``--weights``, ready on its device; a note says what the demo's weights are worth."""
    if dtype not in DTYPES:
        raise InputError(f"unknown dtype {dtype!r}: choose one of {', '.join(DTYPES)}")

    import torch

    from xclip_fast.checkpoints import load_model
    from xclip_fast.devices import find_device

    place = find_device(device)
    if weights == DEMO:
        note("the demo's model knows nothing but its moving shapes: choose another with --weights")
    model = load_model(find_weights(weights), frames=frames, dtype=getattr(torch, dtype), device=place)
    report = cast("LoadReport", model.load_report)
    if fresh := len(report.initialised):
        warning(f"{weights} are CLIP's weights: {fresh} tensors that X-CLIP adds are random, so train it first")
    return model


def definition_of(model: Any) -> Any:
    """The definition of the model in plain PyTorch, with the same weights."""
    import torch

    from xclip_fast.reference import XCLIP

    with torch.device("meta"):
        definition = XCLIP(model.config).eval()
    definition.load_state_dict(model.state_dict(), assign=True)
    return definition


def view_loader(config: XCLIPConfig, plan: dict[str, Any]) -> Callable[[str], Tensor]:
    """A function that reads the views of a file for a model of these sizes; ``plan_views`` has checked ``plan``."""
    from xclip_fast.video import load_video

    def load(path: str) -> Tensor:
        return load_video(path, frames=config.frames, size=config.image_size, **plan)

    return load


@contextmanager
def progress_bar(wanted: bool = True) -> Iterator[Progress]:
    """A bar on stderr that goes away at the end, and is never there when stderr is no terminal."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    wanted = wanted and stderr.is_terminal
    # a redirected stdout would lose its lines to stderr
    progress = Progress(*columns, console=stderr, transient=True, redirect_stdout=False, disable=not wanted)
    # older versions of rich end even a disabled bar with an empty line
    with progress if wanted else nullcontext():
        yield progress


class FileProgress:
    """A bar over files, and a line on stderr for each that cannot be used: a context manager."""

    def __init__(self, files: int, what: str) -> None:
        self.files, self.what = files, what
        self.stack = ExitStack()

    def __enter__(self) -> FileProgress:
        self.bar = self.stack.enter_context(progress_bar(self.files > 1))
        self.task = self.bar.add_task(self.what, total=self.files)
        return self

    def __exit__(self, *error: object) -> None:
        self.stack.close()

    def done(self, path: str, error: str | None) -> str | None:
        """Count a file; the line that was shown if there is an error."""
        message = None
        if error is not None:
            named = path in error or ascii(path) in error
            message = printable(error if named else f"{path}: {error}")
            problem(message)
        self.bar.advance(self.task)
        return message


def through_files(
    videos: list[str], work: Callable[[str], Result], what: str
) -> Iterator[tuple[str, Result | None, str | None]]:
    """(file, result, None) or (file, None, problem) for each file; problems go to stderr as they come."""
    from xclip_fast.pipeline import each_file

    with FileProgress(len(videos), what) as progress:
        # where results appear on the terminal of the bar, it makes room for them
        shared = stdout.is_terminal and not progress.bar.disable
        for path, result, error in each_file(videos, work):
            message = progress.done(path, None if error is None else str(error))
            if shared:
                progress.bar.stop()
            yield path, result, message
            if shared:
                progress.bar.start()
