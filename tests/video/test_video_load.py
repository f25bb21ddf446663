import logging
import subprocess
import sys

import numpy as np
import pytest
import torch
from made_clips import FRAMES

from xclip_fast.video import PRESETS, Sampling, load, load_video, preprocess, read_frames
from xclip_fast.video.sampling import uniform_indices


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("name", ["h264.mp4", "portrait.mp4", "turned.mp4", "small.mp4", "mpeg4-b.avi"])
def test_one_view_is_sample_decode_and_preprocess(clip, name, preset):
    found = load_video(clip(name), frames=8, size=64, preset=preset)
    assert found.shape == (1, 8, 64, 64, 3)
    assert found.dtype == torch.uint8
    decoded = read_frames(clip(name), uniform_indices(FRAMES, 8))
    assert torch.equal(found, preprocess(decoded, preset, 64))


def test_views_are_clips_times_crops(clip):
    path = clip("h264.mp4")
    found = load_video(path, frames=5, size=32, clips=4, crops=3)
    assert found.shape == (12, 5, 32, 32, 3)
    assert found.is_contiguous()
    for number, indices in enumerate(Sampling(5, 4).indices(FRAMES)):
        expected = preprocess(read_frames(path, indices), size=32, crops=3)
        assert torch.equal(found[3 * number : 3 * number + 3], expected)
    assert torch.equal(found, load_video(path, frames=5, size=32, clips=4, crops=3))


def test_a_real_clip_in_every_backend(real_clips, backend):
    found = load_video(real_clips[1], frames=16, clips=2, crops=3, size=112, backend=backend)
    assert found.shape == (6, 16, 112, 112, 3)
    assert torch.equal(found, load_video(real_clips[1], frames=16, clips=2, crops=3, size=112, backend="pyav"))
    # neither black nor one frame over and over
    assert found.float().std() > 20
    assert (found[:, 1:] != found[:, :-1]).any(dim=(2, 3, 4)).all()


def test_frames_of_several_views_are_decoded_once(clip, make_clip, monkeypatch):
    resized = []
    plain = load.preprocess
    monkeypatch.setattr(load, "preprocess", lambda *given: resized.append(1) or plain(*given))
    load_video(make_clip("short.mp4", "libx264", frames=10), frames=8, clips=4, size=32)
    assert len(resized) == 10


def test_a_short_video_repeats_frames_and_says_so(make_clip, caplog):
    path = make_clip("one.mp4", "libx264", frames=1)
    with caplog.at_level(logging.WARNING, logger="xclip_fast"):
        found = load_video(path, frames=4, size=32)
    assert (found == found[:, :1]).all()
    assert caplog.messages == [f"{path}: 1 of the 4 frames of a clip, frames repeat"]
    three = make_clip("three.mp4", "libx264", frames=3)
    frames = read_frames(three)
    assert (read_frames(three, sample=Sampling(8)) == frames[[0, 0, 0, 1, 1, 2, 2, 2]]).all()


def test_sampled_frames_follow_clip_after_clip(clip, numbers):
    path = clip("vp9.webm")
    found = numbers(read_frames(path, sample=Sampling(4, clips=2)))
    assert found == [*uniform_indices(FRAMES, 4, 0, 2), *uniform_indices(FRAMES, 4, 1, 2)]
    drawn = [
        numbers(read_frames(path, sample=Sampling(4, generator=np.random.default_rng(seed)))) for seed in (0, 0, 1)
    ]
    assert drawn[0] == drawn[1] != drawn[2]
    assert [number // 10 for number in drawn[0]] == [0, 1, 2, 3]


def test_decoders_are_imported_only_when_used():
    code = (
        "import sys, xclip_fast.video as video\n"
        "wanted = {'av', 'decord', 'torchcodec', 'torchvision', 'PIL', 'triton', 'transformers'}\n"
        "assert not wanted & set(sys.modules), wanted & set(sys.modules)\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
