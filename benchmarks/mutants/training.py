"""Faults of training: its recipe, its losses, its batches, what a stopped run goes on from."""

from __future__ import annotations

from benchmarks.mutants.fault import Fault, in_room

_optimizer = in_room("xclip_fast/train/optimizer.py", "tests/train/test_optimizer.py")
_losses = in_room("xclip_fast/train/losses.py", "tests/train/test_losses.py", "tests/train/test_train_processes.py")
_mixing = in_room("xclip_fast/train/mixing.py", "tests/train/test_mixing.py")
_plan = in_room("xclip_fast/train/plan.py", "tests/train/test_plan.py")
_state = in_room("xclip_fast/train/state.py", "tests/train/test_state.py")
_config = in_room("xclip_fast/train/config.py", "tests/train/test_config.py")
_run = in_room("xclip_fast/train", "tests/train/test_train_run.py", "tests/train/test_train_processes.py")

FAULTS: list[Fault] = [
    _optimizer(
        "MIT learns as CLIP does", 'NEW_PARTS = ("message_", "mit", "prompts")', 'NEW_PARTS = ("message_", "prompts")'
    ),
    _optimizer("positions decay", " or _NO_DECAY in name", ""),
    _optimizer("vectors decay", "parameter.ndim <= 1 or ", ""),
    _optimizer("text that is frozen learns", "parameter.requires_grad_(False)", "parameter.requires_grad_(True)"),
    _optimizer("first rate of zero", "made = step + 1\n", "made = step\n"),
    _optimizer(
        "cosine begins after the warm-up", "pi * min(made, steps) / steps", "pi * (min(made, steps) - warmup) / steps"
    ),
    _losses(
        "smoothing leaves rows short",
        "torch.full((len(labels), classes), smoothing / classes",
        "torch.full((len(labels), classes), 0.0",
    ),
    _losses(
        "one direction alone",
        "(soft_cross_entropy(rows, targets) + soft_cross_entropy(columns, targets)) / 2",
        "soft_cross_entropy(rows, targets)",
    ),
    _losses(
        "texts of one label are negatives",
        "return labels[:, None] == gather(labels)",
        "return labels[:, None] == gather(labels) - gather(labels) + torch.arange(rows.shape[1])",
    ),
    _losses("columns of the first process", "first = sum(_sizes(rows)[: distributed.get_rank()])", "first = 0"),
    _losses("gathered rows keep their padding", "part[:size] for part, size", "part for part, size"),
    _mixing("Mixup of one only", "swapped = videos[pair].flip(0)", "swapped = videos[pair]"),
    _mixing("share of the asked for box", "share = 1 - area / (videos.shape[2] * videos.shape[3])", "share = share"),
    _mixing("always Mixup", "cuts = rng.random() < (", "cuts = rng.random() < 0 * ("),
    _mixing("a pair by the place in the batch", "[_STREAM, *seeds[first]]", "[_STREAM, first]"),
    _plan(
        "the last batch is dropped", "return -(-self.videos // self.batch)", "return max(1, self.videos // self.batch)"
    ),
    _plan("each epoch in one order", "[_STREAM, seed, epoch]", "[_STREAM, seed, 0]"),
    _plan("processes share the same videos", "range(process * share, rounds", "range(0, rounds"),
    _state("sums are not compared", "listed.get(name) != found.get(name)", "name not in found"),
    _state("the oldest wins", "reverse=True)", "reverse=False)"),
    _state("all checkpoints stay", "_found(folder)[keep:]", "_found(folder)[len(_found(folder)) :]"),
    _state("a step by its name alone", 'or state.get("step") != step ', ""),
    _config("keys that repeat pass", "if len(found) != len(node.value):", "if False:"),
    _config(
        "yes is a number",
        "if isinstance(value, bool) and field is not None and field.annotation is not bool:",
        "if False:",
    ),
    _config("aliases are read", "if self.check_event(yaml.AliasEvent):", "if False:"),
    _run(
        "a batch counts as whole",
        "(each.sum() * (self.processes / size)).backward()",
        "(each.sum() * (self.processes / self.plan.batch)).backward()",
    ),
    _run("gradients are not of all processes", "(self.processes / size)).backward()", "(1 / size)).backward()"),
    _run("videos that do not count", "found.video[:count], found.patches[:count]", "found.video, found.patches"),
    _run(
        "averages are not restored",
        'value.copy_(like(trainer[f"average/{name}"], value))',
        "pass",
        "tests/train/test_killed_runs.py",
    ),
    _run(
        "moments are not restored",
        'for key in ("step", "exp_avg", "exp_avg_sq"):',
        "for key in ():",
        "tests/train/test_killed_runs.py",
    ),
    _run(
        "random numbers go on from where they were",
        "torch.manual_seed(_seed_of(self.settings.run.seed, step, self.rank))",
        "pass",
        "tests/train/test_killed_runs.py",
    ),
    _run("lines of an earlier try stay", 'if line.get("step", 0) <= step]', "]", "tests/train/test_killed_runs.py"),
    _run("a loss that is no number goes on", "if not np.isfinite(self.loss):", "if False:"),
    _run("another run's checkpoint is taken", "    _check_same(kept, settings, videos)\n    with", "    with"),
    _run("a run is written over", "if (folder / CHECKPOINTS).exists() or (folder / WEIGHTS).exists():", "if False:"),
    _run("weights as they are instead of their average", "values.get(name, value)", "value"),
    _run(
        "gradients are not averaged over shards",
        "for parameter in scored.parameters(recurse=False):",
        "for parameter in ():",
    ),
]
