"""Training: the official recipe, its losses, and the loop that runs it on one process or many."""

from xclip_fast.train.losses import info_nce, sigmoid_loss, smoothed_targets, soft_cross_entropy
from xclip_fast.train.optimizer import adamw, cosine_with_warmup, freeze_text, parameter_groups

__all__ = [
    "adamw",
    "cosine_with_warmup",
    "freeze_text",
    "info_nce",
    "parameter_groups",
    "sigmoid_loss",
    "smoothed_targets",
    "soft_cross_entropy",
]
