"""What a run needs before its first step: videos, class texts, and a model to train."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from xclip_fast.checkpoints import load_model
from xclip_fast.config import CLIP_MEAN, CLIP_STD, IMAGENET_MEAN, IMAGENET_STD, VARIANTS, XCLIPConfig
from xclip_fast.data import Augmentation, Dataset, normalise_names, read_dataset
from xclip_fast.errors import InputError
from xclip_fast.layers import CrossFrameBlock
from xclip_fast.model import XCLIP, create_model
from xclip_fast.text import apply_template, clean_labels, get_tokenizer
from xclip_fast.train.config import DataSection, ModelSection
from xclip_fast.train.optimizer import freeze_text

_PIXELS = {"imagenet": (IMAGENET_MEAN, IMAGENET_STD), "clip": (CLIP_MEAN, CLIP_STD)}


@dataclass(frozen=True)
class Videos:
    """The videos of a run.

    Attributes:
        train: those to learn from.
        validation: those to score, with the same classes, or None.
        names: the classes in words, as they are put into the template.
        texts: one sentence a class.
        augmentation: of the training clips.
    """

    train: Dataset
    validation: Dataset | None
    names: list[str]
    texts: list[str]
    augmentation: Augmentation

    def facts(self) -> dict[str, Any]:
        """What tells whether another run has the same videos: counts, and a digest of names and labels."""
        total = hashlib.sha256()
        for sample in self.train.samples:
            total.update(f"{sample.source}\0{sample.label}\n".encode("utf-8", "surrogateescape"))
        validation = 0 if self.validation is None else len(self.validation.samples)
        return {
            "videos": len(self.train.samples),
            "validation_videos": validation,
            "classes": self.names,
            "sha256": total.hexdigest(),
        }


def open_videos(section: DataSection) -> Videos:
    """Read the lists of a run; nothing is decoded.

    Raises:
        InputError: one of them cannot be used, or validation has other classes than training.
    """
    train = read_dataset(section.train, labels=section.labels, root=section.root)
    validation = None
    if section.validation is not None:
        root = section.validation_root or section.root
        validation = read_dataset(section.validation, labels=section.labels, root=root, empty_classes=True)
        if validation.classes != train.classes:
            raise InputError(
                f"validation {section.validation!r} has {len(validation.classes)} classes, training has "
                f"{len(train.classes)}, and they must be the same: give both one labels file"
            )
    names = clean_labels(normalise_names(train.classes, split_camel_case=section.split_camel_case))
    texts = apply_template(names, section.template)
    augmentation = Augmentation(
        flip=section.flip, color_jitter=section.color_jitter, gray=section.gray, multi_scale=section.multi_scale
    )
    return Videos(train, validation, names, texts, augmentation)


def open_model(section: ModelSection, seed: int) -> XCLIP:
    """The model of a run on the CPU in float32 and training mode; what is random comes from the seed.

    Raises:
        InputError: the weights cannot be used, or are of another variant than was asked for.
    """
    if section.weights is None:
        source: str | XCLIPConfig = section.variant or XCLIPConfig.from_dict(section.sizes or {})
        model = create_model(source, frames=section.frames, seed=seed)
    else:
        with torch.random.fork_rng(devices=[]):
            # the parts that X-CLIP adds to CLIP start random
            torch.default_generator.manual_seed(seed)
            model = load_model(section.weights, frames=section.frames, dtype=torch.float32)
        _check_variant(model.config, section)
    if section.pixels != "weights":
        mean, std = _PIXELS[section.pixels]
        model.config = replace(model.config, pixel_mean=mean, pixel_std=std)
    if section.text == "frozen":
        freeze_text(model)
    for block in model.visual.transformer.resblocks if section.drop_path else ():
        assert isinstance(block, CrossFrameBlock)
        block.drop_path = section.drop_path
    if section.gradient_checkpointing:
        model.gradient_checkpointing_enable()
    return model.train()


def tokens_of(model: XCLIP, texts: list[str]) -> Tensor:
    """Token ids (K, L) of the class texts."""
    return get_tokenizer(model.config)(texts, model.config.context_length)


def _check_variant(config: XCLIPConfig, section: ModelSection) -> None:
    if section.variant is None:
        return
    wanted = VARIANTS[section.variant]
    for field in ("image_size", "patch_size", "vision_width", "vision_layers", "embed_dim"):
        if getattr(config, field) != getattr(wanted, field):
            raise InputError(
                f"{section.weights} has {field} {getattr(config, field)}, and {section.variant} has "
                f"{getattr(wanted, field)}: give the weights of that variant, or leave model.variant out"
            )
