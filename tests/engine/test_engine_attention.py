"""Attention of the engine's blocks on the CPU, by the extension and by PyTorch, against float64."""

from __future__ import annotations

import pytest
import torch
from numerics import assert_parity, poisoned_memory, relative_error
from torch import Tensor

from xclip_fast import _extension
from xclip_fast.engine import cpu
from xclip_fast.engine.cpu import frame_attention

DTYPES = [torch.float32, torch.bfloat16]


@pytest.fixture(params=["extension", "torch"])
def both_ways(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Once the extension attends, once PyTorch."""
    if request.param == "extension":
        request.getfixturevalue("by_extension")
    else:
        monkeypatch.setattr(_extension, "attention_refusal", lambda: "not now")


def rows(frames: int, tokens: int, heads: int, dtype: torch.dtype, head_dim: int = 64, mean: float = 0.0) -> Tensor:
    return (torch.randn(frames * (tokens + 1), 3 * heads * head_dim) + mean).to(dtype)


def plain(packed: Tensor, frames: int, heads: int, queries: int, scale: float | None) -> Tensor:
    """The definition, in the dtype of the rows."""
    tokens = len(packed) // frames - 1
    own, messages = packed.split([frames * tokens, frames])
    both = torch.cat([own.view(frames, tokens, -1), messages.view(frames, 1, -1)], dim=1)
    query, key, value = both.view(frames, tokens + 1, 3, heads, -1).permute(2, 0, 3, 1, 4)
    scores = query[:, :, :queries] @ key.mT * (query.shape[-1] ** -0.5 if scale is None else scale)
    return (scores.softmax(dim=-1) @ value).transpose(1, 2).reshape(frames * queries, -1)


# around the 6 queries, 16 and 64 keys that the extension takes at a time, and the published sizes
@pytest.mark.parametrize("tokens", [1, 2, 5, 6, 7, 14, 15, 16, 30, 50, 62, 63, 64, 127, 197, 257])
@pytest.mark.parametrize("class_row", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.usefixtures("both_ways")
def test_parity(tokens: int, class_row: bool, dtype: torch.dtype) -> None:
    queries = 1 if class_row else tokens
    packed = rows(3, tokens, 2, dtype, mean=0.3)
    with poisoned_memory():
        found = frame_attention(packed, 3, 2, queries, None)
    assert_parity(
        found,
        plain(packed, 3, 2, queries, None),
        plain(packed.double(), 3, 2, queries, None),
        what=f"engine frame_attention {tokens}",
        terms=64 + tokens,
    )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("heads, head_dim, scale", [(1, 64, 1.0), (3, 64, 0.01), (5, 32, 1.0), (2, 80, None)])  # noqa: PT006
@pytest.mark.usefixtures("both_ways")
def test_parity_of_other_heads_and_scales(heads: int, head_dim: int, scale: float | None, dtype: torch.dtype) -> None:
    packed = rows(2, 21, heads, dtype, head_dim) / 3
    found = frame_attention(packed, 2, heads, 21, scale)
    truth = plain(packed.double(), 2, heads, 21, scale)
    what = f"engine frame_attention {heads}x{head_dim}"
    assert_parity(found, plain(packed, 2, heads, 21, scale), truth, what=what, terms=head_dim + 22)


@pytest.mark.parametrize("frames, heads", [(1, 1), (1, 5), (4, 2)])  # noqa: PT006
def test_parity_of_heads_in_parts(frames: int, heads: int, monkeypatch: pytest.MonkeyPatch) -> None:
    # three heads of 197 tokens at a time: parts of one head, of three and two, of three, three and two
    monkeypatch.setattr(_extension, "attention_refusal", lambda: "not now")
    packed = rows(frames, 197, heads, torch.bfloat16) / 4
    assert cpu._SCORES // (197 * 198) == 3
    with poisoned_memory():
        found = frame_attention(packed, frames, heads, 197, 1.0)
    truth, same = (plain(x, frames, heads, 197, 1.0) for x in (packed.double(), packed))
    assert_parity(found, same, truth, what="engine frame_attention in parts", terms=64 + 198)


@pytest.mark.usefixtures("by_extension")
def test_scores_of_thousands_keep_their_digits() -> None:
    # PyTorch's path rounds scores to bfloat16, as the model in plain PyTorch does
    packed = rows(2, 40, 1, torch.bfloat16) * 30
    assert relative_error(frame_attention(packed, 2, 1, 40, 1.0), plain(packed.double(), 2, 1, 40, 1.0)) < 0.003
    packed[:, :64] = 0
    assert relative_error(frame_attention(packed, 2, 1, 40, 1.0), plain(packed.double(), 2, 1, 40, 1.0)) < 0.005


@pytest.mark.parametrize("part", ["query", "key", "value"])
@pytest.mark.parametrize("row", [0, 7, 39, 41])
@pytest.mark.usefixtures("both_ways")
def test_a_nan_spoils_what_it_touches_and_nothing_else(row: int, part: str) -> None:
    frames, tokens, heads = 2, 20, 2
    packed = rows(frames, tokens, heads, torch.bfloat16)
    spoilt = torch.zeros(frames, tokens, heads, 64, dtype=torch.bool)
    frame = row // tokens if row < frames * tokens else row - frames * tokens
    packed[row, ["query", "key", "value"].index(part) * heads * 64 + 5] = float("nan")
    if part == "query" and row < frames * tokens:
        spoilt[frame, row % tokens, 0] = True
    elif part == "key":
        spoilt[frame, :, 0] = True
    elif part == "value":
        spoilt[frame, :, 0, 5] = True
    found = frame_attention(packed, frames, heads, tokens, None).view(spoilt.shape)
    assert torch.equal(found.isnan(), spoilt)


@pytest.mark.usefixtures("by_extension")
def test_infinite_scores_are_as_softmax_has_them() -> None:
    packed = rows(2, 20, 1, torch.bfloat16)
    packed[3, 64 + 5] = float("inf")
    packed[0, 5] = 0
    # in float64: tiles (AMX) make numbers that are none of other infinite scores too
    found, wanted = frame_attention(packed, 2, 1, 20, None), plain(packed.double(), 2, 1, 20, None)
    # all weight on an infinite key is no number, none is none
    assert torch.equal(found.isnan(), wanted.isnan())
    assert 0 < found.isnan().sum() < 20 * 64
    assert relative_error(found.nan_to_num(), wanted.nan_to_num()) < 0.01


@pytest.mark.usefixtures("by_extension")
def test_what_a_frame_gives_does_not_depend_on_its_neighbours() -> None:
    packed = rows(5, 50, 3, torch.bfloat16)
    own, messages = packed[:250].view(5, 50, -1), packed[250:]
    together = frame_attention(packed, 5, 3, 50, None).view(5, 50, -1)
    for frame in range(5):
        alone = torch.cat([own[frame], messages[frame : frame + 1]])
        assert torch.equal(frame_attention(alone, 1, 3, 50, None), together[frame])


@pytest.mark.usefixtures("by_extension")
def test_threads_change_nothing() -> None:
    packed = rows(4, 33, 3, torch.bfloat16)
    before = torch.get_num_threads()
    found = []
    for threads in (1, 3):
        torch.set_num_threads(threads)
        found.append(frame_attention(packed, 4, 3, 33, None))
    torch.set_num_threads(before)
    assert torch.equal(*found)
