"""Frames to a real video file."""

from __future__ import annotations

from fractions import Fraction
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from xclip_fast.errors import InputError
from xclip_fast.files import replacing

_RATE = 20  # frames a second
_QUALITY = "12"  # the constant rate factor of x264: visibly lossless


def write_mp4(path: Path, frames: NDArray[np.uint8]) -> None:
    """Write frames as H.264 in an mp4 file, which appears whole or not at all.

    Args:
        path: the file; its folder must exist.
        frames: uint8 (F, H, W, 3) RGB, with even H and W.

    Raises:
        InputError: PyAV or its H.264 encoder is not there, or the file can't be written.
    """
    try:
        import av
    except ImportError as error:
        raise InputError("writing mp4 files needs PyAV: pip install av") from error
    if "libx264" not in av.codecs_available:
        raise InputError("this build of PyAV has no H.264 encoder (libx264): pip install av")
    with replacing(path) as temporary, av.open(str(temporary), "w", format="mp4") as container:
        stream = container.add_stream("libx264", rate=Fraction(_RATE), options={"crf": _QUALITY, "threads": "1"})
        stream.height, stream.width = frames.shape[1:3]
        stream.pix_fmt = "yuv420p"
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode())
