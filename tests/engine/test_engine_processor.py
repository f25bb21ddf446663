"""What the engine does on processors that multiply no half precision, and how a processor is described."""

from __future__ import annotations

import logging
from typing import Any

import pytest
import torch
from engine_cases import random_tokens, random_video, small_model
from numerics import relative_error

from xclip_fast import processor
from xclip_fast.engine import Engine, precision
from xclip_fast.processor import FEATURES
from xclip_fast.reference import XCLIP

HALVES = [torch.bfloat16, torch.float16]


@pytest.fixture(scope="module")
def model() -> XCLIP:
    return small_model()


@pytest.fixture
def without_half_precision(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(processor, "multiplies", lambda dtype: False)
    precision._say_once.cache_clear()


def tensors(part: Any, seen: set[int]) -> list[torch.Tensor]:
    """Every tensor that an object holds, once."""
    if id(part) in seen:
        return []
    seen.add(id(part))
    if isinstance(part, torch.Tensor):
        return [part]
    if isinstance(part, dict):
        inner = list(part.values())
    elif isinstance(part, (list, tuple)):
        inner = list(part)
    else:
        inner = list(vars(part).values()) if hasattr(part, "__dict__") and not isinstance(part, type) else []
    return [tensor for one in inner for tensor in tensors(one, seen)]


def kept_bytes(engine: Engine) -> int:
    """Bytes of the weights of an engine's two towers; the small heads stay in float32."""
    seen: set[int] = set()
    parts = [engine._tower, engine._texts.encode]
    return sum(tensor.nbytes for part in parts for tensor in tensors(part, seen))


@pytest.mark.usefixtures("without_half_precision")
@pytest.mark.parametrize("dtype", HALVES, ids=str)
@torch.inference_mode()
def test_weights_stay_in_half_precision(model: XCLIP, dtype: torch.dtype, caplog: pytest.LogCaptureFixture) -> None:
    video, tokens, name = random_video(3), random_tokens(), str(dtype).removeprefix("torch.")
    with caplog.at_level(logging.WARNING, "xclip_fast"):
        engine = Engine(model, dtype)
        Engine(model, dtype)
    assert [record.message for record in caplog.records if "multiplies no" in record.message] == [
        f"this processor ({processor.describe()}) multiplies no {name}: "
        "weights are kept in it and multiplied in float32"
    ]
    report = engine.report(video)
    assert report.stored == report.dtype == name
    assert f"weights in {name}, GEMMs in float32" in str(report)
    features = engine.encode_video(video)
    assert features.video.dtype == features.patches.dtype == engine.embed_video(video).dtype == dtype
    truth = model.double()
    # the weights are rounded, and the features once more
    step = torch.finfo(dtype).eps
    assert relative_error(features.video, truth.encode_video(video).video) < 2 * step
    assert relative_error(engine(video, tokens), truth(video, tokens)) < 2 * step
    model.float()


@pytest.mark.usefixtures("without_half_precision")
def test_half_precision_halves_the_memory(model: XCLIP) -> None:
    assert kept_bytes(Engine(model, torch.bfloat16)) < 0.6 * kept_bytes(Engine(model, torch.float32))


@pytest.mark.usefixtures("without_half_precision")
def test_weights_beyond_the_range_of_float16_stay_in_float32() -> None:
    model = small_model()
    model.visual.transformer.resblocks[1].attn.out_proj.weight[0, 0] = 1e6
    report = Engine(model, torch.float16).report()
    assert [gemm.place for gemm in report.products if gemm.used == "float32"] == ["blocks.1.out"]
    assert report.video_error is not None
    assert report.video_error < 2e-3


def test_int8_streams_in_float32_where_bfloat16_is_slow(model: XCLIP, monkeypatch: pytest.MonkeyPatch) -> None:
    if precision.int8_linear() is None:
        pytest.skip("this PyTorch multiplies no bytes on this processor")
    for native, dtype in ((False, torch.float32), (True, torch.bfloat16)):
        monkeypatch.setattr(processor, "multiplies", lambda dtype, native=native: native)
        assert Engine(model, torch.int8).encode_video(random_video()).video.dtype is dtype


@pytest.mark.parametrize(
    ("limit", "left"),
    [
        ("", FEATURES),
        ("ALL", FEATURES),
        ("sse41", ()),
        ("AVX2", ("avx2",)),
        ("AVX512_CORE", ("avx2", "avx512")),
        ("AVX512_CORE_BF16", ("avx2", "avx512", "avx_vnni", "avx512_vnni", "avx512_bf16")),
    ],
)
def test_a_limit_of_onednn_is_heeded(limit: str, left: tuple[str, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(processor, "features", lambda: FEATURES)
    monkeypatch.setattr(processor, "X86", True)
    monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", limit)
    found = processor.onednn_features.__wrapped__()
    assert found == left
    monkeypatch.setattr(processor, "onednn_features", lambda: found)
    assert processor.multiplies(torch.bfloat16) == bool({"avx512_bf16", "amx_bf16"} & set(left))
    assert processor.multiplies(torch.float16) == ("avx512_fp16" in left)
    assert processor.sums_bytes_in_16_bits() == (not {"avx_vnni", "avx512_vnni", "amx_int8"} & set(left))
    assert ("left out" in processor.describe() or "leave out" in processor.describe()) == (left != FEATURES)


def test_features_without_the_list_of_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    if not processor.X86:
        pytest.skip("the older questions are of x86")
    monkeypatch.delattr(torch.cpu, "get_capabilities", raising=False)
    for name in ("avx2", "avx512", "vnni", "avx512_bf16", "amx_tile"):
        monkeypatch.setattr(torch.cpu, f"_is_{name}_supported", lambda name=name: name in ("avx2", "avx512", "vnni"))
    assert processor.features.__wrapped__() == ("avx2", "avx512", "avx512_vnni")


def test_features_of_arm(monkeypatch: pytest.MonkeyPatch) -> None:
    found = {"neon": True, "bf16": True, "i8mm": True, "sve": False}
    monkeypatch.setattr(processor, "_capabilities", lambda: found)
    monkeypatch.setattr(processor, "X86", False)
    features = processor.features.__wrapped__()
    assert features == ("neon", "bf16", "i8mm")
    monkeypatch.setattr(processor, "onednn_features", lambda: features)
    assert processor.multiplies(torch.bfloat16)
    assert not processor.sums_bytes_in_16_bits()
