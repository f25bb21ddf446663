"""PyAV: reads every container we allow, and frames far apart without decoding all between them."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np

from xclip_fast.errors import InputError
from xclip_fast.video.backends.base import Decoded, Keep, Request, VideoInfo, gather, log, undecodable
from xclip_fast.video.source import MAX_FRAMES, MAX_SIDE, CheckedFile, check_length, check_picture

# only these two keep the time of every frame and a trustworthy list of key frames
_SEEKABLE = ("mov", "matroska")
# decoders that can leave out frames no other frame is made from, and still output the rest at the right times
_SKIPS_UNREFERENCED = ("h264", "hevc")


@dataclass(frozen=True)
class _Index:
    """The packets of a video stream: their number, and when all have a time of their own, times and key times."""

    count: int
    declared: int
    fps: float
    seconds: float
    times: list[int]
    keys: list[int]


class PyAV:
    """Decodes in this process with the FFmpeg inside the ``av`` wheel, on one thread."""

    name = "pyav"
    containers = frozenset({"mov", "matroska", "avi", "mpeg", "mpegts"})

    def unavailable(self) -> str | None:
        """Why PyAV can't be used here, or None when it can."""
        try:
            import av
        except ImportError as error:
            return f"the package av does not import ({error}); pip install av"
        # the rotation of frames and the disposition of streams came in 15
        if _major_version() < 15:
            return f"av {av.__version__} is too old, 15 is needed; pip install --upgrade av"
        return None

    def probe(self, source: CheckedFile) -> VideoInfo:
        """Count packets and decode the first frame, which tells the upright size."""
        with _open(source) as (container, stream):
            index = _scan(source, container, stream)
            codec = stream.codec_context.name
        frames, _ = _read_in_order(source, {0}, lambda frame: frame.shape[:2])
        if not frames:
            raise undecodable(source, "no frame comes out")
        height, width = frames[0]
        return VideoInfo(index.count, index.fps, width, height, codec, index.seconds)

    def read(self, source: CheckedFile, request: Request, keep: Keep) -> Decoded:
        """Jump between key frames where the container allows it, else decode from the start to the last frame."""
        with _open(source) as (container, stream):
            index = _scan(source, container, stream)
            return gather(
                source,
                request,
                count=index.count,
                declared=index.declared,
                first=lambda wanted: _read_sparse(source, container, stream, index, wanted, keep),
                in_order=lambda wanted: _read_in_order(source, wanted, keep),
            )


def _major_version() -> int:
    import av

    return int(av.__version__.split(".")[0])


@contextmanager
def _open(source: CheckedFile) -> Iterator[tuple[Any, Any]]:
    """The container and its video stream, with the demuxer fixed and no other protocol or larger picture allowed."""
    import av
    from av.stream import Disposition

    # as plain ``options`` they would reach the streams too, which crashes PyAV before 18 in mpeg files
    settings: dict[str, Any] = {"format": source.container, "container_options": {"protocol_whitelist": "file"}}
    # a title that is not UTF-8 is no reason to refuse a video; from 19 on it is none for PyAV
    if _major_version() < 19:
        settings["metadata_errors"] = "replace"
    try:
        with av.open(source.path, **settings) as container:
            stream = container.streams.best("video")
            if stream is None or stream.disposition & Disposition.attached_pic:
                kinds = {stream.type for stream in container.streams} - {"video"}
                found = f"only {' and '.join(sorted(kinds))}" if kinds else "nothing"
                raise InputError(f"{source.name}: no moving pictures, found {found}; give a file with a video stream")
            if stream.codec_context is None:
                raise undecodable(source, "no decoder for its codec")
            check_picture(source.name, stream.codec_context.width, stream.codec_context.height)
            stream.codec_context.thread_count = 1
            stream.codec_context.options = {"max_pixels": str(MAX_SIDE**2)}
            yield container, stream
    except (av.FFmpegError, MemoryError) as error:
        raise undecodable(source, getattr(error, "strerror", None) or "out of memory") from None


