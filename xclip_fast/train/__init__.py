"""Training: the official recipe, its losses, and the loop that runs it on one process or many."""

from xclip_fast.train.config import TrainConfig, load_config
from xclip_fast.train.losses import info_nce, sigmoid_loss, smoothed_targets, soft_cross_entropy
from xclip_fast.train.mixing import Mixing, mix
from xclip_fast.train.optimizer import adamw, cosine_with_warmup, freeze_text, parameter_groups
from xclip_fast.train.recipes import RECIPES, Recipe
from xclip_fast.train.run import TrainResult, train

__all__ = [
    "RECIPES",
    "Mixing",
    "Recipe",
    "TrainConfig",
    "TrainResult",
    "adamw",
    "cosine_with_warmup",
    "freeze_text",
    "info_nce",
    "load_config",
    "mix",
    "parameter_groups",
    "sigmoid_loss",
    "smoothed_targets",
    "soft_cross_entropy",
    "train",
]
