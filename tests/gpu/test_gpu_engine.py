"""The engine on a GPU: precision beside the model, its graphs against plain calls, odd batches, threads.

On a CPU a tiny engine without graphs goes through the same tests.
"""

from __future__ import annotations

import copy
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from gpu_cases import DEVICE, ON_GPU, copies, equal, needs_gpu
from numerics import TOLERANCES, assert_within, randomise_parameters, relative_error
from torch import Tensor
from torch.nn.functional import cosine_similarity

from xclip_fast.engine import Engine
from xclip_fast.ops.cases import config_of
from xclip_fast.reference import XCLIP

VARIANTS = ["B/32", "B/16", "L/14"] if ON_GPU else ["tiny"]
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
FLOAT8 = pytest.param(torch.float8_e4m3fn, marks=needs_gpu)
BATCHES = [1, 3, 4]


@pytest.fixture(scope="module", params=VARIANTS)
def model(request: pytest.FixtureRequest) -> XCLIP:
    """A model with random weights of unit effect on the test device."""
    with torch.device("meta"):
        model = XCLIP(config_of(request.param)).eval()
    return randomise_parameters(model.to_empty(device="cpu")).requires_grad_(False).to(DEVICE)


def video_for(model: XCLIP, batch: int, *, whole: bool = True) -> Tensor:
    """Decoded frames, or normalised ones."""
    config = model.config
    frames, side = config.frames, config.image_size
    if whole:
        return torch.randint(256, (batch, frames, side, side, 3), dtype=torch.uint8).to(DEVICE)
    return torch.randn(batch, frames, 3, side, side).to(DEVICE)


def texts_for(model: XCLIP) -> Tensor:
    return torch.randn(7, model.config.embed_dim).to(DEVICE)


def answers(engine: Engine, video: Tensor, texts: Tensor) -> list[Tensor]:
    features = engine.encode_video(video)
    found = [features.video, features.patches, engine.embed_video(video)]
    known = engine.texts_of(texts)
    found.append(engine.logits(features, known))
    # on a GPU the second call of each with this class set is one graph
    for call in (engine, engine, engine.classify, engine.classify):
        found.append(call(video, known))
    return copies(found)


@pytest.mark.parametrize("dtype", [*DTYPES, FLOAT8], ids=str)
@pytest.mark.parametrize("whole", [True, False], ids=["bytes", "normalised"])
@torch.inference_mode()
def test_parity(model: XCLIP, whole: bool, dtype: torch.dtype) -> None:
    video, texts = video_for(model, 2, whole=whole), texts_for(model)
    truth = model.double()
    exact = video if whole else video.double()
    features = truth.encode_video(exact)
    logits = truth.logits(features, texts.double())
    wanted = [features.video, features.patches, features.video, *[logits] * 3]
    engine = Engine(model.float(), dtype, DEVICE)
    # the softmax of these logits is theirs, and takes small errors for large ones
    found = answers(engine, video, texts)[: len(wanted)]
    names = "video", "patches", "embedding", "logits", "call", "its graph"
    if dtype == torch.float8_e4m3fn:
        for name, one, other in zip(names, found, wanted, strict=True):
            assert cosine_similarity(one.double(), other, dim=-1).min() >= 0.99, name
        return
    eager = copy.deepcopy(model).to(dtype)
    features = eager.encode_video(video if whole else video.to(dtype))
    logits = eager.logits(features, texts.to(dtype))
    same = [features.video, features.patches, features.video, *[logits] * 3]
    for name, one, plain, other in zip(names, found, same, wanted, strict=True):
        limit = max(TOLERANCES[dtype].model, 2 * relative_error(plain, other))
        assert_within(one, other, limit, what=f"engine {name}")


