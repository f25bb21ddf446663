"""Runs decord in a process of its own: it can hang, crash, or take gigabytes for frames nobody asked for.

Started as a script by ``xclip_fast.video.backends.decord``, never imported. Usage: ``decord_child.py PATH CPU_SECONDS
BYTES``, or without arguments to learn the versions. It writes lines of JSON, a frame's raw bytes after its line, and
reads one line: the numbers of the frames to send.
"""

from __future__ import annotations

import contextlib
import os
import sys

# this folder holds a decord.py that is not the decoder
_HERE = os.path.dirname(os.path.abspath(__file__))
sys.path[:] = [entry for entry in sys.path if entry and os.path.abspath(entry) != _HERE]

import ctypes  # noqa: E402
import glob  # noqa: E402
import json  # noqa: E402
import re  # noqa: E402
from typing import Any, BinaryIO  # noqa: E402


def _claim_output() -> BinaryIO:
    """The pipe to the parent; decord and FFmpeg may write what they like to the old outputs."""
    out = os.fdopen(os.dup(1), "wb")
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 1)
    os.dup2(nowhere, 2)
    return out


def _limit(cpu_seconds: int, memory: int) -> None:
    # not every system has these limits: the parent's deadline holds everywhere
    with contextlib.suppress(ImportError, ValueError, OSError):
        import resource

        for kind, most in (
            (resource.RLIMIT_CORE, 0),
            (resource.RLIMIT_CPU, cpu_seconds),
            (resource.RLIMIT_NOFILE, 64),
            (resource.RLIMIT_AS, memory),
        ):
            resource.setrlimit(kind, (most, most))


def _versions() -> dict[str, str]:
    """Of decord and of the FFmpeg inside its wheel."""
    import decord

    folder = os.path.dirname(decord.__file__)
    libraries = glob.glob(os.path.join(f"{folder}.libs", "libavutil*")) + glob.glob(os.path.join(folder, "*avutil*"))
    ffmpeg = "unknown"
    if libraries:
        version = ctypes.CDLL(libraries[0]).av_version_info
        version.restype = ctypes.c_char_p
        ffmpeg = version().decode()
    return {"decord": decord.__version__, "ffmpeg": ffmpeg}


def _serve(path: str, send: Any) -> None:
    import decord

    reader = decord.VideoReader(path, ctx=decord.cpu(0), num_threads=1)
    # it counts frames before the start of a cut video, which are not shown, and repeats the last one instead; frames
    # without a time are very far below zero
    starts = reader.get_frame_timestamp(range(len(reader)))[:, 0]
    hidden = ((starts < 0) & (starts > -1e6)).sum()
    send({**_versions(), "count": len(reader) - int(hidden), "fps": float(reader.get_avg_fps())})
    wanted = set(json.loads(sys.stdin.readline() or "[]"))
    end = max(wanted, default=-1) + 1
    # one after the other from the start: its jumps give wrong frames in HEVC, AVI and MPEG files
    for number in range(end):
        try:
            frame = reader.next()
        except (StopIteration, decord.DECORDError):
            send({"seen": number})
            return
        if number in wanted:
            picture = frame.asnumpy()
            height, width = picture.shape[:2]
            # it takes the bytes that fill up the rows of a narrow picture for more channels
            rows = picture.reshape(height, -1)[:, : 3 * width]
            send({"number": number, "height": height, "width": width}, rows.tobytes())
    send({"seen": end})


def main() -> None:
    """Answer the parent; whatever fails is told in one line."""
    out = _claim_output()

    def send(line: dict[str, Any], payload: bytes = b"") -> None:
        out.write(json.dumps(line).encode() + b"\n" + payload)
        out.flush()

    try:
        if len(sys.argv) == 1:
            send(_versions())
        else:
            _limit(int(sys.argv[2]), int(sys.argv[3]))
            _serve(sys.argv[1], send)
    except Exception as error:
        # the cause comes last, after a clock time and a place in its own sources
        cause = (str(error).splitlines() or [type(error).__name__])[-1]
        send({"error": re.sub(r"^\[[\d:]+\] \S+:\d+: ", "", cause)})
    # its threads may still decode: leave without waiting for them
    out.flush()
    os._exit(0)


if __name__ == "__main__":
    main()
