"""Faults of data sets: what their files are read as, which archives are let in, and training batches."""

from __future__ import annotations

from benchmarks.mutants.fault import Fault, in_room

_lists = in_room("xclip_fast/data/lists.py", "tests/data_room/test_data_layouts.py")
_labels = in_room("xclip_fast/data/labels.py", "tests/data_room/test_data_layouts.py")
_dataset = in_room("xclip_fast/data/dataset.py", "tests/data_room/test_data_layouts.py")
_shards = in_room("xclip_fast/data/dataset.py", "tests/data_room/test_data_tars.py")
_tars = in_room("xclip_fast/data/tars.py", "tests/data_room/test_data_tars.py")
_members = in_room("xclip_fast/video/members.py", "tests/data_room/test_data_tars.py")
_augment = in_room("xclip_fast/data/augment.py", "tests/data_room/test_data_augment.py")
_clips = in_room("xclip_fast/data/clips.py", "tests/data_room/test_data_augment.py")
_batches = in_room("xclip_fast/data/batches.py", "tests/data_room/test_data_batches.py")
_jobs = in_room("xclip_fast/video/jobs.py", "tests/data_room/test_data_batches.py")

FAULTS: list[Fault] = [
    _lists("a path ends at its first space", "line.rsplit(None, 1)", "line.split(None, 1)"),
    _lists("videos may be there twice", "if not repeats and len(set(places)) < len(places):", "if False:"),
    _lists("a folder passes for a video", "if entry.is_file()}", "if True}"),
    _labels(
        "names in the order of the lines",
        "clean_labels(names[number] for number in range(len(names)))",
        "clean_labels(names.values())",
    ),
    _labels("ids may have gaps", "if gap is not None:", "if False:"),
    _dataset("classes may be empty", "if not empty_classes:", "if False:"),
    _dataset("folders that are links lead round", "        if real in seen:", "        if False:"),
    _shards("labels below zero", "if 0 <= label < len(self.names):", "if label < len(self.names):"),
    _tars("names may lead up", ' or ".." in parts', ""),
    _tars("links pass", "if info.issym() or info.islnk():", "if False:"),
    _tars(
        "devices pass",
        "if info.type not in (tarfile.REGTYPE, tarfile.AREGTYPE, tarfile.CONTTYPE) or info.issparse():",
        "if False:",
    ),
    _tars("names may be there twice", "if name in found:", "if False:"),
    _tars("a damaged header ends the archive", '.strip(b"\\0"):', '.strip(b"\\0") and False:'),
    _tars("headers of any length", "if size is None or not 0 <= size <= _MAX_HEADER:", "if False:"),
    _members(
        "another archive in the same place",
        "left = source.size if found.size == source.size else -1",
        "left = source.size",
    ),
    _augment(
        "one corner is left out",
        "_CORNERS = ((0, 0), (0, 2), (2, 0), (2, 2), (1, 1))",
        "_CORNERS = ((0, 0), (0, 2), (2, 0), (2, 2), (2, 2))",
    ),
    _augment("crops of any shape", "_MOST_STEPS = 1", "_MOST_STEPS = 3"),
    _augment("colours always in one order", "tuple(colors[place] for place in order)", "tuple(colors)"),
    _clips(
        "frames at the middle of each segment",
        "Sampling(frames, generator=np.random.default_rng([*seed, 0]))",
        "Sampling(frames)",
    ),
    _batches(
        "a replacement has the label it replaces",
        'yield _Choice(sample.source, {"seed": place}, sample.label)',
        'yield _Choice(sample.source, {"seed": place}, dataset.samples[draw.index].label)',
    ),
    _batches(
        "the list changes what comes next",
        "        if str(sample.source) not in quarantine.reasons:\n            yield",
        "        if True:\n            yield",
    ),
    _batches(
        "all epochs are the first",
        "place = [seed, draw.epoch, draw.place, attempt]",
        "place = [seed, 0, draw.place, attempt]",
    ),
    _batches(
        "memory of the slots",
        "batch.videos[place].copy_(answer.views[0])",
        "batch.videos = answer.views.expand_as(batch.videos)",
    ),
    _jobs("a killed process is its file's fault", "for _ in range(2):", "for _ in range(1):"),
]
