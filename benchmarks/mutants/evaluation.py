"""Faults of evaluation: its figures, its lists, and the scores of files."""

from __future__ import annotations

from benchmarks.mutants.fault import Fault, in_room

_metrics = in_room("xclip_fast/evaluate/metrics.py", "tests/evaluate/test_metrics.py")
_ranks = in_room("xclip_fast/evaluate/ranks.py", "tests/evaluate/test_metrics.py")
_difference = in_room("xclip_fast/evaluate/difference.py", "tests/evaluate/test_new_classes.py")
_splits = in_room("xclip_fast/evaluate/splits.py", "tests/evaluate/test_splits.py")
_scoring = in_room("xclip_fast/evaluate/scoring.py", "tests/evaluate/test_scoring.py")
_results = in_room("xclip_fast/evaluate/results.py", "tests/evaluate/test_cli_evaluate.py")
_files = in_room("xclip_fast/pipeline", "tests/evaluate/test_scoring.py", "tests/cli/test_embed_files.py")

FAULTS: list[Fault] = [
    _metrics("interval not drawn to the middle", "centre = share + squared / (2 * total)", "centre = share"),
    _metrics("spread of a population", "found.std(ddof=1)", "found.std(ddof=0)"),
    _metrics("ties go to the last class", 'kind="stable")[:, :count]', 'kind="stable")[:, ::1][:, -count:]'),
    _metrics(
        "rows and columns of confusions exchanged",
        "cells = given * classes + found.argmax(axis=1)",
        "cells = found.argmax(axis=1) * classes + given",
    ),
    _metrics(
        "classes without videos are wrong",
        "there = videos > 0",
        "there = videos >= 0\n    videos = np.maximum(videos, 1)",
    ),
    _metrics("an edge belongs to the bin above", 'side="left") - 1', 'side="right") - 1'),
    _metrics("bins weigh the same", "gap += videos / len(given) *", "gap += 1 / bins *"),
    _metrics(
        "scores that are no number pass",
        'if not np.isfinite(found).all():\n        raise ValueError(f"scores hold',
        'if False:\n        raise ValueError(f"scores hold',
    ),
    _ranks(
        "ties of captions are in favour",
        "caption_ranks = (found >= of_caption).sum(axis=0)",
        "caption_ranks = 1 + (found > of_caption).sum(axis=0)",
    ),
    _ranks("ties of videos are in favour", "(found >= best[:, None]) & ~own", "(found > best[:, None]) & ~own"),
    _ranks("own captions are rivals", "(found >= best[:, None]) & ~own", "(found >= best[:, None])"),
    _difference("parentheses tell nothing apart", " and (bare[0] == one) != (bare[1] == other)", ""),
    _difference("one word in common is enough", "_LEAST_COMMON = 2", "_LEAST_COMMON = 1"),
    _difference("an older name is taken twice", "                gone.remove(old)\n", ""),
    _difference(
        "every draw is the first", 'random.Random(f"classes {seed} {number}")', 'random.Random(f"classes {seed} 0")'
    ),
    _splits(
        "few shots are not nested",
        "sample for group in drawn for sample in group[:count]",
        "sample for group in drawn for sample in random.Random(count).sample(group, count)",
    ),
    _splits(
        "few shots depend on the order of the list",
        "ordered = sorted(group, key=lambda sample: str(sample.source))",
        "ordered = list(group)",
    ),
    _splits(
        "every class is drawn alike", 'random.Random(f"few-shot {seed} {name}")', 'random.Random(f"few-shot {seed}")'
    ),
    _splits("the base is the rare half", "key=lambda place: -counts[place]", "key=lambda place: counts[place]"),
    _splits("what is there is overwritten", "if not force:", "if False:"),
    _scoring("batches go on past a group", "if place in last)", "if place in last and False)"),
    _scoring("rows stay in the order of the processes", "order = np.argsort(where)", "order = np.arange(len(where))"),
    _results(
        "labels are those of the first videos",
        "dataset.samples[place].label for place in scored.places",
        "dataset.samples[place].label for place in range(len(scored.places))",
    ),
    _files(
        "logits are averaged in place of probabilities",
        "return found if logits else found.softmax(dim=-1)",
        "return found",
    ),
    _files(
        "the engine's logits are taken for probabilities",
        "model(views, texts) if logits else model.classify(views, texts)",
        "model(views, texts)",
    ),
    _files("only the last view counts", "check_finite(torch.stack(views).mean(dim=0))", "check_finite(views[-1])"),
]
