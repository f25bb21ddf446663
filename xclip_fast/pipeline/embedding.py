"""Features of one video, and of many files: decoded in processes of their own while full batches are computed."""

from __future__ import annotations

import os
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from xclip_fast.errors import InputError
from xclip_fast.pipeline.batches import BATCH_SIZE, VIEWS_AT_ONCE, check_finite, device_of, is_engine, run_files
from xclip_fast.reference.model import VideoFeatures
from xclip_fast.video.pool import DEADLINE_SECONDS


@dataclass(frozen=True)
class FileFeatures:
    """What became of one file.

    path: as given.
    video: float32 (E,) on the CPU, not normalised, the mean over the views; None for a file that cannot be used.
    patches: float32 (N, E), or None where they were not asked for.
    error: why the file cannot be used.

    Example:
        >>> from xclip_fast import InputError
        >>> from xclip_fast.pipeline import FileFeatures
        >>> FileFeatures("none.mp4", error=InputError("none.mp4: cannot be read")).video is None
        True
    """

    path: str
    video: Tensor | None = None
    patches: Tensor | None = None
    error: InputError | None = None


@torch.inference_mode()
def embed(model: Any, views: Tensor) -> VideoFeatures:
    """Features of one video, float32 and not normalised: ``video`` (E,) and ``patches`` (N, E), the mean of its views.

    Args:
        model: an ``Engine``, or what ``create_model`` or ``load_model`` returns.
        views: uint8 (views, T, H, W, 3) of one video.

    Raises:
        InputError: the model gave something that is not a number.

    Example:
        >>> import torch
        >>> from xclip_fast import XCLIPConfig, create_model
        >>> from xclip_fast.pipeline import embed
        >>> config = XCLIPConfig(image_size=32, patch_size=16, vision_width=64, vision_layers=1, embed_dim=64)
        >>> model = create_model(config)
        >>> features = embed(model, torch.zeros(4, 8, 32, 32, 3, dtype=torch.uint8))
        >>> features.video.shape, features.patches.shape
        (torch.Size([64]), torch.Size([4, 64]))
    """
    parts = [model.encode_video(some) for some in views.to(device_of(model)).split(VIEWS_AT_ONCE)]
    video = torch.cat([part.video for part in parts]).float().mean(dim=0).cpu()
    patches = torch.cat([part.patches for part in parts]).float().mean(dim=0).cpu()
    return VideoFeatures(check_finite(video), check_finite(patches))


def embed_files(
    model: Any,
    paths: Iterable[str | os.PathLike[str]],
    *,
    batch_size: int = BATCH_SIZE,
    patches: bool = False,
    clips: int = 1,
    crops: int = 1,
    preset: str = "official",
    backend: str = "auto",
    workers: int | None = None,
    timeout: float = DEADLINE_SECONDS,
) -> Iterator[FileFeatures]:
    """The features of each file, in the order of the files; one that cannot be used comes with its error.

    Views of several files share a batch. The number of workers changes no bit. A batch of another size, or a file more
    or less before it, may change the rounding of a GEMM: some 1e-6 of a feature in float32.

    Args:
        model: an ``Engine``, or what ``create_model`` or ``load_model`` returns.
        paths: local video files.
        batch_size: views in a batch.
        patches: also the patch features.
        clips, crops, preset, backend: as for ``load_video``; frames and size are the model's.
        workers, timeout: as for ``decode_files``. Ending the iterator ends the processes.

    Raises:
        InputError: an option cannot be used, the memory is too small for the batch, or the processes do not start.
        ValueError: a number is out of range, or ``paths`` is one path.

    Example:
        >>> from xclip_fast import Engine, XCLIPConfig, create_model
        >>> from xclip_fast.pipeline import embed_files
        >>> config = XCLIPConfig(image_size=32, patch_size=16, vision_width=64, vision_layers=1, embed_dim=64)
        >>> engine = Engine(create_model(config))
        >>> for found in embed_files(engine, ["clip.mp4", "none.mp4"], clips=2):
        ...     print(found.path, found.error or found.video.shape)
        clip.mp4 torch.Size([64])
        none.mp4 none.mp4: cannot be read (No such file or directory); give the path of a local video file
    """
    if isinstance(paths, str | os.PathLike):
        raise ValueError(f"paths must be a list of files, found the one path {os.fspath(paths)!r}")
    return embed_in_groups(
        model,
        [os.fsdecode(path) for path in paths],
        (),
        batch_size=batch_size,
        patches=patches,
        clips=clips,
        crops=crops,
        preset=preset,
        backend=backend,
        workers=workers,
        timeout=timeout,
    )


def embed_in_groups(
    model: Any, paths: Sequence[str], ends: Collection[int], *, patches: bool, **options: Any
) -> Iterator[FileFeatures]:
    """``embed_files``, but no batch goes on past the files whose places are in ``ends``."""
    return _features(run_files(model, _encoder(model, patches), paths, ends, **options))


def _features(files: Any) -> Iterator[FileFeatures]:
    # whoever closes this ends the processes that decode
    with closing(files):
        for file in files:
            video, patches = (*file.means, None, None)[:2]
            yield FileFeatures(file.source, video, patches, file.error)


def _encoder(model: Any, patches: bool) -> Callable[[Tensor], Sequence[Tensor]]:
    """From a batch of views to its rows: video features, then patch features where they are asked for."""

    @torch.inference_mode()
    def encode(views: Tensor) -> Sequence[Tensor]:
        # without patches an engine computes only the class rows of the last block
        if not patches and is_engine(model):
            return [model.embed_video(views)]
        return model.encode_video(views)[: 2 if patches else 1]

    return encode
