"""What a training run is told: a YAML file, checked whole before anything is loaded."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from xclip_fast.config import VARIANTS, XCLIPConfig
from xclip_fast.errors import InputError, one_line
from xclip_fast.train.recipes import RECIPES

_LARGEST_FILE = 1 << 20

Positive = Annotated[int, Field(ge=1)]
Share = Annotated[float, Field(ge=0, le=1, allow_inf_nan=False)]
NotNegative = Annotated[float, Field(ge=0, allow_inf_nan=False)]
AboveZero = Annotated[float, Field(gt=0, allow_inf_nan=False)]


class _Section(BaseModel):
    # numbers may be text: YAML 1.1 reads 8e-6 so, for the want of a point
    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=())

    @model_validator(mode="before")
    @classmethod
    def _no_truth_for_numbers(cls, values: Any) -> Any:
        if isinstance(values, dict):
            for name, value in values.items():
                field = cls.model_fields.get(name)
                if isinstance(value, bool) and field is not None and field.annotation is not bool:
                    raise ValueError(f"{name} is no yes or no, found {value}")
        return values


class ModelSection(_Section):
    """What is trained, and from which weights.

    Attributes:
        variant: "B/32", "B/16", "L/14", "L/14-336"; left out where ``weights`` or ``sizes`` say it.
        sizes: fields of ``XCLIPConfig``, for a model of other sizes from random weights.
        weights: what ``load_model`` takes: CLIP weights fill the towers, X-CLIP weights all of it; without, random.
        frames: of a clip, T.
        text: "frozen" as in the official recipe (``logit_scale`` too), or "tuned".
        drop_path: probability of dropping a residual branch of a video.
        gradient_checkpointing: keep the inputs of the blocks alone, and compute them again in the backward pass.
        pixels: "imagenet", the mean and deviation the official code trains with, "clip", or "weights" for those that
            come with the weights.

    Example:
        >>> from xclip_fast.train.config import ModelSection
        >>> ModelSection(variant="B/16", frames=32).text
        'frozen'
    """

    variant: str | None = None
    sizes: dict[str, Any] | None = None
    weights: str | None = None
    frames: Positive = 8
    text: Literal["frozen", "tuned"] = "frozen"
    drop_path: Annotated[float, Field(ge=0, lt=1)] = 0.0
    gradient_checkpointing: bool = False
    pixels: Literal["imagenet", "clip", "weights"] = "imagenet"

    @model_validator(mode="after")
    def _one_source(self) -> ModelSection:
        if self.variant is not None and self.variant not in VARIANTS:
            raise ValueError(f"unknown variant {self.variant!r}: choose one of {', '.join(VARIANTS)}")
        if self.sizes is not None:
            if self.variant or self.weights:
                raise ValueError("give either sizes, or a variant and weights, not both")
            XCLIPConfig.from_dict({**self.sizes, "frames": self.frames})
        elif not self.variant and not self.weights:
            raise ValueError("give a variant, weights or sizes")
        return self


class DataSection(_Section):
    """The videos, as ``read_dataset`` takes them, and what is done to their frames.

    Attributes:
        train, validation: list file, folder of class folders, or tar shards. Without ``validation`` nothing is scored.
        root, validation_root: what paths in a list file are relative to.
        labels: CSV file ``id,name`` of the classes.
        template: the sentence that a class name is put into, at its ``{}``.
        split_camel_case: "ApplyEyeMakeup" becomes "apply eye makeup".
        flip, color_jitter, gray, multi_scale: probabilities of the augmentations, and whether crops have several
            scales, as in ``Augmentation``. Turn ``flip`` off where left and right are different classes.
        workers: processes that decode; by default as many as there are cores, at most 8.
        timeout: seconds after which a video is given up.

    Example:
        >>> from xclip_fast.train.config import DataSection
        >>> DataSection(train="train.txt", labels="labels.csv").flip
        0.5
    """

    train: str | list[str]
    validation: str | list[str] | None = None
    root: str | None = None
    validation_root: str | None = None
    labels: str | None = None
    template: str = "{}"
    split_camel_case: bool = True
    flip: Share = 0.5
    color_jitter: Share = 0.8
    gray: Share = 0.2
    multi_scale: bool = True
    workers: Annotated[int, Field(ge=0)] | None = None
    timeout: AboveZero = 300.0


class OptimizerSection(_Section):
    """AdamW with a cosine, as the official recipe has it.

    Attributes:
        lr: highest learning rate of what CLIP has; ``new_factor`` times as much for what X-CLIP adds.
        least_lr: lowest rate of every group, over ``lr``.
        betas, eps, weight_decay: of AdamW.
        epochs, warmup_epochs: of the run, and those in which the rate rises from 0.
        batch_size: videos in a step, over all processes and rounds of accumulation.
        accumulation: rounds in which a process computes its share of a batch.
        clip_norm: longest gradient; without, as it is.
        ema: decay of an exponential moving average of the weights, which is then what is scored and saved.

    Example:
        >>> from xclip_fast.train.config import OptimizerSection
        >>> OptimizerSection().batch_size
        256
    """

    lr: AboveZero = 8e-6
    new_factor: AboveZero = 10.0
    least_lr: Share = 0.01
    betas: tuple[Share, Share] = (0.9, 0.98)
    eps: AboveZero = 1e-8
    weight_decay: NotNegative = 0.001
    epochs: Positive = 30
    warmup_epochs: NotNegative = 5
    batch_size: Positive = 256
    accumulation: Positive = 1
    clip_norm: AboveZero | None = None
    ema: Annotated[float, Field(gt=0, lt=1)] | None = None


class LossSection(_Section):
    """What is minimised.

    Attributes:
        kind: "classes", soft-target cross-entropy over the class texts (the paper's); "info_nce" or "sigmoid", each
            video against the texts of the whole batch.
        label_smoothing, mixup, cutmix, switch: as in ``smoothed_targets`` and ``Mixing``; for "classes" alone.

    Example:
        >>> from xclip_fast.train.config import LossSection
        >>> LossSection().kind
        'classes'
    """

    kind: Literal["classes", "info_nce", "sigmoid"] = "classes"
    label_smoothing: Share = 0.1
    mixup: NotNegative = 0.8
    cutmix: NotNegative = 1.0
    switch: Share = 0.5


class RunSection(_Section):
    """How it runs, and what it leaves.

    Attributes:
        seed: of order, clips, mixing and random weights.
        device: "auto", "cpu" or "cuda"; which GPU, CUDA_VISIBLE_DEVICES or the launcher says.
        precision: "float32", or "bfloat16" for autocast.
        engine: of several processes: "ddp", or "fsdp2" for sharded weights.
        checkpoint_steps: steps between checkpoints; by default one an epoch.
        keep: newest checkpoints that stay.
        trackers: of accelerate, such as "tensorboard"; with none there is the log file alone.

    Example:
        >>> from xclip_fast.train.config import RunSection
        >>> RunSection().precision
        'float32'
    """

    seed: Annotated[int, Field(ge=0, lt=2**31)] = 1024
    device: Literal["auto", "cpu", "cuda"] = "auto"
    precision: Literal["float32", "bfloat16"] = "float32"
    engine: Literal["ddp", "fsdp2"] = "ddp"
    checkpoint_steps: Positive | None = None
    keep: Positive = 2
    trackers: list[str] = ["tensorboard"]


class TrainConfig(_Section):
    """A training run. Defaults are the official recipe; ``recipe`` names one of ``RECIPES`` to start from.

    Raises:
        pydantic.ValidationError: a key is unknown, or a value out of range. ``load_config`` says so in one line.

    Example:
        >>> from xclip_fast.train import TrainConfig
        >>> config = TrainConfig.model_validate({"model": {"variant": "B/32"}, "data": {"train": "train.txt"}})
        >>> config.optimizer.lr, config.loss.kind
        (8e-06, 'classes')
    """

    recipe: str | None = None
    model: ModelSection
    data: DataSection
    optimizer: OptimizerSection = OptimizerSection()
    loss: LossSection = LossSection()
    run: RunSection = RunSection()


def load_config(source: str | os.PathLike[str] | dict[str, Any], overrides: Sequence[str] = ()) -> TrainConfig:
    """A training run from a YAML file, or from the dictionary it would hold.

    What the file says goes over what its ``recipe`` says, key by key, and ``overrides`` over both. Relative paths are
    relative to where the command runs.

    Args:
        source: the file, or the dictionary.
        overrides: such as "optimizer.lr=1e-5"; the value is YAML.

    Raises:
        InputError: the file cannot be read, a key is unknown, or a value out of range; the message names the key.

    Example:
        >>> from pathlib import Path
        >>> from xclip_fast.train import load_config
        >>> _ = Path("run.yaml").write_text("recipe: k400-b16-8\\ndata: {train: train.txt, labels: labels.csv}")
        >>> load_config("run.yaml").model.frames
        8
    """
    where = "the configuration"
    if not isinstance(source, dict):
        where = str(os.fspath(source))
        source = _read(Path(source))
    for text in overrides:
        source = _over(source, _override(text))
    name = source.get("recipe")
    if name is not None and name not in RECIPES:
        raise InputError(f"{where}: unknown recipe {name!r}: choose one of {', '.join(RECIPES)}")
    settings = source if name is None else _over(RECIPES[name].settings, source)
    try:
        return TrainConfig.model_validate(settings)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        key = ".".join(map(str, first["loc"])) or "the whole"
        more = f" (and {error.error_count() - 1} more)" if error.error_count() > 1 else ""
        raise InputError(f"{where}: {key}: {_reason(first)}{more}") from None


def _override(text: str) -> dict[str, Any]:
    key, sign, value = text.partition("=")
    if not sign or not all(part.isidentifier() for part in key.split(".")):
        raise InputError(f"an override must be KEY=VALUE such as optimizer.lr=1e-5, found {text!r:.60}")
    try:
        found: Any = yaml.load(value, _NoRepeats)
    except yaml.YAMLError as error:
        raise InputError(f"the value of {key} is not YAML: {one_line(error)}") from None
    for part in reversed(key.split(".")):
        found = {part: found}
    return dict(found)


def _reason(error: Any) -> str:
    if error["type"] == "extra_forbidden":
        return "there is no such key: see docs/start/train.md for those there are"
    if error["type"] == "missing":
        return "must be given"
    message = error["msg"].removeprefix("Value error, ")
    if error["type"] == "value_error":
        return one_line(message)
    return one_line(f"{message[:1].lower()}{message[1:]}, found {error['input']!r}")


def _read(path: Path) -> dict[str, Any]:
    try:
        with path.open("rb") as file:
            content = file.read(_LARGEST_FILE + 1)
    except OSError as error:
        raise InputError(f"cannot read {str(path)!r}: {error.strerror}: give the YAML file of a run") from None
    if len(content) > _LARGEST_FILE:
        raise InputError(f"{str(path)!r} is larger than {_LARGEST_FILE >> 20} MiB: give the YAML file of a run")
    try:
        found = yaml.load(content.decode("utf-8-sig"), _NoRepeats)
    except (yaml.YAMLError, UnicodeDecodeError, RecursionError, ValueError) as error:
        raise InputError(f"{str(path)!r} is not YAML: {one_line(error)}") from None
    if not isinstance(found, dict) or not all(isinstance(key, str) for key in found):
        raise InputError(f"{str(path)!r} must hold keys and values, such as 'recipe: k400-b16-8'")
    return found


class _NoRepeats(yaml.SafeLoader):
    """YAML without anchors that blow up and without keys that silently win over earlier ones."""

    def compose_node(self, parent: Any, index: Any) -> Any:
        if self.check_event(yaml.AliasEvent):
            raise yaml.YAMLError("aliases (*name) are not read: write the value out")
        return super().compose_node(parent, index)

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        found: dict[Any, Any] = super().construct_mapping(node, deep)
        if len(found) != len(node.value):
            raise yaml.YAMLError(f"a key occurs twice in line {node.start_mark.line + 1} and after")
        return found


def _over(below: dict[str, Any], above: dict[str, Any]) -> dict[str, Any]:
    """The settings of ``above``, and of ``below`` where ``above`` says nothing."""
    merged = dict(below)
    for key, value in above.items():
        under = merged.get(key)
        merged[key] = _over(under, value) if isinstance(under, dict) and isinstance(value, dict) else value
    return merged
