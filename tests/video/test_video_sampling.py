import numpy as np
import pytest

from xclip_fast.video import Sampling
from xclip_fast.video.sampling import segment_indices, uniform_indices


@pytest.mark.parametrize("frames", [1, 3, 8, 16, 32])
def test_test_sampling_is_the_official_formula(frames):
    for total in [1, 2, 5, 7, 8, 9, 31, 100, 299, 300, 12_345]:
        expected = [int(i * total / frames + total / (2 * frames)) for i in range(frames)]
        assert uniform_indices(total, frames).tolist() == expected


def test_short_videos_repeat_frames():
    assert uniform_indices(1, 8).tolist() == [0] * 8
    assert uniform_indices(3, 8).tolist() == [0, 0, 0, 1, 1, 2, 2, 2]


@pytest.mark.parametrize(("frames", "clips"), [(8, 4), (16, 4), (5, 3), (8, 1)])
def test_clips_together_are_one_long_clip(frames, clips):
    for total in [1, 9, 31, 250, 1001]:
        views = Sampling(frames, clips).indices(total)
        assert views.shape == (clips, frames)
        # clip after clip in each segment, but for the rounding of the formula
        assert np.abs(views.T.ravel() - uniform_indices(total, frames * clips)).max() <= 1
        assert (np.diff(views, axis=1) >= 0).all()
        assert views.min() >= 0
        assert views.max() < total
    assert len(np.unique(Sampling(frames, clips).indices(1001))) == frames * clips


def test_train_sampling_draws_one_frame_of_each_segment():
    generator = np.random.default_rng(0)
    drawn = np.stack([segment_indices(100, 8, generator) for _ in range(2000)])
    edges = np.arange(9) * 100 // 8
    for segment in range(8):
        assert set(drawn[:, segment].tolist()) == set(range(edges[segment], edges[segment + 1]))


@pytest.mark.parametrize("total", [1, 2, 7])
def test_train_sampling_of_short_videos(total):
    drawn = segment_indices(total, 8, np.random.default_rng(1))
    assert drawn.shape == (8,)
    assert (np.diff(drawn) >= 0).all()
    assert set(drawn.tolist()) == set(range(total))


def test_train_sampling_follows_its_generator():
    def draw(seed):
        return Sampling(8, clips=2, generator=np.random.default_rng(seed)).indices(300)

    assert (draw(3) == draw(3)).all()
    assert (draw(3) != draw(4)).any()
    assert (draw(3)[0] != draw(3)[1]).any()


@pytest.mark.parametrize("sizes", [{"frames": 0}, {"frames": 8.0}, {"frames": True}, {"clips": -1}])
def test_wrong_sizes_are_refused(sizes):
    with pytest.raises(ValueError, match="must be a positive integer"):
        Sampling(**sizes)


def test_a_video_without_frames_is_refused():
    with pytest.raises(ValueError, match="total must be a positive integer"):
        uniform_indices(0, 8)
