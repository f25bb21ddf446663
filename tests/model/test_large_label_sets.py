"""Large label sets: the same logits in chunks, exact ranking, and memory that does not grow with the product."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from typing import Any

import pytest
import torch
from buffers import Largest
from configs import LABELS
from numerics import TOLERANCES, assert_within, randomise_parameters

from xclip_fast import VARIANTS, create_model, model, pipeline, reference
from xclip_fast.classes import CHUNK_BYTES, class_chunks, class_logits
from xclip_fast.reference import VideoFeatures
from xclip_fast.text import get_tokenizer

CONFIG = replace(LABELS, context_length=40)


def random_features(videos: int, dtype: torch.dtype = torch.float32, width: int = 64, patches: int = 4) -> Any:
    return VideoFeatures(torch.randn(videos, width, dtype=dtype), torch.randn(videos, patches, width, dtype=dtype))


@pytest.mark.parametrize(("kinds", "videos"), [(0, 1), (1, 1), (7, 1), (7, 3), (8, 2), (30, 0), (5, 10**6)])
def test_chunks_cover_the_classes_once_and_in_order(kinds: int, videos: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(CHUNK_BYTES, "cpu", 64 * 4 * 16 * 6)  # six rows
    chunks = list(class_chunks(kinds, videos, 64, torch.device("cpu")))
    assert [place for chunk in chunks for place in range(kinds)[chunk]] == list(range(kinds))
    assert len(chunks) == max(1, -(-kinds // max(1, 6 // max(1, videos))))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("kind", [reference.XCLIP, model.XCLIP])
@pytest.mark.parametrize("size", [1, 6, 45])
def test_chunks_change_nothing_but_rounding(
    dtype: torch.dtype, kind: type, size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(CHUNK_BYTES, "cpu", 64 * 4 * 16 * 12)
    made = randomise_parameters(kind(CONFIG)).to(dtype).eval()
    features, text = random_features(2, dtype), torch.randn(size, 64, dtype=dtype)
    with torch.no_grad():
        found, whole = class_logits(made, features, text), made.logits(features, text)
    assert found.shape == (2, size)
    assert found.dtype == dtype
    assert_within(found, whole, TOLERANCES[dtype].model, what="classes in chunks")


def test_the_best_are_those_of_all_classes(monkeypatch: pytest.MonkeyPatch) -> None:
    made = randomise_parameters(create_model(CONFIG, seed=0))
    labels = [f"label {number}" for number in range(300)]
    views = torch.randint(256, (5, 2, 32, 32, 3), dtype=torch.uint8)
    whole = pipeline.Classifier(made, labels, get_tokenizer(CONFIG)).top(views, 20)
    calls = []
    logits = made.logits
    made.logits = lambda features, text: calls.append(text.shape) or logits(features, text)
    monkeypatch.setitem(CHUNK_BYTES, "cpu", 64 * 4 * 16 * 28)
    parts = pipeline.Classifier(made, labels, get_tokenizer(CONFIG)).top(views, 20)
    assert len(calls) > 40
    assert [one.index for one in parts] == [one.index for one in whole]
    assert [one.probability for one in parts] == pytest.approx([one.probability for one in whole], rel=1e-4)


@pytest.mark.parametrize(("variant", "videos", "kinds"), [("B/16", 1, 100_000), ("L/14", 12, 3000)])
def test_no_tensor_of_videos_times_classes_times_width(variant: str, videos: int, kinds: int) -> None:
    with torch.device("meta"):
        made = model.XCLIP(VARIANTS[variant]).eval()
        width = made.config.embed_dim
        features = random_features(videos, width=width, patches=made.config.patches)
        text = torch.empty(kinds, width)
    with torch.no_grad(), Largest(text) as seen:
        assert class_logits(made, features, text).shape == (videos, kinds)
    assert seen.largest <= max(CHUNK_BYTES["cpu"], 4 * videos * kinds)
    assert seen.largest < 4 * videos * kinds * width / 2
    # the bound can be broken: all classes at once do
    with torch.no_grad(), Largest(text) as seen:
        made.logits(features, text)
    assert seen.largest >= 4 * videos * kinds * width


SCRIPT = """
import resource, sys
import torch
from xclip_fast import Engine, XCLIPConfig, create_model
from xclip_fast.classes import class_logits
from xclip_fast.reference import VideoFeatures

def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024

torch.set_num_threads(1)
model = create_model(XCLIPConfig(**eval(sys.argv[1])), seed=0)
engine = Engine(model)
features = VideoFeatures(torch.randn(1, 64), torch.randn(1, 4, 64))
text = torch.randn(100_000, 64)
texts = engine.encode_texts(torch.tensor([[512, 7, 513]]))
few, many = (
    texts._replace(features=texts.features.repeat(times, 1), query=texts.query.repeat(times, 1))
    for times in (1000, 100_000)
)
with torch.inference_mode():
    class_logits(model, features, text[:1000]), engine.logits(features, few)
    before = peak()
    class_logits(model, features, text).softmax(-1)
    first = peak()
    engine.logits(features, many)
    second = peak()
    print(first - before, second - first)
"""


@pytest.mark.slow
def test_the_memory_of_a_process_stays_bounded() -> None:
    sizes = {key: value for key, value in CONFIG.to_dict().items() if not key.startswith("pixel")}
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, repr(sizes)], capture_output=True, text=True, timeout=120, check=True
    )
    grown = [int(number) for number in done.stdout.split()]
    # all classes at once take 25 MiB for each of a dozen buffers, and 100 for the hidden layer
    assert max(grown) < 120, grown
