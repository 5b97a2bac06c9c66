from __future__ import annotations

import pytest
import torch
from torch import nn

from apot_fat.data import Batch
from apot_fat.training.objective import Objective, cross_entropy


def batch(**values: torch.Tensor) -> Batch:
    return Batch(torch.randn(4, 3), torch.tensor([0, 2, 1, 1]), **values)  # type: ignore[arg-type]


def targets(labels: torch.Tensor, smoothing: float = 0.0, classes: int = 3) -> torch.Tensor:
    return (1 - smoothing) * torch.eye(classes)[labels] + smoothing / classes


def test_label_smoothing_moves_the_targets() -> None:
    x, labels = (given := batch()).x, given.labels
    expected = -(targets(labels, 0.2) * x.log_softmax(1)).sum(1).mean()
    loss, logits = Objective(label_smoothing=0.2)(nn.Identity(), given)
    torch.testing.assert_close(loss, expected)
    assert logits is x
    assert cross_entropy(x, given) == pytest.approx(-x.log_softmax(1)[torch.arange(4), labels].mean().item())