@needs_gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, FLOAT8], ids=str)
@pytest.mark.parametrize("batch", BATCHES)
def test_graphs_give_the_bits_of_plain_calls(model: XCLIP, batch: int, dtype: torch.dtype) -> None:
    engine, texts = Engine(model, dtype, DEVICE), texts_for(model)
    videos = [video_for(model, batch) for _ in range(3)]
    replayed = [answers(engine, video, texts) for video in videos]
    again = [answers(engine, video, texts) for video in videos]
    graphs, engine._graphs = engine._graphs, None
    plain = [answers(engine, video, texts) for video in videos]
    engine._graphs = graphs
    for index in range(3):
        assert equal(replayed[index], again[index])
        if batch in (1, 4):
            # the library's products of a padded batch may sum in another order
            assert equal(replayed[index], plain[index])


@needs_gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, FLOAT8], ids=str)
@pytest.mark.parametrize("batch", BATCHES)
def test_one_graph_of_video_and_classes_gives_the_bits_of_plain_calls(
    model: XCLIP, batch: int, dtype: torch.dtype
) -> None:
    engine = Engine(model, dtype, DEVICE)
    sets = [engine.texts_of(texts_for(model)) for _ in range(2)]
    videos = [video_for(model, batch) for _ in range(2)]

    def scores() -> list[Tensor]:
        return copies([call(video, texts) for call in (engine, engine.classify) for texts in sets for video in videos])

    first, replayed, again = scores(), scores(), scores()
    if batch in (1, 4):
        assert [len(engine._graphs[name]._graphs._values) for name in ("_logits", "_probabilities")] == [2, 2]
    graphs, engine._graphs = engine._graphs, None
    plain = scores()
    engine._graphs = graphs
    assert equal(replayed, again)
    if batch in (1, 4):
        assert equal(replayed, plain)
        assert equal(first, plain)


@needs_gpu
def test_a_graph_outlives_its_class_set(model: XCLIP) -> None:
    engine, video = Engine(model, torch.bfloat16, DEVICE), video_for(model, 2)
    texts = engine.texts_of(texts_for(model))
    wanted = [engine.classify(video, texts) for _ in range(2)]
    kept = copies(wanted)
    del texts
    others = [engine.texts_of(texts_for(model)) for _ in range(20)]
    for other in others:
        engine.classify(video, other)
    assert equal(wanted, kept)


def test_results_outlive_the_next_call(model: XCLIP) -> None:
    engine = Engine(model, torch.bfloat16 if ON_GPU else torch.float32, DEVICE)
    first = engine.encode_video(video_for(model, 2))
    kept = copies([first.video, first.patches])
    for _ in range(3):
        engine.encode_video(video_for(model, 2))
    assert equal([first.video, first.patches], kept)


def test_repeats_are_bit_equal(model: XCLIP) -> None:
    engine, texts = Engine(model, torch.bfloat16 if ON_GPU else torch.float32, DEVICE), texts_for(model)
    video = video_for(model, 2)
    first = answers(engine, video, texts)
    for _ in range(50 if ON_GPU else 2):
        assert equal(answers(engine, video, texts), first)


def test_threads(model: XCLIP) -> None:
    engine, texts = Engine(model, torch.bfloat16 if ON_GPU else torch.float32, DEVICE), texts_for(model)
    videos = [video_for(model, batch) for batch in (1, 2, 4, 1)]
    wanted = [answers(engine, video, texts) for video in videos]

    def work(index: int) -> bool:
        if not ON_GPU:
            return equal(answers(engine, videos[index], texts), wanted[index])
        # streams of their own: what one thread queues must not overtake the other's
        with torch.cuda.stream(torch.cuda.Stream()):
            torch.cuda.current_stream().wait_stream(torch.cuda.default_stream())
            found = answers(engine, videos[index], texts)
            torch.cuda.current_stream().synchronize()
        return equal(found, wanted[index])

    with ThreadPoolExecutor(4) as pool:
        assert all(pool.map(work, [index % 4 for index in range(40 if ON_GPU else 4)]))
