"""Features of many files: the same rows whatever shares a batch, in order, with the errors in their places."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from cli_support import TINY, write_video

from xclip_fast import Engine, InputError, create_model, pipeline
from xclip_fast.pipeline import FileFeatures, batches, embed_files
from xclip_fast.video import load_video


@pytest.fixture(scope="module")
def clips(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Seven videos of noise, and a file that is none, the third."""
    folder = tmp_path_factory.mktemp("clips")
    rng = np.random.default_rng(0)
    paths = [folder / f"{number}.mp4" for number in range(8)]
    for path in paths:
        write_video(path, rng.integers(256, size=(6, 48, 64, 3), dtype=np.uint8))
    paths[2].write_text("no video")
    return paths


@pytest.fixture(scope="module")
def model() -> Any:
    return create_model(TINY, seed=0)


def one_by_one(model: Any, paths: list[Path], **options: Any) -> list[Any]:
    return [pipeline.embed(model, load_video(path, frames=4, size=32, **options)) for path in paths]


def agree(found: list[FileFeatures], expected: list[Any], patches: bool) -> None:
    good = [one for one in found if one.error is None]
    assert len(good) == len(expected)
    for one, other in zip(good, expected, strict=True):
        assert one.video.shape == (64,)
        assert one.video.dtype == torch.float32
        torch.testing.assert_close(one.video, other.video, rtol=1e-4, atol=1e-5)
        if patches:
            torch.testing.assert_close(one.patches, other.patches, rtol=1e-4, atol=1e-5)
        else:
            assert one.patches is None


@pytest.mark.parametrize("batch_size", [1, 2, 5, 100])
@pytest.mark.parametrize(("views", "patches"), [({"clips": 1}, True), ({"clips": 2, "crops": 3}, False)])
def test_rows_do_not_depend_on_what_shares_a_batch(
    batch_size: int, views: dict[str, int], patches: bool, model: Any, clips: list[Path]
) -> None:
    seen = []
    encode = model.encode_video
    model.encode_video = lambda batch: seen.append(len(batch)) or encode(batch)
    try:
        found = list(embed_files(model, clips, batch_size=batch_size, patches=patches, workers=0, **views))
    finally:
        del model.encode_video
    assert [one.path for one in found] == list(map(str, clips))
    assert [place for place, one in enumerate(found) if one.error is not None] == [2]
    assert found[2].video is None
    assert "2.mp4" in str(found[2].error)
    agree(found, one_by_one(model, [*clips[:2], *clips[3:]], **views), patches)
    # every batch but the last is full
    total = 7 * views["clips"] * views.get("crops", 1)
    assert seen == [batch_size] * (total // batch_size) + ([total % batch_size] if total % batch_size else [])


@pytest.mark.parametrize("patches", [False, True])
def test_an_engine_embeds_files(patches: bool, model: Any, clips: list[Path]) -> None:
    engine = Engine(model)
    found = list(engine.embed_files(clips, batch_size=3, patches=patches, workers=0))
    agree(found, one_by_one(model, [*clips[:2], *clips[3:]]), patches)


@pytest.mark.slow
def test_the_number_of_workers_changes_no_bit(model: Any, clips: list[Path]) -> None:
    paths = [os.fspath(path) for path in clips] * 2
    runs = [list(embed_files(model, paths, batch_size=3, clips=2, workers=workers)) for workers in (0, 2)]
    assert [one.path for one in runs[1]] == paths
    for one, other in zip(*runs, strict=True):
        assert (one.error is None) == (other.error is None)
        assert str(one.error) == str(other.error)
        if one.video is not None:
            assert torch.equal(one.video, other.video)


def test_two_buffers_take_turns(model: Any, clips: list[Path], monkeypatch: pytest.MonkeyPatch) -> None:
    # as on a GPU, where results of a batch are taken after the next one is launched
    made = batches._Batches.__init__

    def with_two(self: Any, *arguments: Any) -> None:
        made(self, *arguments)
        self.buffers.append(torch.empty_like(self.buffers[0]))

    monkeypatch.setattr(batches._Batches, "__init__", with_two)
    found = list(embed_files(model, clips, batch_size=2, patches=True, clips=3, workers=0))
    agree(found, one_by_one(model, [*clips[:2], *clips[3:]], clips=3), True)


def test_nothing_at_all_and_nothing_good(model: Any, clips: list[Path]) -> None:
    assert list(embed_files(model, [], workers=0)) == []
    assert list(embed_files(model, [])) == []
    found = list(embed_files(model, [clips[2], "", "nul\0", clips[2]], workers=0))
    assert all(isinstance(one.error, InputError) for one in found)
    assert len(found) == 4


def test_features_that_are_no_numbers_are_an_error_of_the_file(clips: list[Path]) -> None:
    broken = create_model(TINY, seed=0)
    with torch.no_grad():
        broken.visual.proj.fill_(float("nan"))
    found = list(embed_files(broken, clips[:2], workers=0))
    assert all("not numbers" in str(one.error) and one.video is None for one in found)


@pytest.mark.parametrize("fault", [MemoryError(), torch.OutOfMemoryError("CUDA out of memory")])
def test_too_little_memory_for_a_batch_is_one_line(fault: Exception, model: Any, clips: list[Path]) -> None:
    def fail(_: object) -> None:
        raise fault

    model.encode_video = fail
    try:
        with pytest.raises(InputError, match="smaller batch size") as refused:
            list(embed_files(model, clips, workers=0))
    finally:
        del model.encode_video
    assert "\n" not in str(refused.value)


def test_a_fault_of_the_model_is_not_hidden(model: Any, clips: list[Path]) -> None:
    def fail(_: object) -> None:
        raise RuntimeError("a fault")

    model.encode_video = fail
    try:
        with pytest.raises(RuntimeError, match="a fault"):
            list(embed_files(model, clips, workers=0))
    finally:
        del model.encode_video


def test_bad_numbers_are_refused_before_any_work(model: Any) -> None:
    with pytest.raises(InputError, match="a batch of 1000000000000 views"):
        embed_files(model, ["a"], batch_size=10**12)
    refused: list[Callable[[], object]] = [
        lambda: embed_files(model, ["a"], batch_size=0),
        lambda: embed_files(model, ["a"], workers=-1),
        lambda: embed_files(model, ["a"], crops=2),
        lambda: embed_files(model, ["a"], preset="none"),
        # a text is a list of letters too
        lambda: embed_files(model, "a.mp4"),
        lambda: embed_files(model, Path("a.mp4")),
    ]
    for call in refused:
        with pytest.raises(ValueError, match=r"."):
            call()
