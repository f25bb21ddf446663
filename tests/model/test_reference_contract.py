"""What the model accepts and refuses: any clip length, resolution and batch, and a clear error for all else."""

from __future__ import annotations

import logging
from collections.abc import Iterator

import pytest
import torch
from numerics import EXACT, randomise_parameters, relative_error
from torch import Tensor

from xclip_fast.config import XCLIPConfig
from xclip_fast.reference import XCLIP
from xclip_fast.reference.positions import _say_once, spatial_positions, temporal_positions

CONFIG = XCLIPConfig(
    image_size=32,
    patch_size=8,
    vision_width=64,
    vision_layers=2,
    embed_dim=64,
    context_length=12,
    vocab_size=50,
    text_width=64,
    text_layers=1,
    frames=4,
)
TOKENS = torch.tensor([[1, 49, 0, 0], [2, 3, 49, 0], [4, 5, 6, 49]])


@pytest.fixture(scope="module")
def model() -> XCLIP:
    return randomise_parameters(XCLIP(CONFIG)).double().requires_grad_(False).eval()


@pytest.fixture(autouse=True)
def _unsaid() -> Iterator[None]:
    _say_once.cache_clear()
    yield
    _say_once.cache_clear()


def clip(batch: int = 2, frames: int = 4, height: int = 32, width: int = 32) -> Tensor:
    return torch.randn(batch, frames, 3, height, width, dtype=torch.float64)


@pytest.mark.parametrize("frames", [1, 2, 3, 4, 5, 8, 33])
@pytest.mark.parametrize("batch", [1, 3])
def test_any_clip_length_and_batch(model: XCLIP, batch: int, frames: int) -> None:
    features = model.encode_video(clip(batch, frames))
    assert features.video.shape == (batch, CONFIG.embed_dim)
    assert features.patches.shape == (batch, CONFIG.patches, CONFIG.embed_dim)
    logits = model(clip(batch, frames), TOKENS)
    assert logits.shape == (batch, len(TOKENS))
    assert logits.isfinite().all()


