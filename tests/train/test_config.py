"""Configurations: the official values, one line for each mistake, and every published setting."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from xclip_fast import VARIANTS, InputError
from xclip_fast.train import RECIPES, load_config

LEAST: dict[str, Any] = {"model": {"variant": "B/32"}, "data": {"train": "train.txt"}}


def test_defaults_are_the_official_recipe() -> None:
    config = load_config(LEAST)
    optimizer, loss = config.optimizer, config.loss
    assert (optimizer.lr, optimizer.new_factor, optimizer.least_lr) == (8e-6, 10, 0.01)
    assert (optimizer.betas, optimizer.eps, optimizer.weight_decay) == ((0.9, 0.98), 1e-8, 0.001)
    assert (optimizer.epochs, optimizer.warmup_epochs, optimizer.batch_size) == (30, 5, 256)
    assert (loss.kind, loss.label_smoothing, loss.mixup, loss.cutmix, loss.switch) == ("classes", 0.1, 0.8, 1.0, 0.5)
    assert (config.data.color_jitter, config.data.gray, config.data.flip) == (0.8, 0.2, 0.5)
    assert (config.model.text, config.model.pixels, config.model.frames) == ("frozen", "imagenet", 8)
    assert config.run.seed == 1024


# variant, frames, lr, epochs, batch, checkpointing, top-1: X-CLIP/configs and README of microsoft/VideoX
PUBLISHED = {
    "k400-b32-8": ("B/32", 8, 8e-6, 30, 256, False, 80.4),
    "k400-b32-16": ("B/32", 16, 8e-6, 30, 256, False, 81.1),
    "k400-b16-8": ("B/16", 8, 8e-6, 30, 256, False, 83.8),
    "k400-b16-16": ("B/16", 16, 8e-6, 30, 256, False, 84.7),
    "k400-l14-8": ("L/14", 8, 8e-6, 30, 256, False, 87.1),
    "k400-l14-336-16": ("L/14-336", 16, 8e-6, 30, 256, True, 87.7),
    "k600-b16-8": ("B/16", 8, 8e-6, 30, 256, False, 85.3),
    "k600-b16-16": ("B/16", 16, 8e-6, 30, 256, False, 85.8),
    "k600-l14-8": ("L/14", 8, 8e-6, 30, 256, False, 88.3),
    "hmdb51-2-shot": ("B/16", 32, 2e-6, 50, 64, False, 53.0),
    "hmdb51-4-shot": ("B/16", 32, 2e-6, 50, 64, False, 57.3),
    "hmdb51-8-shot": ("B/16", 32, 2e-6, 50, 64, False, 62.8),
    "hmdb51-16-shot": ("B/16", 32, 2e-6, 50, 64, False, 64.0),
    "ucf101-2-shot": ("B/16", 32, 2e-6, 50, 64, False, 76.4),
    "ucf101-4-shot": ("B/16", 32, 2e-6, 50, 64, False, 83.4),
    "ucf101-8-shot": ("B/16", 32, 2e-6, 50, 64, False, 88.3),
    "ucf101-16-shot": ("B/16", 32, 2e-6, 50, 64, False, 91.4),
    "zero-shot": ("B/16", 32, 8e-6, 10, 256, False, None),
}


@pytest.mark.parametrize("name", RECIPES)
def test_published_settings(name: str) -> None:
    config, recipe = load_config({"recipe": name, "data": {"train": "train.txt"}}), RECIPES[name]
    optimizer = config.optimizer
    found = config.model.variant, config.model.frames, optimizer.lr, optimizer.epochs, optimizer.batch_size
    assert (*found, config.model.gradient_checkpointing, recipe.top1) == PUBLISHED[name]
    assert recipe.source.startswith("microsoft/VideoX, X-CLIP/configs/")
    assert config.run.precision == "bfloat16"
    open_clip = pytest.importorskip("open_clip")
    # CLIP's own weights, which there are
    weights, _, tag = str(config.model.weights).partition("/")
    assert (weights, tag) in open_clip.list_pretrained()
    size = VARIANTS[str(config.model.variant)]
    sizes = open_clip.get_model_config(weights)["vision_cfg"]
    assert (sizes["width"], sizes["layers"], sizes["patch_size"]) == (
        size.vision_width,
        size.vision_layers,
        size.patch_size,
    )
    assert sizes["image_size"] == size.image_size


def test_every_published_setting_is_there() -> None:
    assert set(RECIPES) == set(PUBLISHED)


def test_a_file_goes_over_its_recipe_and_overrides_over_both(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text("recipe: hmdb51-2-shot\ndata: {train: few.txt}\noptimizer: {lr: 3e-6, accumulation: 2}\n")
    config = load_config(path, ["optimizer.lr=1e-5", "data.labels=my labels.csv", "run.trackers=[]"])
    assert (config.optimizer.lr, config.optimizer.accumulation, config.optimizer.epochs) == (1e-5, 2, 50)
    assert config.data.labels == "my labels.csv"
    assert config.run.trackers == []
    assert load_config(path).optimizer.lr == 3e-6


def over(section: str, **values: Any) -> dict[str, Any]:
    return {**LEAST, section: {**LEAST.get(section, {}), **values}}


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"data": {"train": "a"}}, "the configuration: model: must be given"),
        ({"model": {"variant": "B/32"}}, "the configuration: data: must be given"),
        ({**LEAST, "recipe": "k400"}, "unknown recipe 'k400': choose one of k400-b32-8"),
        ({**LEAST, "optimiser": {}}, "optimiser: there is no such key"),
        (over("optimizer", learning_rate=1), "optimizer.learning_rate: there is no such key"),
        (over("model", variant="B/33"), "model: unknown variant 'B/33': choose one of B/32"),
        (over("model", variant=None), "model: give a variant, weights or sizes"),
        (over("model", sizes={"frames": 8}), "model: give either sizes, or a variant and weights, not both"),
        (over("model", frames=0), "model.frames: input should be greater than or equal to 1, found 0"),
        (over("model", frames=True), "model: frames is no yes or no, found True"),
        (over("model", drop_path=1), "model.drop_path: input should be less than 1, found 1"),
        (over("optimizer", lr="fast"), "optimizer.lr: input should be a valid number"),
        (over("optimizer", lr=float("nan")), "optimizer.lr: input should be a finite number"),
        (over("optimizer", lr=float("inf")), "optimizer.lr: input should be a finite number"),
        (over("optimizer", ema=1), "optimizer.ema: input should be less than 1, found 1"),
        (over("loss", kind="triplet"), "loss.kind: input should be 'classes', 'info_nce' or 'sigmoid'"),
        (over("run", device="cuda:1"), "run.device: input should be 'auto', 'cpu' or 'cuda'"),
        (over("run", seed=-1), "run.seed: input should be greater than or equal to 0"),
        ({"model": {"sizes": {"width": 3}}, "data": {"train": "a"}}, "model: unknown configuration keys: width"),
    ],
)
def test_mistakes_are_named_in_a_line(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError) as error:
        load_config(settings)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"model: {variant: B/32}\nmodel: {variant: B/16}\n", "a key occurs twice"),
        (b"a: &x [1]\nb: *x\n", "aliases"),
        (b"a: !!python/object/apply:os.system [ls]\n", "is not YAML"),
        (b"[1, 2]\n", "must hold keys and values"),
        (b"", "must hold keys and values"),
        (b"a: [", "is not YAML"),
        (b"\xff\xfe", "is not YAML"),
        (b"a: 1\n" * 300_000, "larger than 1 MiB"),
        (b"[" * 100_000, "is not YAML"),
    ],
)
def test_files_that_are_no_configuration(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "run.yaml"
    path.write_bytes(content)
    with pytest.raises(InputError, match=message) as error:
        load_config(path)
    assert "\n" not in str(error.value)


def test_missing_files_and_bad_overrides() -> None:
    with pytest.raises(InputError, match=r"cannot read 'none.yaml': No such file"):
        load_config("none.yaml")
    for text in ("optimizer.lr", "=3", "optimizer..lr=3", "a b=3"):
        with pytest.raises(InputError, match="must be KEY=VALUE"):
            load_config(LEAST, [text])
    with pytest.raises(InputError, match="not YAML"):
        load_config(LEAST, ["optimizer.lr=["])
