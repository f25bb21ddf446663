import io
import logging
import os
import random
import re
import struct
import wave
import zlib

import av
import numpy as np
import pytest
from made_clips import CLIPS, draw

import xclip_fast.video.backends.decord as guarded
from xclip_fast import InputError
from xclip_fast.video import load, load_video, probe, read_frames, source


def refuse(path, backend, *words):
    """Each way in says the same: one line that names the file, without a word on the console (see ``quiet``)."""
    for use in (probe, read_frames, load_video):
        with pytest.raises(InputError) as caught:
            use(path, backend=backend)
        message = str(caught.value)
        assert "\n" not in message
        assert message.startswith(f"{path}: ")
        assert len(message) < 400 + len(str(path))
        for word in words:
            assert re.search(word, message), message


def attempt(use, path, *given, **options):
    """What a call gives, or its error, of which it is one line that names the file."""
    try:
        return use(path, *given, **options)
    except InputError as error:
        found = error
    assert str(found).startswith(f"{path}: ")
    assert "\n" not in str(found)
    return found


@pytest.fixture(autouse=True)
def quiet(capfd):
    """No test of this file may let a decoder write to the console."""
    yield
    written = capfd.readouterr()
    assert written.out == ""
    assert written.err == ""


def png():
    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", 1, 1, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(bytes(4))) + chunk(b"IEND", b"")


def wav():
    out = io.BytesIO()
    with wave.open(out, "wb") as file:
        file.setparams((1, 2, 8000, 0, "NONE", ""))
        file.writeframes(bytes(1000))
    return out.getvalue()


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "an empty file; give a video file"),
        (b"hello, I am no video\n" * 9, "found a text file; give a file in mp4"),
        ("ein längerer Text über Füße\n".encode() * 99, "found a text file"),
        (b"<!DOCTYPE html><html></html>", "found a text file"),
        (png(), "found a PNG image"),
        (b"\xff\xd8\xff\xe0\0\x10JFIF" + bytes(99), "found a JPEG image"),
        (b"GIF89a" + bytes(99), "found a GIF image"),
        (b"\0\0\0\x1cftypavif" + bytes(99), "found a HEIF or AVIF image"),
        (b"RIFF\0\0\0\0WEBPVP8 " + bytes(99), "found a WebP image"),
        (wav(), "found an audio file"),
        (b"ID3\4" + bytes(99), "found an audio file"),
        (b"#EXTM3U\n#EXTINF:1,\nfile:///etc/passwd\n", "found a playlist"),
        (b"ffconcat version 1.0\nfile /etc/passwd\n", "found a playlist"),
        (bytes(4000), "found an unknown format"),
        (random.Random(0).randbytes(4000), "found an unknown format"),
        (b"\0", "found an unknown format"),
    ],
)
def test_what_is_no_video_never_reaches_a_decoder(tmp_path, monkeypatch, content, words):
    path = tmp_path / "some clip.mp4"
    path.write_bytes(content)
    monkeypatch.setattr(load, "select_backend", None)
    refuse(path, "auto", words)


def test_missing_unreadable_and_strange_paths(tmp_path, monkeypatch):
    monkeypatch.setattr(load, "select_backend", None)
    refuse(tmp_path / "missing.mp4", "auto", r"cannot be read \(No such file or directory\); give the path")
    refuse(tmp_path, "auto", "a folder, not a file")
    refuse("/dev/zero", "auto", "a pipe or device, not a regular file")
    os.mkfifo(tmp_path / "pipe.mp4")
    refuse(tmp_path / "pipe.mp4", "auto", "a pipe or device, not a regular file")
    (tmp_path / "loop.mp4").symlink_to(tmp_path / "loop.mp4")
    refuse(tmp_path / "loop.mp4", "auto", "cannot be read")
    for path in ("a\0b.mp4", "a\nb.mp4", "\ud800.mp4"):
        with pytest.raises(InputError) as caught:
            read_frames(path)
        assert str(caught.value).isprintable()


@pytest.mark.parametrize(
    "path",
    ["http://127.0.0.1:9/a.mp4", "concat:a.mp4|b.mp4", "file:a.mp4", "pipe:0", "-", "data:video/mp4;base64,AA"],
)
def test_protocols_are_names_of_missing_files(monkeypatch, tmp_path, path):
    monkeypatch.chdir(tmp_path)
    refuse(path, "auto", "No such file or directory")


def test_a_file_named_like_a_protocol_is_read_as_a_file(tmp_path, monkeypatch, clip, backend, numbers):
    monkeypatch.chdir(tmp_path)
    for name in ("concat:x|y.mp4", "weird %d ' \" *.mp4", "наш.mp4"):
        (tmp_path / name).write_bytes(clip("h264.mp4").read_bytes())
        assert numbers(read_frames(name, [3], backend=backend)) == [3]


