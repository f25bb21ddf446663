"""The options that several subcommands share, spelled once."""

from __future__ import annotations

import re
from typing import Annotated, Any

import typer

from xclip_fast.errors import InputError

DEMO = "demo"  # stands for the weights in the package
SECONDS, MOST_SECONDS = 300.0, 86400.0
MAX_CLIPS = 100  # the views of a video are in memory at once
MAX_FRAMES = 1024

Videos = Annotated[list[str], typer.Argument(metavar="VIDEO...", help="Video files.", show_default=False)]
AsJson = Annotated[bool, typer.Option("--json", help="One JSON object on stdout and nothing else.")]
Weights = Annotated[
    str,
    typer.Option(
        metavar="SOURCE",
        help="Checkpoint (.pth, .safetensors), folder, Hugging Face id, open_clip model name, or 'demo': "
        "the small model shipped with xclip_fast.",
    ),
]
Frames = Annotated[
    int | None, typer.Option(min=1, max=MAX_FRAMES, help="Frames of a clip; by default those of the weights.")
]
Views = Annotated[
    str,
    typer.Option(
        metavar="CLIPSxCROPS", help="Views of a video, such as 4x3 (4 clips of 3 crops) or 4 (one crop each)."
    ),
]
Preset = Annotated[
    str | None,
    typer.Option(help="Resize and crop: official, hf or clip.", show_default="official; hf for the demo's weights"),
]
BatchSize = Annotated[int, typer.Option(min=1, max=4096, help="Views that are computed at once.")]
Workers = Annotated[
    int | None,
    typer.Option(
        min=0, help="Processes that decode; 0 for none.", show_default="one a core, at most 8; none for few files"
    ),
]
Seconds = Annotated[float, typer.Option(help="Seconds after which a process gives up a file.")]
Device = Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N.")]
Precision = Annotated[str, typer.Option("--dtype", help="float32, bfloat16 or float16.")]
Backend = Annotated[str, typer.Option(help="Video decoder: auto, or one that `xclip-fast info` lists.")]
Vocabulary = Annotated[
    str | None,
    typer.Option(
        metavar="FILE", help="CLIP's BPE vocabulary file, for a machine without open_clip.", show_default=False
    ),
]

TextCacheFolder = Annotated[
    str | None,
    typer.Option(
        "--text-cache",
        metavar="DIR",
        help="Keep encoded class names here for the next run, known by weights and tokens.",
        show_default=False,
    ),
]


def parse_views(text: str) -> tuple[int, int]:
    """(clips, crops) of "4x3" or "4".

    Raises:
        InputError: the text is neither, or a number is zero.
    """
    found = re.fullmatch(r"([1-9]\d{0,3})(?:x([1-9]\d{0,3}))?", text.strip().lower(), re.ASCII)
    if found is None:
        raise InputError(f"--views must be CLIPSxCROPS such as 4x3, or a number, found {text!r}")
    return int(found[1]), int(found[2] or 1)


def default_preset(weights: str) -> str:
    """The official preset, but for the demo's weights the one that leaves the demo's small clips as they are."""
    return "hf" if weights == DEMO else "official"


def check_seconds(timeout: float) -> None:
    """Refuse a ``--timeout`` out of range.

    Raises:
        InputError: it is.
    """
    if not 0 < timeout <= MOST_SECONDS:
        raise InputError(f"--timeout takes more than 0 and up to {MOST_SECONDS:g} seconds, found {timeout:g}")


def plan_views(views: str, preset: str, backend: str) -> dict[str, Any]:
    """Arguments for ``load_video``, checked before any work is done.

    Raises:
        InputError: one of the options cannot be used.
    """
    clips, crops = parse_views(views)
    if crops not in (1, 3) or clips > MAX_CLIPS:
        raise InputError(f"--views takes up to {MAX_CLIPS} clips of 1 or 3 crops, found {views!r}: try 4x3")

    from xclip_fast.video import PRESETS, available_backends

    if preset not in PRESETS:
        raise InputError(f"unknown preset {preset!r}: choose one of {', '.join(PRESETS)}")
    usable = available_backends()
    if backend != "auto" and backend not in usable:
        raise InputError(f"unknown backend {backend!r}: choose one of auto, {', '.join(usable)}")
    if reason := usable.get(backend):
        raise InputError(f"backend {backend!r} cannot be used here: {reason}")
    return {"clips": clips, "crops": crops, "preset": preset, "backend": backend}
