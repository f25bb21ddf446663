"""Faults of what the engine answers, tells and refuses, and of its graphs and streams."""

from __future__ import annotations

from benchmarks.mutants.engine import CONTRACT, ENGINE, GRAPHS, PRECISION, REWRITES, SETS, TEXTS
from benchmarks.mutants.fault import Fault

FAULTS: list[Fault] = [
    ENGINE("softmax over the videos", "logits.softmax(dim=-1)", "logits.softmax(dim=0)", CONTRACT),
    ENGINE("autocast reaches the engine", "torch.autocast(self.device.type, enabled=False)", "nullcontext()", CONTRACT),
    ENGINE("texts see what follows", "is_causal=True", "is_causal=False", REWRITES),
    ENGINE(
        "error told of the best clip",
        "cosine_similarity(found.video.float(), truth.video, dim=-1).min()",
        "cosine_similarity(found.video.float(), truth.video, dim=-1).max()",
        PRECISION,
    ),
    ENGINE(
        "error told beside the wrong norm",
        "(found.video.float() - truth.video).norm() / truth.video.norm()",
        "(found.video.float() - truth.video).norm() / truth.video.norm() ** 2",
        PRECISION,
    ),
    ENGINE(
        "features of weights kept in half precision stay wide",
        "features if self._packing.stored is None else features.to(self._packing.stored)",
        "features",
        "tests/engine/test_engine_processor.py",
    ),
    ENGINE("class sets of any engine are taken", "if texts.engine != self._heads.name:", "if not texts.engine:", TEXTS),
    ENGINE("a hook on a module is not seen", "if oddity is not None:", "if False:", CONTRACT),
    ENGINE("the side does not wait for the main stream", "self.local.stream.wait_stream(main)\n", "\n", GRAPHS),
    ENGINE(
        "the main stream does not wait for the side",
        "main.wait_stream(self.local.stream)\n        # in a graph",
        "# in a graph",
        GRAPHS,
    ),
    ENGINE("memory of the side's result may be reused", "result.record_stream(main)", "pass", GRAPHS),
    ENGINE(
        "results of a graph are its own buffers",
        "results = [x.clone() for x in self.output]",
        "results = list(self.output)",
        GRAPHS,
    ),
    ENGINE("a graph shares the memory of its example", "self.input = video.clone()", "self.input = video", GRAPHS),
    ENGINE("a padded batch gives its padding too", "return [x[: len(video)] for x in", "return [x[:] for x in", GRAPHS),
    ENGINE("a padded batch is zeros", "whole = video[index]", "whole = torch.zeros_like(video[index])", GRAPHS),
    ENGINE("a bucket of twice the batch", "(batch - 1).bit_length()", "batch.bit_length()", GRAPHS),
    ENGINE(
        "memory that ran out is asked for again", "(weakref.ref(texts[0]), -inf)", "(weakref.ref(texts[0]), 0)", SETS
    ),
    ENGINE(
        "pairs of a graph are those of the batch",
        "if bucket(len(video)) * len(texts[0]) > MAX_PAIRS:",
        "if len(video) * len(texts[0]) > MAX_PAIRS:",
        SETS,
    ),
]
