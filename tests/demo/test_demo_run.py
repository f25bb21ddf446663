"""The demo as users run it: mp4 files out and in again, figures, a real video, and bad input."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import pytest

import xclip_fast
from xclip_fast.demo import run
from xclip_fast.demo.clips import CLASSES, FRAMES, PAIRS, SIZE, make_clip
from xclip_fast.demo.models import MODELS
from xclip_fast.demo.mp4 import write_mp4
from xclip_fast.errors import InputError
from xclip_fast.video import load_video, probe, read_frames

pytest.importorskip("av")


def test_mp4_keeps_the_clip(tmp_path: Path) -> None:
    path = tmp_path / "clip with spaces.mp4"
    clip = make_clip(6, 0)
    write_mp4(path, clip)
    info = probe(path)
    assert (info.width, info.height) == (SIZE, SIZE)
    decoded = read_frames(path)
    assert decoded.shape == clip.shape
    error = np.abs(decoded.astype(int) - clip).mean(axis=(1, 2, 3))
    assert error.max() < 8
    assert list(tmp_path.iterdir()) == [path]


def test_frames_of_the_model_size_are_not_resized(tmp_path: Path) -> None:
    path = tmp_path / "clip.mp4"
    write_mp4(path, make_clip(0, 0))
    views = load_video(path, frames=FRAMES, size=SIZE, preset="hf")
    assert np.array_equal(views[0].numpy(), read_frames(path))


@pytest.mark.slow
def test_demo_keeps_files_and_counts(tmp_path: Path) -> None:
    folder = tmp_path / "new" / "clips"
    stages: list[tuple[str, int, int]] = []
    result = run(out=folder, clips_per_class=3, progress=lambda *stage: stages.append(stage))
    files = sorted(folder.iterdir())
    assert len(files) == result.clips == 3 * len(CLASSES)
    assert all(probe(path).frames == FRAMES for path in files[:: len(CLASSES)])
    assert result.folder == str(folder)
    assert stages == [
        (stage, done, len(files)) for stage in ("writing mp4 files", "classifying") for done in range(1, len(files) + 1)
    ]
    assert [score.model for score in result.scores] == list(MODELS)
    full, _, average = result.scores
    assert full.top1 >= 0.95
    # forwards and backwards, a model that can't see order answers alike; compression may tip a close call
    assert abs(average.pair_accuracy - 0.5) <= 2 / len(files)
    assert all(len(score.pairs) == len(PAIRS) for score in result.scores)
    assert result.video is None


def test_demo_cleans_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    result = run(clips_per_class=1)
    assert result.folder is None
    assert not list(tmp_path.iterdir())


def test_real_video_is_encoded(tmp_path: Path) -> None:
    path = tmp_path / "wide.mp4"
    write_mp4(path, np.random.default_rng(0).integers(256, size=(11, 90, 160, 3), dtype=np.uint8))
    result = run(video=path, clips_per_class=1)
    real = result.video
    assert real is not None
    assert real.path == str(path)
    assert real.shape == (8, SIZE, SIZE, 3)
    assert real.embedding_size == 64
    assert 0 < real.embedding_norm < 1000
    assert [best.probability for best in real.top] == sorted((best.probability for best in real.top), reverse=True)
    assert "mean nothing" in real.note
    assert json.loads(json.dumps(result.to_dict()))["video"]["embedding_size"] == 64


@pytest.mark.parametrize("content", [None, b"", b"no video at all" * 100], ids=["missing", "empty", "text"])
def test_bad_video_ends_the_demo_at_once(tmp_path: Path, content: bytes | None) -> None:
    path = tmp_path / "video.mp4"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(InputError, match=r"video\.mp4"):
        run(video=path, out=tmp_path / "clips")
    assert not (tmp_path / "clips").exists()


@pytest.mark.parametrize("number", [0, -3])
def test_no_clips_are_an_input_error(number: int) -> None:
    with pytest.raises(InputError, match=f"at least one clip per class, found {number}"):
        run(clips_per_class=number)


def test_folder_that_is_a_file_is_an_input_error(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.touch()
    for out in (path, path / "below"):
        with pytest.raises(InputError, match="cannot make the folder"):
            run(out=out)


def test_without_pyav_one_line_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "av", None)
    with pytest.raises(InputError, match="pip install av"):
        run(out=tmp_path)
    assert not list(tmp_path.iterdir())


def test_without_h264_one_line_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("av.codecs_available", {"mpeg4"})
    with pytest.raises(InputError, match="libx264"):
        write_mp4(tmp_path / "clip.mp4", make_clip(0, 0))
    assert not list(tmp_path.iterdir())


def test_failed_write_leaves_no_file(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="cannot write"):
        write_mp4(tmp_path / "missing" / "clip.mp4", make_clip(0, 0))
    (tmp_path / "folder.mp4").mkdir()
    with pytest.raises(InputError, match="cannot write"):
        write_mp4(tmp_path / "folder.mp4", make_clip(0, 0))
    assert [path.name for path in tmp_path.iterdir()] == ["folder.mp4"]


def test_demo_is_a_room_of_the_package() -> None:
    assert xclip_fast.demo.run is run
