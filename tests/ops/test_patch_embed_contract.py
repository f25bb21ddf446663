"""Patch embedding's contract: each wrong argument is named before any work, each backend says why it cannot serve."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from xclip_fast import ops
from xclip_fast.ops import _patch_extension, explain, patch_embed


def good(frames: Tensor, patch: int = 16) -> dict[str, Tensor]:
    """Arguments that fit these frames (F, H, W, 3), on the CPU whichever devices there are."""
    return {
        "frames": frames,
        "weight": torch.randn(8, 3, patch, patch),
        "class_embedding": torch.randn(8),
        "positions": torch.randn(1 + frames.shape[1] // patch * (frames.shape[2] // patch), 8),
        "norm_weight": torch.ones(8),
        "norm_bias": torch.zeros(8),
    }


def wrong() -> dict[str, tuple[dict[str, object], str]]:
    """What is changed in good arguments, and the message it gets."""
    frames = torch.zeros(2, 32, 48, 3, dtype=torch.uint8)
    return {
        "no frames": ({"frames": frames[0]}, r"frames must be uint8 \(F, H, W, 3\).*\(32, 48, 3\)"),
        "gray": ({"frames": frames[..., :1]}, r"found torch.uint8 \(2, 32, 48, 1\)"),
        "integers": ({"frames": frames.int()}, r"floating point \(F, 3, H, W\), found torch.int32"),
        "small floats": (
            {"frames": frames.permute(0, 3, 1, 2).to(torch.float8_e5m2)},
            r"found torch.float8_e5m2 \(2, 3, 32, 48\)",
        ),
        "floats with channels last": ({"frames": frames.float()}, r"found torch.float32 \(2, 32, 48, 3\)"),
        "no height": ({"frames": frames[:, :0]}, r"found torch.uint8 \(2, 0, 48, 3\)"),
        "a rest": ({"frames": frames[:, :31]}, "multiples of 16, found 31x48"),
        "flat weight": ({"weight": torch.zeros(8, 768)}, r"weight must have shape \(D, 3, P, P\), found \(8, 768\)"),
        "oblong weight": ({"weight": torch.zeros(8, 3, 16, 8)}, r"found \(8, 3, 16, 8\)"),
        "gray weight": ({"weight": torch.zeros(8, 1, 16, 16)}, r"found \(8, 1, 16, 16\)"),
        "integer weight": ({"weight": torch.zeros(8, 3, 16, 16, dtype=torch.int8)}, "weight must be float16.*int8"),
        "positions": ({"positions": torch.zeros(5, 8)}, r"positions must have shape \(7, 8\).*found \(5, 8\)"),
        "class": ({"class_embedding": torch.zeros(7)}, r"class_embedding must have shape \(8,\).*found \(7,\)"),
        "half a norm": ({"norm_bias": None}, "norm_weight and norm_bias go together"),
        "norm": ({"norm_bias": torch.zeros(9)}, r"norm_bias must have shape \(8,\)"),
        "integer norm": ({"norm_bias": torch.zeros(8).int()}, "norm_bias must be floating point, found torch.int32"),
        "dtype": ({"dtype": torch.int8}, "dtype must be float16.*found torch.int8"),
        "two means": ({"mean": (0.5, 0.5)}, r"mean must hold three numbers, found \(0.5, 0.5\)"),
        "no deviation": ({"std": (0.5, 0.0, 0.5)}, "std must hold three positive numbers"),
        "normalised twice": (
            {"frames": torch.zeros(2, 3, 32, 48), "mean": (0.5, 0.5, 0.5)},
            "mean and std are for uint8 frames, found torch.float32",
        ),
        "another device": ({"weight": torch.zeros(8, 3, 16, 16, device="meta")}, "weight must be on cpu.*found meta"),
        "too many pixels": (
            {"frames": frames[:1].expand(2**19, -1, -1, -1)},
            r"frames may have up to 2147483647.*2415919104",
        ),
        "too many tokens": (
            {
                "frames": frames[:1, :16, :16].expand(2**21, -1, -1, -1),
                "weight": torch.zeros(1).expand(1024, 3, 16, 16),
                "positions": torch.zeros(1).expand(2, 1024),
                "class_embedding": torch.zeros(1024),
                "norm_weight": torch.zeros(1024),
                "norm_bias": torch.zeros(1024),
            },
            "the tokens may have up to 2147483647 elements, found 4294967296",
        ),
    }


@pytest.mark.parametrize("fault", list(wrong()))
def test_wrong_arguments_are_named(fault: str) -> None:
    inputs = good(torch.zeros(2, 32, 48, 3, dtype=torch.uint8))
    patch_embed(**inputs)
    changes, message = wrong()[fault]
    for backend in (None, "reference", "torch"):
        with pytest.raises(ValueError, match=message):
            patch_embed(**inputs | changes, backend=backend)


def test_explain() -> None:
    inputs = good(torch.zeros(1, 16, 16, 3, dtype=torch.uint8), patch=8)
    reasons = explain("patch_embed", **inputs)
    assert reasons["reference"] is reasons["torch"] is None
    assert reasons["extension"] == _patch_extension.refusal(inputs["frames"], inputs["weight"])
    meta = {name: x.to("meta") for name, x in inputs.items()}
    assert "on meta" in explain("patch_embed", **meta)["extension"]
    with pytest.raises(
        ValueError, match="patch_embed: the extension backend was asked for, but the tensors are on meta"
    ):
        patch_embed(**meta, backend="extension")
    assert "no part in the compiled extension" in explain("layer_norm", *[torch.zeros(4)] * 3)["extension"]
    with pytest.raises(ValueError, match="layer_norm: the extension backend was asked for"), ops.backend("extension"):
        ops.layer_norm(*[torch.zeros(4)] * 3)


def test_without_the_extension_torch_does_the_work(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_patch_extension._extension, "refusal", lambda: "it is not here")
    inputs = good(torch.randint(0, 256, (2, 32, 32, 3), dtype=torch.uint8), patch=8)
    assert torch.equal(patch_embed(**inputs), patch_embed(**inputs, backend="torch"))
    with pytest.raises(ValueError, match="it is not here"):
        patch_embed(**inputs, backend="extension")


def test_packed_for_cuda_as_the_header_says() -> None:
    facts = pytest.importorskip("xclip_fast._buildinfo", reason="the extension is not built")
    assert facts.pixel_centre == _patch_extension.PIXEL_CENTRE
    assert facts.longest_side == _patch_extension.LONGEST_SIDE
    factors = [[0.1, 0.2, 0.3], [0.4, 0.5, 0.6]]
    for patch in (1, 5, 14, 16, 32):
        weight = torch.randn(3, 3, patch, patch)
        packed, scale, table = _patch_extension.pack_for_cuda(weight, torch.zeros(3), torch.zeros(2, 3), factors)
        assert packed.shape == (3, facts.patch_row_columns(patch))
        expected = (weight * torch.tensor(factors[0])[:, None, None]).permute(0, 2, 3, 1).flatten(1)
        assert torch.allclose(packed[:, : expected.shape[1]] * scale[:, None], expected, rtol=1e-3, atol=1e-5)
        assert not packed[:, expected.shape[1] :].any()
        bias = torch.einsum("dcyx,c->d", weight, 128 * torch.tensor(factors[0]) + torch.tensor(factors[1]))
        assert torch.allclose(table[1], bias, atol=1e-3)