def test_a_file_name_that_is_not_text(tmp_path, clip, backend, numbers):
    path = os.fsencode(tmp_path) + b"/b\xff.mp4"
    try:
        with open(path, "wb") as file:
            file.write(clip("h264.mp4").read_bytes())
    except OSError as error:
        pytest.skip(f"this file system refuses such names: {error}")
    if backend == "pyav":
        assert numbers(read_frames(path, [3], backend=backend)) == [3]
    else:
        with pytest.raises(InputError) as caught:
            read_frames(path, [3], backend=backend)
        assert str(caught.value).isprintable()


def test_caps_on_files(tmp_path, monkeypatch, clip):
    path = tmp_path / "large.mp4"
    with open(path, "wb") as file:
        file.truncate(source.MAX_FILE_BYTES + 1)
    refuse(path, "auto", "2.0 GiB, at most 2 are read")
    monkeypatch.setattr(load, "MAX_DECODED_BYTES", 100_000)
    with pytest.raises(InputError, match=r"the frames take more than 0 GiB; ask for fewer, or use load_video"):
        read_frames(clip("h264.mp4"), backend="pyav")
    # the smaller frames of a loaded video do not count
    load_video(clip("h264.mp4"), frames=32, size=32, backend="pyav")


def test_caps_on_videos(tmp_path, monkeypatch, clip, backend):
    monkeypatch.setattr(source, "MAX_FRAMES", 39)
    refuse(clip("h264.mp4"), backend, "more than 39 frames; cut the video")
    monkeypatch.setattr(source, "MAX_FRAMES", 40)
    monkeypatch.setattr(source, "MAX_SECONDS", 1)
    refuse(clip("h264.mp4"), backend, r"0.0 hours long, at most 0 are read")


@pytest.mark.parametrize(
    ("size", "words"),
    [
        ((256, 8200), "8200x256 pixels, at most 8192 a side are read; scale the video down"),
        ((64, 4096), "4096x64 pixels, sides beyond 1:32 are not read; crop the video"),
    ],
)
def test_huge_and_thin_pictures(make_clip, size, words, backend):
    refuse(make_clip("huge.mp4", "libx264", size=size, frames=1, options={"preset": "ultrafast"}), backend, words)


def test_a_small_file_that_claims_a_huge_picture(make_clip, backend):
    path = make_clip("bomb.mp4", "mjpeg", pixels="yuvj420p", frames=2)
    content = path.read_bytes()
    # in the file's header, and in each picture
    assert content.count(struct.pack(">HH", 128, 96)) == 1
    assert content.count(struct.pack(">HH", 96, 128)) == 2
    content = content.replace(struct.pack(">HH", 128, 96), struct.pack(">HH", 16000, 9000))
    path.write_bytes(content.replace(struct.pack(">HH", 96, 128), struct.pack(">HH", 9000, 16000)))
    refuse(path, backend, "16000x9000 pixels, at most 8192|or over 8192 pixels a side|cannot be decoded")


def test_a_picture_larger_than_its_header_says_is_not_decoded(make_clip):
    path = make_clip("inner.mp4", "mjpeg", pixels="yuvj420p", frames=2)
    path.write_bytes(path.read_bytes().replace(struct.pack(">HH", 96, 128), struct.pack(">HH", 9000, 16000)))
    # had one been decoded, its size would be named
    refuse(path, "pyav", "no frame comes out")


def test_a_picture_without_a_size(tmp_path, clip, backend):
    path = tmp_path / "none.mp4"
    path.write_bytes(clip("h264.mp4").read_bytes().replace(struct.pack(">HH", 128, 96), bytes(4)))
    # the size is also in the stream itself: right frames or a clear error
    found = attempt(read_frames, path, [0], backend=backend)
    assert isinstance(found, InputError) or found.shape == (1, 96, 128, 3)


@pytest.fixture
def audio(tmp_path):
    """Sound alone, and sound with a cover picture."""
    paths = tmp_path / "sound.mp4", tmp_path / "cover.m4a"
    for path in paths:
        with av.open(str(path), "w", format="mp4") as file:
            sound = file.add_stream("aac", rate=8000)
            sound.layout = "mono"
            if path.suffix == ".m4a":
                cover = file.add_stream("mjpeg", rate=1)
                cover.width, cover.height, cover.pix_fmt = 64, 64, "yuvj420p"
                cover.disposition = av.stream.Disposition.attached_pic.value
            for _ in range(4):
                frame = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), format="fltp", layout="mono")
                frame.sample_rate = 8000
                file.mux(sound.encode(frame))
            file.mux(sound.encode(None))
            if path.suffix == ".m4a":
                file.mux(cover.encode(av.VideoFrame.from_ndarray(draw(0, 64, 64), format="rgb24")))
                file.mux(cover.encode(None))
    return paths


def test_sound_is_no_video(audio, backend):
    for path in audio:
        refuse(path, backend, "no moving pictures, found only audio" if backend == "pyav" else "pictures")