def _scan(source: CheckedFile, container: Any, stream: Any) -> _Index:
    """List the packets; the header's word on their number and times is only used to notice a file cut short."""
    import av

    times: list[int | None] = []
    keys: list[int | None] = []
    hidden = 0
    try:
        for packet in container.demux(stream):
            if packet.is_keyframe:
                keys.append(packet.pts)
            # frames before the start of a video that was cut without encoding it anew are decoded but not shown
            hidden += packet.is_discard
            if packet.size and not packet.is_discard:
                times.append(packet.pts)
            if len(times) > MAX_FRAMES:
                break
    except av.FFmpegError:
        pass  # what came before the damage can still be used
    known = sorted(time for time in times if time is not None)
    timed = len(set(known)) == len(times)
    rate = float(stream.average_rate or stream.guessed_rate or 0)
    if len(known) > 1:
        seconds = float((known[-1] - known[0]) * stream.time_base)
        fps = rate or (len(known) - 1) / max(seconds, 1e-6)
        seconds += 1 / fps
    else:
        fps = rate
        seconds = len(times) / rate if rate else 0.0
    check_length(source.name, len(times), seconds)
    # where the header gives no number, its duration shows what is missing, but for audio that may last longer
    missing = (container.duration or 0) / 1e6 / seconds if seconds and len(container.streams) == 1 else 1.0
    declared = stream.frames - hidden if stream.frames else round(len(times) * missing)
    seekable = timed and source.container in _SEEKABLE and None not in keys
    return _Index(
        count=len(times),
        declared=declared,
        fps=fps,
        seconds=seconds,
        times=known,
        keys=sorted(time for time in keys if time is not None) if seekable else [],
    )


def _read_sparse(
    source: CheckedFile, container: Any, stream: Any, index: _Index, wanted: set[int], keep: Keep
) -> dict[int, Any]:
    """Decode from the key frame before each wanted frame; a frame that does not come out at its time is left out."""
    import av

    codec = stream.codec_context
    skips = codec.name in _SKIPS_UNREFERENCED
    convert = _Converter(source)
    frames: dict[int, Any] = {}
    # numbers of wanted frames by time, by the time of the key frame they are decoded from
    groups: dict[int, dict[int, int]] = {}
    for number in sorted(wanted) if index.keys else ():
        key = index.keys[max(bisect_right(index.keys, index.times[number]) - 1, 0)]
        groups.setdefault(key, {})[index.times[number]] = number
    try:
        for key, group in groups.items():
            container.seek(key, stream=stream, backward=True)
            for packet in container.demux(stream):
                if skips:
                    codec.skip_frame = "DEFAULT" if packet.pts in group else "NONREF"
                shown = packet.decode()
                for frame in shown:
                    if frame.pts in group and not frame.is_corrupt:
                        frames[group[frame.pts]] = keep(convert(frame))
                if any(frame.pts is None or frame.pts >= max(group) for frame in shown):
                    break
    except av.FFmpegError as error:
        log.debug("%s: jumping between key frames failed (%s), reading from the start", source.name, error)
    return frames


def _read_in_order(source: CheckedFile, wanted: set[int], keep: Keep) -> tuple[dict[int, Any], int]:
    """Decode from the start to the last wanted frame; also how many frames came out, damaged packets left aside."""
    import av

    frames: dict[int, Any] = {}
    number = 0
    with _open(source) as (container, stream):
        convert = _Converter(source)
        packets = container.demux(stream)
        while len(frames) < len(wanted):
            try:
                packet = next(packets, None)
            except av.FFmpegError:
                packet = None
            if packet is None:
                break
            try:
                shown = packet.decode()
            except av.FFmpegError:
                continue
            for frame in shown:
                if number in wanted:
                    frames[number] = keep(convert(frame))
                number += 1
    return frames, number


class _Converter:
    """Turns decoded frames into upright RGB arrays by the conversion the ffmpeg program uses.

    ``VideoFrame.to_ndarray`` ignores where chroma samples lie, so odd sizes and 10-bit video would differ.
    """

    def __init__(self, source: CheckedFile) -> None:
        self._source = source
        self._graph: Any = None
        self._built_for: tuple[Any, ...] = ()

    def __call__(self, frame: Any) -> np.ndarray:
        check_picture(self._source.name, frame.width, frame.height)
        kind = (frame.width, frame.height, frame.format.name, frame.colorspace, frame.color_range)
        if kind != self._built_for:
            self._graph = _rgb_graph(frame)
            self._built_for = kind
        self._graph.push(frame)
        picture = self._graph.pull().to_ndarray()
        # a header without sense gives an angle far out of range
        turns = round(frame.rotation / 90) if abs(frame.rotation) <= 180 else 0
        return np.ascontiguousarray(np.rot90(picture, turns))


def _rgb_graph(frame: Any) -> Any:
    import av.filter

    graph = av.filter.Graph()
    graph.link_nodes(
        graph.add_buffer(width=frame.width, height=frame.height, format=frame.format, time_base=frame.time_base),
        graph.add("scale", "flags=bicubic:threads=1"),
        graph.add("format", "rgb24"),
        graph.add("buffersink"),
    ).configure()
    return graph
