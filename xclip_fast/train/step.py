"""One share of a batch: videos and class texts to a loss for each video, as a module that engines can wrap."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from xclip_fast.reference import VideoFeatures
from xclip_fast.train.losses import gather, info_nce_of_logits, sigmoid_of_logits, soft_cross_entropy

SIGLIP_BIAS = -10.0


class Scored(nn.Module):
    """A model with what its training adds: scores of videos, of any number including none.

    Args:
        model: what ``create_model`` or ``load_model`` returns.
        kind: of the loss, as in ``LossSection``.

    Example:
        >>> import torch, xclip_fast
        >>> from xclip_fast.train.step import Scored
        >>> config = xclip_fast.XCLIPConfig(image_size=32, vision_width=64, vision_layers=1, text_width=64)
        >>> scored = Scored(xclip_fast.create_model(config), "classes")
        >>> video, texts = torch.zeros(2, 8, 32, 32, 3, dtype=torch.uint8), torch.randn(5, 512)
        >>> scored(video, texts, count=2).shape
        torch.Size([2, 5])
    """

    def __init__(self, model: Any, kind: str = "classes") -> None:
        super().__init__()
        self.model = model
        self.kind = kind
        if kind == "sigmoid":
            self.logit_bias = nn.Parameter(torch.tensor(SIGLIP_BIAS))

    def forward(self, video: Tensor, texts: Tensor, count: int) -> Tensor:
        """Logits.

        Args:
            video: uint8 (B, T, H, W, 3); a process without videos of its own gives one that is not counted.
            texts: of all classes, or for the contrastive losses of each video: features (K, E) that are known, or
                tokens (K, L).
            count: how many of the videos count, from the first.

        Returns:
            float (count, K), or for the contrastive losses (count, N) against the texts of all processes.
        """
        found = self.model.encode_video(video)
        features = VideoFeatures(found.video[:count], found.patches[:count])
        text = texts if texts.is_floating_point() else self.model.encode_text(texts)
        logits: Tensor
        if self.kind == "classes":
            logits = self.model.logits(features, text)
            return logits
        logits = self.model.logits(features, gather(text[:count]))
        return logits + self.logit_bias if self.kind == "sigmoid" else logits


def losses(kind: str, logits: Tensor, targets: Tensor, labels: Tensor) -> Tensor:
    """The loss of each video, float32 (count,).

    Args:
        kind: as in ``LossSection``.
        logits: of ``Scored``.
        targets: (count, K) of the classes, for that loss.
        labels: int64 (count,), for the contrastive ones: texts of one label are all right.
    """
    if kind == "classes":
        return soft_cross_entropy(logits, targets)
    return info_nce_of_logits(logits, labels) if kind == "info_nce" else sigmoid_of_logits(logits, labels)