@pytest.mark.parametrize(("height", "width"), [(8, 8), (40, 40), (24, 56), (64, 8)])
def test_any_resolution_divisible_by_the_patch(model: XCLIP, height: int, width: int) -> None:
    features = model.encode_video(clip(height=height, width=width))
    assert features.patches.shape == (2, height * width // 64, CONFIG.embed_dim)
    assert model(clip(height=height, width=width), TOKENS).isfinite().all()


def test_videos_of_a_batch_do_not_touch_each_other(model: XCLIP) -> None:
    video = clip(batch=3)
    before = model.encode_video(video), model(video, TOKENS)
    video[0] = clip(batch=1)
    after = model.encode_video(video), model(video, TOKENS)
    for old, new in ((before[0].video, after[0].video), (before[0].patches, after[0].patches), (before[1], after[1])):
        assert torch.equal(old[1:], new[1:])
        assert (old[0] != new[0]).any()


@pytest.mark.parametrize("frames", [4, 6])
def test_a_video_alone_gives_what_it_gives_in_a_batch(model: XCLIP, frames: int) -> None:
    video = clip(batch=3, frames=frames)
    together = model(video, TOKENS)
    for row, logits in zip(video, together, strict=True):
        assert relative_error(model(row.unsqueeze(0), TOKENS)[0], logits) < EXACT


def test_a_text_alone_gives_what_it_gives_among_others(model: XCLIP) -> None:
    video = clip()
    together = model(video, TOKENS)
    for i, text in enumerate(TOKENS):
        assert relative_error(model(video, text.unsqueeze(0))[:, 0], together[:, i]) < EXACT


def test_cross_frame_attention_tells_frames_of_each_other(model: XCLIP) -> None:
    video = clip(batch=1)
    before, _ = model.visual(video)
    video[0, 2] += 1
    after, _ = model.visual(video)
    for frame in range(4):
        assert relative_error(after[0, frame], before[0, frame]) > 1e-4


def test_without_messages_frames_are_on_their_own() -> None:
    silent = randomise_parameters(XCLIP(CONFIG)).double().requires_grad_(False)
    for block in silent.visual.transformer.resblocks:
        block.message_attn.out_proj.weight.zero_()
    video = clip(batch=1)
    before, _ = silent.visual(video)
    video[0, 2] += 1
    after, _ = silent.visual(video)
    assert torch.equal(after[0, [0, 1, 3]], before[0, [0, 1, 3]])
    assert (after[0, 2] != before[0, 2]).any()


def test_only_the_temporal_positions_know_the_order_of_frames(model: XCLIP) -> None:
    video = clip()
    shuffled = video[:, [2, 0, 3, 1]]
    forward, permuted = model.encode_video(video), model.encode_video(shuffled)
    assert relative_error(permuted.video, forward.video) > 1e-4
    assert relative_error(permuted.patches, forward.patches) < EXACT
    blind = randomise_parameters(XCLIP(CONFIG)).double().requires_grad_(False)
    blind.mit.positional_embedding.zero_()
    assert relative_error(blind.encode_video(shuffled).video, blind.encode_video(video).video) < EXACT


def test_interpolation_is_said_once(model: XCLIP, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, logger="xclip_fast"):
        model.encode_video(clip())
        assert not caplog.messages
        for _ in range(3):
            model.encode_video(clip(frames=6, height=24, width=40))
    assert sorted(caplog.messages) == [
        "spatial positions interpolated from 4x4 to 3x5",
        "temporal positions interpolated from 4 frames to 6 frames",
    ]
    assert {record.levelname for record in caplog.records} == {"WARNING"}


def test_spatial_positions_keep_rows_columns_and_class() -> None:
    rows, columns = torch.meshgrid(torch.arange(4.0), torch.arange(4.0), indexing="ij")
    table = torch.stack([rows, columns, torch.ones(4, 4)], dim=-1).reshape(16, 3)
    table = torch.cat([torch.full((1, 3), 7.0), table])
    resized = spatial_positions(table, (2, 8))
    assert torch.equal(resized[0], table[0])
    grid = resized[1:].reshape(2, 8, 3)
    torch.testing.assert_close(grid[..., 2], torch.ones(2, 8))
    # the row index falls along rows alone, the column index along columns alone
    assert (grid[1, :, 0] > grid[0, :, 0] + 1).all()
    torch.testing.assert_close(grid[:, :1, 0].expand(2, 8), grid[..., 0])
    assert (grid[:, 1:, 1] > grid[:, :-1, 1]).all()
    torch.testing.assert_close(grid[:1, :, 1].expand(2, 8), grid[..., 1])


def test_temporal_positions_are_linear_in_time() -> None:
    table = torch.arange(4.0).reshape(1, 4, 1)
    torch.testing.assert_close(temporal_positions(table, 8).flatten()[1:-1], torch.arange(0.25, 3, 0.5))
    torch.testing.assert_close(temporal_positions(table, 2).flatten(), torch.tensor([0.5, 2.5]))


def test_positions_of_the_trained_size_are_the_table_itself() -> None:
    table = torch.randn(17, 8)
    assert spatial_positions(table, (4, 4)) is table
    temporal = torch.randn(1, 4, 8)
    assert temporal_positions(temporal, 4) is temporal


@pytest.mark.parametrize(
    ("video", "found"),
    [
        (torch.zeros(8, 3, 32, 32), r"\(8, 3, 32, 32\)"),
        (torch.zeros(1, 2, 4, 3, 32, 32), r"\(1, 2, 4, 3, 32, 32\)"),
        (torch.zeros(3, 32, 32), r"\(3, 32, 32\)"),
        (torch.zeros(2, 0, 3, 32, 32), r"\(2, 0, 3, 32, 32\)"),
        (torch.zeros(0, 4, 3, 32, 32), r"\(0, 4, 3, 32, 32\)"),
        (torch.zeros(2, 4, 4, 32, 32), r"torch.float32 \(2, 4, 4, 32, 32\)"),
        (torch.zeros(2, 4, 32, 32, 3), r"torch.float32 \(2, 4, 32, 32, 3\)"),
        (torch.zeros(2, 4, 3, 32, 32, dtype=torch.uint8), r"torch.uint8 \(2, 4, 3, 32, 32\)"),
        (torch.zeros(2, 4, 32, 32, 1, dtype=torch.uint8), r"torch.uint8 \(2, 4, 32, 32, 1\)"),
        (torch.zeros(2, 4, 3, 32, 32, dtype=torch.int64), r"torch.int64 \(2, 4, 3, 32, 32\)"),
        (torch.zeros(2, 4, 3, 32, 32, dtype=torch.complex64), r"torch.complex64 \(2, 4, 3, 32, 32\)"),
        (torch.zeros(2, 4, 3, 32, 32, dtype=torch.bool), r"torch.bool \(2, 4, 3, 32, 32\)"),
    ],
    ids=lambda value: f"{value.dtype}{tuple(value.shape)}" if isinstance(value, Tensor) else "",
)
def test_other_videos_are_refused(model: XCLIP, video: Tensor, found: str) -> None:
    expected = r"uint8 \(B, T, H, W, 3\) or floating point \(B, T, 3, H, W\)"
    with pytest.raises(ValueError, match=rf"{expected}.*found .*{found}"):
        model.encode_video(video)
    with pytest.raises(ValueError, match=found):
        model(video, TOKENS)


@pytest.mark.parametrize(("height", "width"), [(33, 32), (32, 36), (7, 7), (4, 64)])
def test_frames_that_patches_do_not_tile_are_refused(model: XCLIP, height: int, width: int) -> None:
    with pytest.raises(ValueError, match=rf"multiples of 8, found {height}x{width}"):
        model.encode_video(clip(height=height, width=width))


@pytest.mark.parametrize(
    ("tokens", "found"),
    [
        (torch.zeros(5, dtype=torch.int64), r"torch.int64 \(5,\)"),
        (torch.zeros(2, 1, 5, dtype=torch.int64), r"torch.int64 \(2, 1, 5\)"),
        (torch.zeros(2, 5), r"torch.float32 \(2, 5\)"),
        (torch.zeros(2, 5, dtype=torch.bool), r"torch.bool \(2, 5\)"),
        (torch.zeros(2, 13, dtype=torch.int64), r"L <= 12, found torch.int64 \(2, 13\)"),
        (torch.zeros(2, 0, dtype=torch.int64), r"torch.int64 \(2, 0\)"),
        (torch.tensor([[1, 50]]), r"0\.\.49, found 1\.\.50"),
        (torch.tensor([[-1, 49]]), r"0\.\.49, found -1\.\.49"),
    ],
)
def test_other_tokens_are_refused(model: XCLIP, tokens: Tensor, found: str) -> None:
    with pytest.raises(ValueError, match=found):
        model.encode_text(tokens)


def test_text_feature_is_the_row_at_the_end_of_text(model: XCLIP) -> None:
    tokens = TOKENS.clone()
    before = model.encode_text(tokens)
    tokens[0, 2:] = 7
    assert torch.equal(model.encode_text(tokens), before)
    tokens[0, 0] = 7
    assert relative_error(model.encode_text(tokens)[0], before[0]) > 1e-4


def test_int32_tokens_equal_int64_tokens(model: XCLIP) -> None:
    assert torch.equal(model.encode_text(TOKENS.int()), model.encode_text(TOKENS))


def test_no_texts_give_no_logits(model: XCLIP) -> None:
    assert model(clip(), TOKENS[:0]).shape == (2, 0)


def test_text_of_any_length_up_to_the_context(model: XCLIP) -> None:
    padded = torch.zeros(len(TOKENS), CONFIG.context_length, dtype=torch.int64)
    padded[:, : TOKENS.shape[1]] = TOKENS
    assert relative_error(model.encode_text(padded), model.encode_text(TOKENS)) < EXACT
