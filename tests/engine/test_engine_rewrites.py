"""Each exact rewrite in the engine, alone, left out and with all others, against the reference in float64."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import pytest
import torch
from configs import SMALL
from engine_cases import random_tokens, random_video, small_model
from numerics import EXACT, assert_within, relative_error
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from xclip_fast.classes import CHUNK_BYTES
from xclip_fast.engine import Engine
from xclip_fast.engine.cpu import CHUNK_ROWS, CpuTower
from xclip_fast.engine.cuda import CudaTower, _ResidualStream
from xclip_fast.engine.packing import CPU_REWRITES, CUDA_REWRITES, REWRITES, Packing, place_of
from xclip_fast.reference import XCLIP

ALL = frozenset(REWRITES)
# what a tower leaves to its ops, or has no use for
ELSEWHERE = {CpuTower: {"stream"}, CudaTower: {"pixels", "class_token", "norms", "scores"}}


@pytest.fixture(scope="module")
def model() -> XCLIP:
    return small_model().double()


def make_engine(model: XCLIP, tower: type, rewrites: frozenset[str]) -> Engine:
    """An engine in float64 on the CPU, with the tower of either device."""
    engine = Engine(model, torch.float64, _rewrites=rewrites)
    if tower is CudaTower:
        engine._tower = CudaTower(model.visual, model.config, engine._packing)
    return engine


class Trace(TorchDispatchMode):
    """The operators that run, with the shapes and numbers they are given."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.calls.append(f"{func} {[tuple(x.shape) if isinstance(x, Tensor) else x for x in args]} {kwargs}")
        return func(*args, **(kwargs or {}))


SETS = {
    **{f"only {name}": frozenset({name}) for name in REWRITES},
    **{f"all but {name}": ALL - {name} for name in REWRITES},
    "none": frozenset(),
    "all": ALL,
    "those of the CPU": CPU_REWRITES,
    "those of CUDA": CUDA_REWRITES,
}


@pytest.mark.parametrize("tower", [CpuTower, CudaTower])
@pytest.mark.parametrize("name", SETS)
def test_parity_rewrites(model: XCLIP, name: str, tower: type) -> None:
    engine = make_engine(model, tower, SETS[name])
    video, tokens = random_video(), random_tokens()
    truth = model.encode_video(video)
    features = engine.encode_video(video)
    assert_within(features.video, truth.video, EXACT, what="engine: video features")
    assert_within(features.patches, truth.patches, EXACT, what="engine: patch features")
    assert_within(engine.embed_video(video), truth.video, EXACT, what="engine: class rows alone")
    assert_within(engine.encode_texts(tokens).features, model.encode_text(tokens), EXACT, what="engine: texts")
    assert_within(engine(video, tokens), model(video, tokens), EXACT, what="engine: logits")


@pytest.mark.parametrize(
    ("tower", "name"), [(tower, name) for tower in ELSEWHERE for name in REWRITES if name not in ELSEWHERE[tower]]
)
def test_rewrite_has_a_switch(model: XCLIP, name: str, tower: type) -> None:
    video, tokens = random_video(), random_tokens()
    calls = []
    for rewrites in (ALL, ALL - {name}):
        engine = make_engine(model, tower, rewrites)
        with Trace() as trace:
            engine(video, tokens)
            engine.embed_video(video)
        calls.append(trace.calls)
    assert calls[0] != calls[1]


@pytest.mark.parametrize("rewrites", [CPU_REWRITES, frozenset()], ids=["norms in the weights", "norms with vectors"])
def test_parity_smoothing(model: XCLIP, rewrites: frozenset[str]) -> None:
    places = [place_of(block, name) for block in range(3) for name in ("qkv", "fc")]
    plain = Packing(torch.device("cpu"), torch.float64, rewrites)
    smooth = replace(plain, smoothing={place: torch.exp2(torch.randint(-4, 5, (128,)).double()) for place in places})
    towers = [CpuTower(model.visual, model.config, packing) for packing in (plain, smooth)]
    weights = [tower.blocks[1].fc.weight for tower in towers]  # type: ignore[attr-defined]
    assert not torch.equal(*weights)
    video = random_video()
    truth, found = (tower.project(tower(video, patches=True)[0]) for tower in towers)
    assert_within(found, truth, EXACT, what="engine: smoothing")


@pytest.mark.parametrize("tower", [CpuTower, CudaTower])
def test_parity_in_chunks_of_a_video(model: XCLIP, tower: type) -> None:
    # frames of 257 tokens: two videos of five frames fall into parts of three and two
    video = random_video(2, 5, 128)
    assert CHUNK_ROWS // 257 == 3
    truth = model.encode_video(video)
    features = make_engine(model, tower, ALL).encode_video(video)
    assert_within(features.video, truth.video, EXACT, what="engine: parts of a video")
    assert_within(features.patches, truth.patches, EXACT, what="engine: parts of a video")


@pytest.mark.parametrize("tower", [CpuTower, CudaTower])
@pytest.mark.parametrize("shape", [(1, 1, 32, 32), (3, 7, 24, 48)], ids=str)
def test_parity_other_lengths_and_resolutions(model: XCLIP, shape: tuple[int, ...], tower: type) -> None:
    batch, frames, height, width = shape
    truth_video = torch.randn(batch, frames, 3, height, width, dtype=torch.float64)
    truth = model.encode_video(truth_video)
    engine = make_engine(model, tower, ALL)
    assert_within(engine.encode_video(truth_video).video, truth.video, EXACT, what="engine: other sizes")
    assert_within(engine.encode_video(truth_video).patches, truth.patches, EXACT, what="engine: other sizes")
    whole = torch.randint(256, (batch, frames, height, width, 3), dtype=torch.uint8)
    assert_within(engine.embed_video(whole), model.encode_video(whole).video, EXACT, what="engine: other sizes")


