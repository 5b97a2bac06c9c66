from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from apot_fat.data import Batch
from apot_fat.training.objective import Objective, distillation, mixed


def batch() -> Batch:
    return Batch(torch.randn(4, 3), torch.tensor([0, 2, 1, 1]))


def targets(labels: torch.Tensor, smoothing: float = 0.0, classes: int = 3) -> torch.Tensor:
    return (1 - smoothing) * torch.eye(classes)[labels] + smoothing / classes


def test_label_smoothing_moves_the_targets() -> None:
    x, labels = (given := batch()).x, given.labels
    expected = -(targets(labels, 0.2) * x.log_softmax(1)).sum(1).mean()
    loss, logits = Objective(label_smoothing=0.2)(nn.Identity(), given)
    torch.testing.assert_close(loss, expected)
    assert logits is x


@pytest.mark.parametrize("temperature", [1.0, 4.0])
def test_distillation_is_hintons(temperature: float) -> None:
    student, teacher = torch.randn(5, 3, dtype=torch.float64, requires_grad=True), torch.randn(5, 3).double()
    loss = distillation(student, teacher, temperature)
    p, q = (teacher / temperature).softmax(1), (student / temperature).softmax(1)
    torch.testing.assert_close(loss, temperature**2 * (p * (p / q).log()).sum(1).mean())
    (grad,) = torch.autograd.grad(loss, student)
    torch.testing.assert_close(grad, temperature * (q - p).detach() / 5)
    assert distillation(teacher, teacher, temperature).item() == pytest.approx(0, abs=1e-12)
    # at high temperature it matches logits (Hinton 2015, section 2.1)
    flat = distillation(student.detach(), teacher, 1e4)
    centered = (student.detach() - student.detach().mean(1, keepdim=True)) - (teacher - teacher.mean(1, keepdim=True))
    assert flat.item() == pytest.approx((centered.square().sum(1).mean() / (2 * 3)).item(), rel=1e-3)


def test_the_teacher_is_weighed_against_the_labels() -> None:
    given = batch()
    teacher = nn.Linear(3, 3).requires_grad_(False)
    objective = Objective(teacher=teacher, distill_weight=0.3, distill_temperature=2.0)
    expected = 0.7 * F.cross_entropy(given.x, given.labels) + 0.3 * distillation(given.x, teacher(given.x), 2.0)
    torch.testing.assert_close(objective(nn.Identity(), given)[0], expected)


def test_the_teacher_sees_the_images_mixed_as_the_network_does() -> None:
    given = Batch(torch.randn(64, 3), torch.zeros(64, dtype=torch.int64))
    teacher = nn.Linear(3, 3).requires_grad_(False)
    objective = Objective(teacher=teacher, distill_weight=1.0, distill_mixup=0.5)
    loss, x = objective(nn.Identity(), given)
    torch.testing.assert_close(loss, distillation(x, teacher(x), 1.0))
    shares = (x - given.x) / (given.x.roll(-1, 0) - given.x)  # of the next image: one an image, of all its values
    torch.testing.assert_close(shares, shares[:, :1].expand(-1, 3), rtol=1e-2, atol=1e-3)
    assert -1e-3 <= shares.min() < shares.max() <= 1 + 1e-3
    assert 0.3 < (shares[:, 0] == 0).float().mean() < 0.7  # half of them stay as they are
    x = torch.randn(4, 3, 8, 8, dtype=torch.bfloat16).to(memory_format=torch.channels_last)
    assert mixed(x, 1.0).dtype == x.dtype
    assert mixed(x, 1.0).is_contiguous(memory_format=torch.channels_last)


def test_mixed_images_have_no_labels() -> None:
    with pytest.raises(
        ValueError, match=r"distill_mixup 0\.5: mixed images have no label; give distill_weight 1, not 0"
    ):
        Objective(distill_mixup=0.5)
