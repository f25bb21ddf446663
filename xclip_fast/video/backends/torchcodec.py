"""torchcodec: reads mp4 and mkv files by their exact frame times; needs FFmpeg's shared libraries on the system."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any

from xclip_fast.errors import InputError
from xclip_fast.video.backends.base import Decoded, Keep, Request, VideoInfo, gather, undecodable
from xclip_fast.video.source import CheckedFile, check_length, check_picture

_PICTURES = ("mjpeg", "png", "bmp")


class TorchCodec:
    """Decodes in this process with the system's FFmpeg, on one thread."""

    name = "torchcodec"
    # in the others it loses or mixes up frames when B-frames come without a time of their own
    containers = frozenset({"mov", "matroska"})

    def unavailable(self) -> str | None:
        """Why torchcodec can't be used here, or None when it can."""
        try:
            from torchcodec.decoders import VideoStreamMetadata
        except ImportError as error:
            return f"the package torchcodec does not import ({error}); pip install torchcodec"
        # it raises RuntimeError with a page of text when FFmpeg is missing or built for another torch
        except (RuntimeError, OSError):
            return "torchcodec finds no FFmpeg libraries it can load, or was built for another torch; install FFmpeg"
        if "rotation" not in VideoStreamMetadata.__dataclass_fields__:
            return "this torchcodec does not turn rotated videos upright; pip install --upgrade torchcodec"
        return None

    def probe(self, source: CheckedFile) -> VideoInfo:
        """Scan the packets, decode nothing."""
        decoder = _open(source)
        found = decoder.metadata
        fps = found.average_fps or 0.0
        return VideoInfo(
            len(decoder), fps, found.width, found.height, found.codec or "unknown", found.duration_seconds or 0.0
        )

    def read(self, source: CheckedFile, request: Request, keep: Keep) -> Decoded:
        """Jump to each wanted frame; when one can't be found, decode from the start to see what can."""
        decoder = _open(source)
        return gather(
            source,
            request,
            count=len(decoder),
            declared=_declared(decoder),
            first=lambda wanted: _read(source, decoder, sorted(wanted), wanted, keep)[0],
            in_order=lambda wanted: _read(source, _open(source), range(max(wanted) + 1), wanted, keep),
        )


def _open(source: CheckedFile) -> Any:
    from torchcodec.decoders import VideoDecoder

    try:
        decoder = VideoDecoder(source.path, dimension_order="NHWC", num_ffmpeg_threads=1, seek_mode="exact")
    except (RuntimeError, ValueError) as error:
        # its messages begin with a place in its own sources
        raise undecodable(source, re.sub(r"^.*?\.cpp:\d+, ", "", str(error))) from None
    found = decoder.metadata
    check_picture(source.name, found.width or 0, found.height or 0)
    check_length(source.name, len(decoder), found.duration_seconds or 0.0)
    # it does not tell a cover picture from a video
    if len(decoder) == 1 and found.codec in _PICTURES:
        raise InputError(f"{source.name}: no moving pictures, found one still; give a file with a video stream")
    return decoder


def _declared(decoder: Any) -> int:
    """How many frames the header promises, from the length of what it says is shown; 0 when it says nothing."""
    found = decoder.metadata
    if not found.num_frames_from_header or not found.duration_seconds_from_header or not found.average_fps:
        return 0
    return round(found.duration_seconds_from_header * found.average_fps)


def _read(
    source: CheckedFile, decoder: Any, numbers: Iterable[int], wanted: set[int], keep: Keep
) -> tuple[dict[int, Any], int]:
    """Decode ``numbers`` up to the first that fails, keeping the wanted ones; also how many came out."""
    frames: dict[int, Any] = {}
    seen = 0
    for number in numbers:
        try:
            picture = decoder.get_frame_at(number).data.numpy()
        except (RuntimeError, IndexError):
            break
        check_picture(source.name, picture.shape[1], picture.shape[0])
        seen += 1
        if number in wanted:
            frames[number] = keep(picture)
    return frames, seen
