import logging
import sys
import threading
import time

import av
import numpy as np
import pytest
from made_clips import CLIPS, FRAMES, draw, turn

import xclip_fast.video.backends.decord as guarded
from xclip_fast import InputError
from xclip_fast.video import available_backends, probe, read_frames
from xclip_fast.video.backends import pyav

# out of order, repeated, the first, the last, neighbours, several key frame groups
WANTED = [37, 0, 5, 5, 6, 21, FRAMES - 1, 12]
UNREAD = {"torchcodec": (".ts", ".mpg", ".avi"), "decord": (".ts", "av1.mp4")}
# how chroma is spread over odd sizes and 10-bit pictures differs between versions of FFmpeg and ways to call it: for
# decord's old one, and for the plain decode of the tests, their frames are equal but for this mean, in grey levels
OTHER_CHROMA = {"odd.webm", "odd.avi", "ten-bit.mp4"}
CHROMA_ATOL = 1.0


@pytest.fixture(scope="module")
def pyav_frames(clip):
    """All frames of a clip by the plainest use of PyAV, without any of our code."""
    known = {}

    def get(name):
        if name not in known:
            with av.open(str(clip(name))) as file:
                pictures = [
                    np.rot90(frame.to_ndarray(format="rgb24", interpolation="BICUBIC"), frame.rotation // 90)
                    for frame in file.decode(video=0)
                ]
            known[name] = np.stack(pictures)
        return known[name]

    return get


@pytest.mark.parametrize("name", CLIPS)
def test_the_frames_asked_for_are_the_ones_that_come(backend, name, clip, numbers):
    path = clip(name)
    if path.name.endswith(UNREAD.get(backend, ("none",))):
        with pytest.raises(InputError, match=r"not read exactly by|unknown kind"):
            read_frames(path, WANTED, backend=backend)
        return
    found = read_frames(path, WANTED, backend=backend)
    assert numbers(found) == WANTED
    expected = read_frames(path, WANTED, backend="pyav")
    assert found.dtype == np.uint8
    assert found.shape == expected.shape
    if backend == "decord" and name in OTHER_CHROMA:
        assert np.abs(found.astype(int) - expected).mean() < CHROMA_ATOL
    else:
        assert (found == expected).all()


@pytest.mark.parametrize("name", CLIPS)
def test_pyav_frames_are_those_of_a_plain_decode(name, clip, numbers, pyav_frames):
    expected = pyav_frames(name)
    found = read_frames(clip(name), backend="pyav")
    assert numbers(found) == list(range(FRAMES))
    if name in OTHER_CHROMA:
        assert np.abs(found.astype(int) - expected).mean() < CHROMA_ATOL
    else:
        assert (found == expected).all()
    for last in range(0, FRAMES, 7):
        assert (read_frames(clip(name), [last], backend="pyav") == found[last]).all()


def test_real_clips_are_equal_in_every_backend(backend, real_clips):
    for path in real_clips:
        total = probe(path, backend=backend).frames
        assert total == probe(path, backend="pyav").frames
        wanted = [*range(0, total, 29), total - 1]
        found, expected = read_frames(path, wanted, backend=backend), read_frames(path, wanted, backend="pyav")
        assert (found == expected).all()


def test_colours_are_rgb(backend, clip):
    found = read_frames(clip("h264.mp4"), [30], backend=backend)[0].astype(int)
    expected = draw(30, 96, 128)
    # smooth areas away from the blocks and the jumps of the colour ramps
    assert np.abs(found[30:60, 20:30].mean((0, 1)) - expected[30:60, 20:30].mean((0, 1))).max() < 6


def test_turned_videos_come_upright(backend, clip):
    plain = read_frames(clip("h264.mp4"), [3], backend="pyav").shape
    assert read_frames(clip("turned.mp4"), [3], backend=backend).shape == (1, plain[2], plain[1], 3)
    info = probe(clip("turned.mp4"), backend=backend)
    assert (info.height, info.width) == (plain[2], plain[1])


def test_a_senseless_rotation_is_ignored(backend, make_clip, numbers):
    path = make_clip("senseless.mp4", "libx264")
    turn(path, 0)
    assert numbers(read_frames(path, [7, 20], backend=backend)) == [7, 20]


def test_probe_says_what_is_there(backend, clip):
    info = probe(clip("h264.mp4"), backend=backend)
    assert (info.frames, info.width, info.height) == (FRAMES, 128, 96)
    assert info.fps == pytest.approx(25)
    assert info.duration == pytest.approx(FRAMES / 25, abs=0.05)
    assert info.codec == ("unknown" if backend == "decord" else "h264")
    uneven = probe(clip("uneven.mkv"), backend=backend)
    assert uneven.frames == FRAMES


def test_names_in_the_file_may_be_in_any_encoding(backend, clip, tmp_path, numbers):
    content = clip("h264.mp4").read_bytes()
    assert b"VideoHandler" in content
    path = tmp_path / "latin.mp4"
    path.write_bytes(content.replace(b"VideoHandler", b"Vid\xe9oHandler"))
    assert numbers(read_frames(path, [9], backend=backend)) == [9]


def test_one_frame(backend, make_clip, numbers):
    path = make_clip("one.mp4", "libx264", frames=1)
    assert numbers(read_frames(path, backend=backend)) == [0]
    assert probe(path, backend=backend).frames == 1


def test_pyav_jumps_only_where_frames_have_their_own_times(clip, monkeypatch):
    read = []
    plain = pyav._read_in_order
    monkeypatch.setattr(pyav, "_read_in_order", lambda *given: read.append(given[0].name) or plain(*given))
    for name in ("h264.mp4", "open-gop.mp4", "uneven.mkv", "vp9.webm", "hevc.mp4", "fragments.mp4", "av1.mp4"):
        read_frames(clip(name), WANTED, backend="pyav")
    assert read == []
    # its key frames are not complete, which shows when they are jumped to
    read_frames(clip("refresh.mkv"), [20], backend="pyav")
    read_frames(clip("mpeg4-b.avi"), [20], backend="pyav")
    assert len(read) == 2


def test_a_video_cut_without_encoding_begins_at_the_cut(backend, clip, tmp_path, numbers, caplog):
    path = tmp_path / "cut.mp4"
    with av.open(str(clip("h264.mp4"))) as given, av.open(str(path), "w") as cut:
        stream = given.streams.video[0]
        copy = cut.add_stream_from_template(stream)
        start = 20 * 512
        for packet in given.demux(stream):
            # from the key frame before the cut on, whose time is then negative: an edit list hides what comes first
            if packet.dts is not None and packet.pts >= 12 * 512:
                packet.pts, packet.dts, packet.stream = packet.pts - start, packet.dts - start, copy
                cut.mux(packet)
    with av.open(str(path)) as file:
        assert any(packet.is_discard for packet in file.demux(video=0))
    assert numbers(read_frames(path, backend=backend)) == list(range(20, FRAMES))
    assert probe(path, backend=backend).frames == FRAMES - 20
    assert "damaged" not in caplog.text


def test_an_index_past_the_end(backend, clip):
    with pytest.raises(InputError, match=f"frame 40 was asked for, the last one is {FRAMES - 1}"):
        read_frames(clip("h264.mp4"), [3, 40], backend=backend)


def test_damage_in_the_middle_leaves_the_rest(backend, make_clip, numbers):
    path = make_clip("damaged.mp4", "libx264", gop=10, frames=60)
    content = bytearray(path.read_bytes())
    start, size = content.index(b"mdat"), len(content)
    middle = start + (size - start) // 3
    content[middle : middle + 40] = bytes(40)
    path.write_bytes(content)
    found = numbers(read_frames(path, [0, 1, 2, 57, 58, 59], backend=backend))
    assert found[:3] == [0, 1, 2]
    assert len(found) == 6


def test_decord_warns_once_of_its_old_ffmpeg(clip, caplog):
    if available_backends()["decord"]:
        pytest.skip("decord is not here")
    guarded._warn_once.cache_clear()
    with caplog.at_level(logging.WARNING, logger="xclip_fast"):
        read_frames(clip("small.mp4"), [0], backend="decord")
        read_frames(clip("small.mp4"), [0], backend="decord")
    assert [record.getMessage() for record in caplog.records if "its own FFmpeg" in record.getMessage()] == [
        "decord 0.6.0 decodes with its own FFmpeg 4.1.6, which gets no security fixes: prefer PyAV (pip install av)"
    ]
    assert "decord" not in sys.modules


def fake_child(tmp_path, monkeypatch, code):
    script = tmp_path / "child.py"
    script.write_text(code)
    monkeypatch.setattr(guarded, "_CHILD", script)
    monkeypatch.setattr(guarded, "_versions", lambda: {"decord": "0", "ffmpeg": "0"})
    monkeypatch.setattr(guarded.Decord, "unavailable", lambda self: None)


HELLO = "import sys, time, json; print(json.dumps({'count': 40, 'fps': 25}), flush=True); sys.stdin.readline()\n"


@pytest.mark.parametrize("code", ["import time; time.sleep(60)", HELLO + "time.sleep(60)"])
def test_a_hanging_decord_is_stopped_at_the_deadline(tmp_path, monkeypatch, clip, code):
    fake_child(tmp_path, monkeypatch, code)
    monkeypatch.setattr(guarded, "DEADLINE_SECONDS", 1)
    start, before = time.monotonic(), threading.active_count()
    with pytest.raises(InputError, match=r"small.mp4: decord was stopped after 1 seconds; use the pyav backend"):
        read_frames(clip("small.mp4"), [0], backend="decord")
    assert time.monotonic() - start < 30
    assert threading.active_count() <= before


@pytest.mark.parametrize(
    "code",
    [
        "import os; os.abort()",
        HELLO + "import os; os.abort()",
        HELLO + "print(json.dumps({'number': 0, 'height': 9, 'width': 9}), flush=True); print('few')",
        "import sys; sys.stdin.close(); sys.exit(3)",
    ],
)
def test_a_crashing_decord_is_an_input_error(tmp_path, monkeypatch, clip, code):
    fake_child(tmp_path, monkeypatch, code)
    with pytest.raises(InputError, match=r"small.mp4: decord crashed or ran out of its 4 GiB \(exit status -?\d+\)"):
        read_frames(clip("small.mp4"), [0], backend="decord")


def test_decord_short_of_memory_is_an_input_error(monkeypatch, clip):
    if available_backends()["decord"]:
        pytest.skip("decord is not here")
    monkeypatch.setattr(guarded, "MEMORY_BYTES", 64 * 1024**2)
    with pytest.raises(InputError, match=r"small.mp4: "):
        read_frames(clip("small.mp4"), [0], backend="decord")


def test_a_video_that_says_too_much_is_read_as_far_as_it_goes(tmp_path, monkeypatch, clip, numbers, caplog):
    # frames 0 to 24 of 40, then the end; the second child knows no better
    script = HELLO.replace("sys.stdin.readline()", "wanted = json.loads(sys.stdin.readline())\n") + (
        "out = sys.stdout.buffer\n"
        "for number in range(max(wanted) + 1):\n"
        "    if number == 25: print(json.dumps({'seen': 25}), flush=True); sys.exit()\n"
        "    if number in wanted:\n"
        "        print(json.dumps({'number': number, 'height': 2, 'width': 3}), flush=True)\n"
        "        out.write(bytes([number]) * 18); out.flush()\n"
        "print(json.dumps({'seen': 0}), flush=True)\n"
    )
    fake_child(tmp_path, monkeypatch, script)
    found = read_frames(clip("small.mp4"), backend="decord")
    assert found[:, 0, 0, 0].tolist() == list(range(25))
    assert "only 25 of about 40 frames can be read" in caplog.text


def test_no_decoder_at_all(monkeypatch, clip):
    path = clip("small.mp4")
    for module in ("av", "torchcodec", "torchcodec.decoders", "decord"):
        monkeypatch.setitem(sys.modules, module, None)
    reasons = available_backends()
    assert list(reasons) == ["pyav", "torchcodec", "decord"]
    assert all(reason and "\n" not in reason for reason in reasons.values())
    for use in (probe, read_frames):
        with pytest.raises(InputError, match=r"no video decoder is installed, looked for av, torchcodec and decord"):
            use(path)
        with pytest.raises(InputError, match=r"the decode backend pyav can't be used here: .*pip install av"):
            use(path, backend="pyav")


def test_auto_takes_what_reads_the_file(monkeypatch, clip, numbers):
    monkeypatch.setattr(pyav.PyAV, "unavailable", lambda self: "not today")
    monkeypatch.setitem(sys.modules, "torchcodec.decoders", None)
    with pytest.raises(InputError, match=r"files in mpegts format are not read exactly|no video decoder"):
        read_frames(clip("h264.ts"))
    if available_backends()["decord"] is None:
        assert numbers(read_frames(clip("mpeg4.avi"), [7])) == [7]


def test_an_unknown_backend(clip):
    with pytest.raises(InputError, match="no decode backend 'opencv'; choose auto, pyav, torchcodec, decord"):
        read_frames(clip("small.mp4"), backend="opencv")
