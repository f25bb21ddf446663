"""Losses against their definitions in float64, one pair at a time."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from xclip_fast.train import info_nce, sigmoid_loss, smoothed_targets, soft_cross_entropy


def random_features(count: int, width: int = 6) -> tuple[Tensor, Tensor]:
    return torch.randn(count, width), torch.randn(count, width)


def cosines(video: Tensor, text: Tensor) -> Tensor:
    v, t = video.double(), text.double()
    return (v @ t.T) / v.norm(dim=1)[:, None] / t.norm(dim=1)


def test_smoothed_targets_are_the_official_ones() -> None:
    found = smoothed_targets(torch.tensor([2, 0]), classes=5, smoothing=0.1)
    off, on = 0.1 / 5, 1 - 0.1 + 0.1 / 5
    expected = torch.tensor([[off, off, on, off, off], [on, off, off, off, off]])
    torch.testing.assert_close(found, expected)
    assert smoothed_targets(torch.empty(0, dtype=torch.int64), 3).shape == (0, 3)


def test_soft_cross_entropy() -> None:
    logits, targets = torch.randn(4, 7) * 5, torch.rand(4, 7).softmax(dim=1)
    expected = -(targets.double() * logits.double().log_softmax(dim=1)).sum(dim=1)
    torch.testing.assert_close(soft_cross_entropy(logits, targets).double(), expected, atol=1e-5, rtol=1e-5)
    halves = soft_cross_entropy(logits.bfloat16(), targets)
    assert halves.dtype == torch.float32


@pytest.mark.parametrize("labels", [None, torch.tensor([0, 1, 0, 2, 1])])
def test_info_nce_is_both_directions(labels: Tensor | None) -> None:
    video, text = random_features(5)
    scores = 7.0 * cosines(video, text)
    ids = torch.arange(5) if labels is None else labels
    expected = []
    for i in range(5):
        right = [j for j in range(5) if ids[j] == ids[i]]
        forth = -sum(scores[i].log_softmax(dim=0)[j] for j in right) / len(right)
        back = -sum(scores[:, i].log_softmax(dim=0)[j] for j in right) / len(right)
        expected.append((forth + back) / 2)
    torch.testing.assert_close(info_nce(video, text, 7.0, labels).double(), torch.stack(expected), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("labels", [None, torch.tensor([0, 1, 0, 2, 1])])
def test_sigmoid_loss_is_a_sum_over_pairs(labels: Tensor | None) -> None:
    video, text = random_features(5)
    scores = 3.0 * cosines(video, text) - 2.0
    ids = torch.arange(5) if labels is None else labels
    expected = torch.zeros(5, dtype=torch.float64)
    for i in range(5):
        for j in range(5):
            chance = scores[i, j].sigmoid()
            expected[i] -= (chance if ids[i] == ids[j] else 1 - chance).log()
    found = sigmoid_loss(video, text, 3.0, -2.0, labels)
    torch.testing.assert_close(found.double(), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("loss", [lambda v, t: info_nce(v, t, 20.0), lambda v, t: sigmoid_loss(v, t, 20.0, -5.0)])
def test_contrastive_losses_fall_on_right_pairs(loss) -> None:
    video, text = torch.eye(4), torch.eye(4)
    assert loss(video, text).sum() < loss(video, text.roll(1, 0)).sum()
    found = loss(video.clone().requires_grad_(), text)
    assert found.shape == (4,)
    assert found.requires_grad