@pytest.mark.parametrize("name", ["h264.mp4", "vp9.webm", "mpeg4.avi", "h264.ts"])
@pytest.mark.parametrize("share", [0.01, 0.3, 0.7, 0.999])
def test_files_cut_short(tmp_path, clip, name, share, backend, numbers):
    content = clip(name).read_bytes()
    path = tmp_path / f"cut.{name}"
    path.write_bytes(content[: int(share * len(content))])
    found = attempt(read_frames, path, backend=backend)
    if isinstance(found, InputError):
        # an mp4 has its table of contents at the end, an avi begins with five kilobytes of it
        assert name == "h264.mp4" or share < 0.5 or "not read exactly" in str(found)
    else:
        shown = numbers(found)
        # of the last ones some may lack the frames they are made from
        assert shown[:-4] == list(range(len(shown)))[:-4]
        assert shown[-4:] == sorted(set(shown[-4:]))
        assert len(shown) <= 40


def test_a_cut_file_is_used_when_a_clip_is_left_and_refused_otherwise(make_clip, caplog, numbers):
    path = make_clip("cut.mp4", "libx264", gop=10, container={"movflags": "faststart"})
    content = path.read_bytes()
    start = content.index(b"mdat")
    path.write_bytes(content[: start + (len(content) - start) * 7 // 10])
    with caplog.at_level(logging.WARNING, logger="xclip_fast"):
        left = numbers(read_frames(path, backend="pyav"))
    assert left == list(range(len(left)))
    assert f"{path}: only {len(left)} of about 40 frames can be read, the file is damaged; going on" in caplog.text
    assert load_video(path, frames=len(left), size=32, backend="pyav").shape == (1, len(left), 32, 32, 3)
    with pytest.raises(InputError, match=f"only {len(left)} of about 40 .*; {len(left) + 1} are needed, give another"):
        load_video(path, frames=len(left) + 1, backend="pyav")


def test_a_picture_size_that_changes(tmp_path, make_clip):
    first, second = make_clip("one.ts", "mpeg2video"), make_clip("two.ts", "mpeg2video", size=(64, 96))
    path = tmp_path / "both.ts"
    path.write_bytes(first.read_bytes() + second.read_bytes())
    with pytest.raises(InputError, match="its picture size changes; use load_video"):
        read_frames(path, backend="pyav")
    assert load_video(path, size=32, backend="pyav").shape == (1, 8, 32, 32, 3)


def test_neither_indices_nor_options_go_unchecked(clip):
    path = clip("h264.mp4")
    for indices in ([], [-1], [1.5], [[1, 2]], ["a"], [True]):
        with pytest.raises(ValueError, match="indices must be whole numbers from 0"):
            read_frames(path, indices)
    with pytest.raises(ValueError, match="not both"):
        read_frames(path, [1], sample=load.Sampling())
    for options in ({"frames": 0}, {"size": -1}, {"crops": 2}, {"clips": 0}):
        with pytest.raises(ValueError, match="must be"):
            load_video(path, **options)
    with pytest.raises(InputError, match="no preprocessing preset"):
        load_video(path, preset="x")


def mutate(content, rng):
    """One of five kinds of damage: scattered bytes, bytes of the header, of the end, a cut, a block of zeros."""
    data = bytearray(content)
    kind = rng.randrange(5)
    if kind == 3:
        return bytes(data[: rng.randrange(len(data))])
    if kind == 4:
        at = rng.randrange(len(data))
        size = min(rng.randrange(1, 4000), len(data) - at)
        data[at : at + size] = bytes(size)
        return bytes(data)
    low, high = [(0, len(data)), (0, min(2000, len(data))), (max(0, len(data) - 3000), len(data))][kind]
    for _ in range(rng.choice([1, 5, 50])):
        data[rng.randrange(low, high)] = rng.choice([0, 127, 128, 255, rng.randrange(256)])
    return bytes(data)


@pytest.mark.timeout(240)
def test_damaged_files_give_frames_or_one_clear_line(tmp_path, clip, backend, monkeypatch):
    monkeypatch.setattr(guarded, "DEADLINE_SECONDS", 20)
    seen = {"frames": 0, "error": 0}
    for name in ("h264.mp4", "fragments.mp4", "uneven.mkv", "vp9.webm", "mpeg4-b.avi", "h264.ts", "mpeg2.mpg"):
        content = clip(name).read_bytes()
        path = tmp_path / name
        for seed in range(5 if backend == "decord" else 20):
            path.write_bytes(mutate(content, random.Random(f"{name} {seed}")))
            found = attempt(load_video, path, size=32, backend=backend)
            if isinstance(found, InputError):
                seen["error"] += 1
            else:
                assert found.shape == (1, 8, 32, 32, 3)
                seen["frames"] += 1
    assert min(seen.values()) > 0


def test_every_kind_of_file_is_covered():
    assert {name.rsplit(".", 1)[1] for name in CLIPS} == {"mp4", "mkv", "webm", "avi", "ts", "mpg"}
