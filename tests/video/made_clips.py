"""Clips written for the tests: each frame shows its own number."""

from __future__ import annotations

import struct
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np

FRAMES = 40


def draw(number: int, height: int, width: int) -> np.ndarray:
    """A picture with moving colours, and ``number`` in eight black or white blocks along its top."""
    y, x = np.mgrid[:height, :width]
    picture = np.stack([(x + 3 * number) % 256, (2 * y + number) % 256, (x + y) % 256], axis=-1).astype(np.uint8)
    block = width // 8
    for bit in range(8):
        picture[:16, bit * block : (bit + 1) * block] = 255 * (number >> bit & 1)
    return picture


def write(
    path: Path,
    codec: str,
    *,
    size: tuple[int, int] = (96, 128),
    frames: int = FRAMES,
    pixels: str = "yuv420p",
    gop: int = 12,
    b_frames: int = 0,
    uneven: bool = False,
    rotation: int = 0,
    options: dict[str, str] | None = None,
    container: dict[str, str] | None = None,
) -> Path:
    height, width = size
    rng = np.random.default_rng(0)
    with av.open(str(path), "w", options=container or {}) as file:
        stream = file.add_stream(codec, rate=25, options=options or {})
        stream.width, stream.height, stream.pix_fmt = width, height, pixels
        stream.codec_context.gop_size, stream.codec_context.max_b_frames = gop, b_frames
        if uneven:
            stream.codec_context.time_base = Fraction(1, 1000)
        time = 0
        for number in range(frames):
            picture = draw(number, *((width, height) if rotation % 180 else (height, width)))
            # stored lying, so that it stands when the rotation is applied
            stored = np.ascontiguousarray(np.rot90(picture, -rotation // 90))
            frame = av.VideoFrame.from_ndarray(stored, format="rgb24")
            if uneven:
                frame.pts, frame.time_base = time, Fraction(1, 1000)
                time += int(rng.integers(10, 90))
            file.mux(stream.encode(frame))
        file.mux(stream.encode(None))
    if rotation:
        turn(path, rotation)
    return path


def turn(path: Path, rotation: int) -> None:
    """Ask players to show an mp4 file turned to the left by 90 or 180 degrees; 0 makes the request senseless."""
    plain = struct.pack(">9i", 1 << 16, 0, 0, 0, 1 << 16, 0, 0, 0, 1 << 30)
    cosine, sine = {90: (0, -1 << 16), 180: (-1 << 16, 0), 0: (0, 0)}[rotation]
    content = path.read_bytes()
    before, after = content.split(b"tkhd")
    assert plain in after
    turned = struct.pack(">9i", cosine, sine, 0, -sine, cosine, 0, 0, 0, 1 << 30)
    path.write_bytes(before + b"tkhd" + after.replace(plain, turned, 1))


CLIPS: dict[str, dict[str, Any]] = {
    "h264.mp4": {"codec": "libx264", "b_frames": 2},
    "one-gop.mp4": {"codec": "libx264", "gop": 250, "b_frames": 3},
    "open-gop.mp4": {
        "codec": "libx264",
        "b_frames": 3,
        "gop": 15,
        "options": {"x264-params": "open-gop=1:scenecut=0"},
    },
    "refresh.mkv": {"codec": "libx264", "gop": 15, "options": {"x264-params": "intra-refresh=1:scenecut=0"}},
    "uneven.mp4": {"codec": "libx264", "b_frames": 2, "uneven": True},
    "uneven.mkv": {"codec": "libx264", "b_frames": 2, "uneven": True},
    "fragments.mp4": {"codec": "libx264", "b_frames": 2, "container": {"movflags": "frag_keyframe+empty_moov"}},
    "hevc.mp4": {"codec": "libx265", "options": {"x265-params": "log-level=none"}},
    "av1.mp4": {"codec": "libsvtav1"},
    "vp8.webm": {"codec": "libvpx", "options": {"auto-alt-ref": "1", "lag-in-frames": "16"}},
    "vp9.webm": {"codec": "libvpx-vp9"},
    "h264.ts": {"codec": "libx264", "b_frames": 2},
    "mpeg2.mpg": {"codec": "mpeg2video", "b_frames": 2},
    "mpeg4.avi": {"codec": "mpeg4"},
    "mpeg4-b.avi": {"codec": "mpeg4", "b_frames": 2},
    "jpeg.avi": {"codec": "mjpeg", "pixels": "yuvj420p"},
    "portrait.mp4": {"codec": "libx264", "size": (160, 90)},
    "turned.mp4": {"codec": "libx264", "rotation": 90},
    "upside-down.mp4": {"codec": "libx264", "rotation": 180},
    "odd.mp4": {"codec": "libx264", "size": (95, 127), "pixels": "yuv444p"},
    "odd.webm": {"codec": "libvpx-vp9", "size": (95, 127)},
    "odd.avi": {"codec": "mpeg4", "size": (95, 127)},
    "ten-bit.mp4": {"codec": "libx264", "pixels": "yuv420p10le"},
    "small.mp4": {"codec": "libx264", "size": (32, 48)},
    "tiny.avi": {"codec": "mpeg4", "size": (16, 24)},
}