@pytest.mark.parametrize("tower", [CpuTower, CudaTower])
def test_parity_of_grids_with_as_many_patches(model: XCLIP, tower: type) -> None:
    # 16 patches, 4 by 4, 2 by 8 and 8 by 2, and again: what an engine keeps of one is not for another
    engine = make_engine(model, tower, ALL)
    for height, width in [(32, 32), (16, 64), (64, 16), (32, 32)]:
        video = torch.randint(256, (1, 2, height, width, 3), dtype=torch.uint8)
        truth = model.encode_video(video)
        assert_within(engine.encode_video(video).patches, truth.patches, EXACT, what="engine: other grids")


def test_parity_of_several_lengths_in_one_engine(model: XCLIP) -> None:
    engine = make_engine(model, CpuTower, ALL)
    for frames in (4, 1, 7, 4):
        video = random_video(2, frames)
        assert_within(engine.embed_video(video), model.encode_video(video).video, EXACT, what="engine: other lengths")


@pytest.mark.parametrize("tower", [CpuTower, CudaTower])
@pytest.mark.parametrize("name", ["none", "all", "those of the CPU", "those of CUDA"])
def test_parity_of_other_eps(name: str, tower: type) -> None:
    # each kind of norm has one of its own; both of a block share one, as in every checkpoint
    model = small_model().double()
    kinds: dict[str, float] = {}
    for path, part in model.named_modules():
        if isinstance(part, torch.nn.LayerNorm):
            kind = re.sub(r"\.\d+\.", ".", path)
            kind = re.sub(r"\.ln_\d$", "", kind)
            part.eps = kinds.setdefault(kind, 0.05 * (1 + len(kinds)))
    assert len(kinds) >= 9
    video, tokens = random_video(), random_tokens()
    truth, engine = model.encode_video(video), make_engine(model, tower, SETS[name])
    assert_within(engine.encode_video(video).video, truth.video, EXACT, what="engine: other eps")
    assert_within(engine.encode_video(video).patches, truth.patches, EXACT, what="engine: other eps")
    assert_within(engine(video, tokens), model(video, tokens), EXACT, what="engine: other eps")


@pytest.mark.parametrize("sizes", [{"activation": "gelu"}, {"vision_heads": 4, "embed_heads": 4}, {"prompt_layers": 1}])
@pytest.mark.parametrize("tower", [CpuTower, CudaTower])
def test_parity_other_models(sizes: dict[str, object], tower: type) -> None:
    model = small_model(**sizes).double()
    video, tokens = random_video(), random_tokens()
    assert_within(
        make_engine(model, tower, ALL)(video, tokens), model(video, tokens), EXACT, what="engine: other models"
    )


def test_stream_is_updated_in_place(model: XCLIP) -> None:
    tower = make_engine(model, CudaTower, ALL)._tower
    stream = _ResidualStream(tower._embed(random_video()))
    for block in tower.blocks:
        found = block(stream, tower.side, False)
        assert found.tokens.data_ptr() == stream.tokens.data_ptr()
        assert found.pending is None


def test_video_features_are_made_beside_the_prompts(model: XCLIP, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = make_engine(model, CudaTower, ALL)
    order: list[str] = []

    beside, prompts = engine._side.beside, engine._heads._prompts

    @contextmanager
    def logged(work: Callable[[], Tensor]) -> Iterator[Callable[[], Tensor]]:
        order.append("begin")
        with beside(work) as joined:
            yield lambda: (order.append("join"), joined())[1]

    monkeypatch.setattr(engine._side, "beside", logged)
    monkeypatch.setattr(engine._heads, "_prompts", lambda *given: (order.append("prompts"), prompts(*given))[1])
    engine(random_video(), random_tokens())
    assert order == ["begin", "prompts", "join"]
    order.clear()
    engine.encode_video(random_video())
    assert order == ["begin", "join"]


def test_text_is_cut(model: XCLIP) -> None:
    tokens = random_tokens()
    with Trace() as trace:
        make_engine(model, CpuTower, ALL).encode_texts(tokens)
    assert not any(str((len(tokens), SMALL.context_length, 64)) in call for call in trace.calls)


def test_parity_large_class_sets_in_parts(model: XCLIP, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(CHUNK_BYTES, "cpu", 7 * 64 * SMALL.embed_dim)
    video, tokens = random_video(3), random_tokens(11)
    engine = make_engine(model, CpuTower, ALL)
    with Trace() as trace:
        logits = engine(video, tokens)
    assert_within(logits, model(video, tokens), EXACT, what="engine: classes in parts")
    assert not any("(3, 11, 128)" in call for call in trace.calls)


def test_rewrites_are_told(model: XCLIP) -> None:
    assert set(Engine(model, torch.float32).report().rewrites) == CPU_REWRITES
    assert CPU_REWRITES | CUDA_REWRITES <= ALL
    wrong = relative_error(model.encode_video(random_video()).video, model.encode_video(random_video()).video)
    assert wrong > 1e-3, "the tests' videos must differ enough to tell answers apart"
