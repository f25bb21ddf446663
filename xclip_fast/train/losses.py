"""What training minimises, one number a video, so that batches of any size and number of processes add up."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, distributed
from torch.nn.functional import cross_entropy, logsigmoid, normalize


def smoothed_targets(labels: Tensor, classes: int, smoothing: float = 0.1) -> Tensor:
    """One-hot rows with label smoothing: the share ``smoothing`` goes to all classes alike.

    Args:
        labels: int64 (B,).
        classes: K.
        smoothing: between 0 and 1.

    Returns:
        float32 (B, K); rows sum to 1.

    Example:
        >>> import torch
        >>> from xclip_fast.train import smoothed_targets
        >>> smoothed_targets(torch.tensor([1]), classes=2, smoothing=0.1)
        tensor([[0.0500, 0.9500]])
    """
    rows = torch.full((len(labels), classes), smoothing / classes, device=labels.device)
    return rows.scatter_add_(1, labels[:, None], torch.full_like(rows[:, :1], 1 - smoothing))


def soft_cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    """Cross-entropy with a distribution over the class texts: the paper's loss.

    Args:
        logits: (B, K); computed in float32.
        targets: (B, K), rows sum to 1.

    Returns:
        float32 (B,).

    Example:
        >>> import torch
        >>> from xclip_fast.train import smoothed_targets, soft_cross_entropy
        >>> soft_cross_entropy(torch.zeros(1, 4), smoothed_targets(torch.tensor([2]), classes=4))
        tensor([1.3863])
    """
    return cross_entropy(logits.float(), targets.float(), reduction="none")


def info_nce(video: Tensor, text: Tensor, scale: Tensor | float, labels: Tensor | None = None) -> Tensor:
    """The symmetric contrastive loss of CLIP (InfoNCE): each video finds its text among all, and the reverse.

    In a process group the videos and texts of all processes are each other's negatives, whatever number each has, and
    gradients flow back to where they came from.

    Args:
        video: (B, E) features, text: (B, E) features of their texts; both are normalised here.
        scale: of the cosines: ``model.logit_scale.exp()``.
        labels: int64 (B,), where texts may be equal: all with the label of a video are right, in equal shares.

    Returns:
        float32 (B,), the mean of both directions.

    Example:
        >>> import torch
        >>> from xclip_fast.train import info_nce
        >>> info_nce(torch.eye(2), torch.eye(2), scale=1.0)
        tensor([0.3133, 0.3133])
    """
    rows = scale * normalize(video.float(), dim=-1) @ gather(normalize(text.float(), dim=-1)).T
    return info_nce_of_logits(rows, labels)


def info_nce_of_logits(rows: Tensor, labels: Tensor | None = None) -> Tensor:
    """``info_nce`` of the scores (B, N) of the videos of this process with the texts of all processes, in order."""
    matches = _matches(rows, labels).float()
    targets = matches / matches.sum(dim=1, keepdim=True)
    columns = gather(rows)[:, _mine(rows)].T.float()
    # who matches whom is symmetric, so the targets of the videos are those of their texts
    return (soft_cross_entropy(rows, targets) + soft_cross_entropy(columns, targets)) / 2


def sigmoid_loss(
    video: Tensor, text: Tensor, scale: Tensor | float, bias: Tensor | float, labels: Tensor | None = None
) -> Tensor:
    """The pairwise sigmoid loss of SigLIP (Zhai et al., 2023): every pair of a video and a text is a yes or a no.

    Args:
        video, text, scale, labels: as for ``info_nce``.
        bias: added to the scaled cosines; SigLIP starts it at -10.

    Returns:
        float32 (B,), summed over the texts of all processes.

    Example:
        >>> import torch
        >>> from xclip_fast.train import sigmoid_loss
        >>> sigmoid_loss(torch.eye(2), -torch.eye(2), scale=1.0, bias=0.0)
        tensor([2.0064, 2.0064])
    """
    rows = scale * normalize(video.float(), dim=-1) @ gather(normalize(text.float(), dim=-1)).T
    return sigmoid_of_logits(rows + bias, labels)


def sigmoid_of_logits(rows: Tensor, labels: Tensor | None = None) -> Tensor:
    """``sigmoid_loss`` of the scores (B, N) that the videos of this process have with the texts of all processes."""
    signs = _matches(rows, labels).float() * 2 - 1
    return -logsigmoid(signs * rows.float()).sum(dim=1)


def gather(rows: Tensor) -> Tensor:
    """The rows (B, ...) of all processes, in the order of the processes; B may differ. Gradients flow back."""
    if not _is_shared():
        return rows
    from torch.distributed.nn.functional import all_gather

    sizes = _sizes(rows)
    padded = torch.cat([rows, rows.new_zeros(max(sizes) - len(rows), *rows.shape[1:])])
    parts: Any = all_gather(padded)
    return torch.cat([part[:size] for part, size in zip(parts, sizes, strict=True)])


def _is_shared() -> bool:
    return distributed.is_available() and distributed.is_initialized() and distributed.get_world_size() > 1


def _sizes(rows: Tensor) -> list[int]:
    here = torch.tensor([len(rows)], device=rows.device)
    sizes = here.new_empty(distributed.get_world_size())
    distributed.all_gather_into_tensor(sizes, here)
    return sizes.tolist()


def _mine(rows: Tensor) -> slice:
    """Where the rows of this process are among those of all."""
    if not _is_shared():
        return slice(0, len(rows))
    first = sum(_sizes(rows)[: distributed.get_rank()])
    return slice(first, first + len(rows))


def _matches(rows: Tensor, labels: Tensor | None) -> Tensor:
    """Which of all texts are right for the videos of this process, bool (B, N)."""
    if labels is None:
        everyone = torch.arange(rows.shape[1], device=rows.device)
        return everyone[_mine(rows)][:, None] == everyone
    return labels[:, None] == gather(labels)
