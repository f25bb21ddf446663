"""Intra-frame attention by the compiled extension: parity, layouts, gradients, registration, and when it is chosen."""

from __future__ import annotations

import pytest
import torch
from harness import DEVICE, check_op, layouts, random
from numerics import assert_within
from torch import Tensor

from xclip_fast import _extension
from xclip_fast.ops import explain, frame_attention

pytestmark = pytest.mark.skipif(DEVICE != "cpu", reason="a test of the CPU")


def arguments(frames: int, tokens: int, heads: int, head_dim: int = 64, mean: float = 0.0) -> dict[str, object]:
    width = heads * head_dim
    return {
        "qkv": random(frames, tokens, 3 * width, dtype=torch.bfloat16, mean=mean),
        "message_kv": random(frames, 2 * width, dtype=torch.bfloat16, mean=mean),
        "heads": heads,
    }


@pytest.mark.usefixtures("by_extension")
@pytest.mark.parametrize("tokens", [1, 5, 6, 7, 15, 16, 50, 63, 64, 65, 197])
@pytest.mark.parametrize("mean", [0.0, 0.5])
def test_parity(tokens: int, mean: float) -> None:
    check_op(frame_attention, arguments(2, tokens, 2, mean=mean), what="frame_attention extension", backend="extension")


@pytest.mark.usefixtures("by_extension")
@pytest.mark.parametrize("layout", ["offset", "padded", "strided", "transposed"])
def test_layouts(layout: str) -> None:
    inputs = arguments(3, 9, 2)
    plain = frame_attention(**inputs, backend="extension")
    for name in ("qkv", "message_kv"):
        moved = inputs | {name: layouts(inputs[name])[layout]}
        assert torch.equal(frame_attention(**moved, backend="extension"), plain)


@pytest.mark.usefixtures("by_extension")
def test_no_frames_give_none() -> None:
    assert frame_attention(**arguments(0, 5, 2), backend="extension").shape == (0, 5, 128)


@pytest.mark.usefixtures("by_extension")
def test_log_sum_exp() -> None:
    qkv, message_kv, _ = arguments(2, 18, 2).values()
    _, lse = torch.ops.xclip_fast.frame_attention(qkv, message_kv, 2, True, True)
    query, key, _ = qkv.double().view(2, 18, 3, 2, 64).permute(2, 0, 3, 1, 4)
    key = torch.cat([key, message_kv.double().view(2, 2, 2, 64)[:, 0].unsqueeze(2)], dim=2)
    scores = query @ key.transpose(-2, -1) / 8
    assert lse.dtype == torch.float32
    assert_within(
        lse, scores.logsumexp(-1) / torch.tensor(2.0).log().item(), 1e-6, what="frame_attention extension lse"
    )


@pytest.mark.usefixtures("by_extension")
@pytest.mark.parametrize("with_lse", [True, False])
def test_registered_op(with_lse: bool) -> None:
    qkv, message_kv, _ = arguments(2, 5, 1).values()
    tensors = [x.requires_grad_(with_lse) for x in (qkv, message_kv)]
    # opcheck compares gradients with those of another run: in bfloat16 they are the same bits
    torch.library.opcheck(torch.ops.xclip_fast.frame_attention, (*tensors, 1, with_lse, True))


@pytest.mark.usefixtures("by_extension")
def test_compiles_whole() -> None:
    def attend(qkv: Tensor, message_kv: Tensor) -> Tensor:
        return frame_attention(qkv, message_kv, 2)

    compiled = torch.compile(attend, fullgraph=True, backend="aot_eager")
    qkv, message_kv, _ = arguments(2, 5, 2).values()
    assert torch.equal(compiled(qkv, message_kv), frame_attention(qkv, message_kv, 2, backend="extension"))


@pytest.mark.usefixtures("by_extension")
def test_automatic_where_no_gradient_is_asked_for() -> None:
    qkv, message_kv, heads = arguments(2, 33, 2).values()
    by = {name: frame_attention(qkv, message_kv, heads, backend=name) for name in ("extension", "torch")}
    assert not torch.equal(by["extension"], by["torch"])
    assert torch.equal(frame_attention(qkv, message_kv, heads), by["extension"])
    learning = qkv.clone().requires_grad_()
    assert torch.equal(frame_attention(learning, message_kv, heads), by["torch"])
    with torch.no_grad():
        assert torch.equal(frame_attention(learning, message_kv, heads), by["extension"])


def test_what_it_cannot_take_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    def reason(**changes: object) -> str | None:
        return explain("frame_attention", **arguments(2, 5, 2) | changes)["extension"]

    plain = arguments(2, 5, 2)
    wide = {name: plain[name].float() for name in ("qkv", "message_kv")}
    assert "takes bfloat16, found torch.float32" in reason(**wide)
    assert "heads of 64 numbers, found 32" in reason(heads=4)
    meta = {name: plain[name].to("meta") for name in ("qkv", "message_kv")}
    assert "the tensors are on meta" in reason(**meta)
    with pytest.raises(ValueError, match="the extension backend was asked for, but its attention takes bfloat16"):
        frame_attention(**wide, heads=2, backend="extension")
    library = _extension._Library()
    monkeypatch.setattr(_extension, "_load", lambda path: library)
    assert reason() == "this processor has no AVX512-BF16"
    library = library._replace(attends=True)
    assert reason() is None
    library = library._replace(refusal="the extension is not built")
    assert reason() == "the extension is not built"
    assert frame_attention(**plain).shape == (2, 5, 128)
