from __future__ import annotations

import pytest
import torch
from torch import nn

from apot_fat.data import Batch
from apot_fat.quant import QuantConv2d, preset
from apot_fat.training.objective import Objective, cross_entropy, distance_to_levels, distillation


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
    expected = 0.7 * cross_entropy(given.x, given) + 0.3 * distillation(given.x, teacher(given.x), 2.0)
    torch.testing.assert_close(objective(nn.Identity(), given)[0], expected)


def test_mixed_images_have_mixed_targets() -> None:
    own_share, others = torch.tensor([0.0, 0.25, 1.0, 0.5]), torch.tensor([1, 1, 0, 2])
    given = batch(other_labels=others, own_share=own_share)
    mixed = own_share[:, None] * targets(given.labels, 0.1) + (1 - own_share[:, None]) * targets(others, 0.1)
    expected = -(mixed * given.x.log_softmax(1)).sum(1).mean()
    torch.testing.assert_close(cross_entropy(given.x, given, 0.1), expected)


@pytest.mark.parametrize(("preset_name", "bits"), [("apot-cifar", 4), ("apot-cifar", 2), ("fat-cifar", 3)])
def test_dampening_draws_weights_to_their_levels(preset_name: str, bits: int) -> None:
    layer = QuantConv2d(3, 4, 3, spec=preset(preset_name, bits=bits, weight_alpha=1.4))
    model = nn.Sequential(layer, nn.BatchNorm2d(4), nn.Linear(2, 2))
    w = layer.transformed_weight().detach()
    levels = torch.tensor(layer.spec.weight_set.levels)
    nearest = 1.4 * torch.cat([-levels, levels])
    expected = (w.clamp(-1.4, 1.4)[..., None] - nearest).square().amin(-1).sum()
    distance = distance_to_levels(model)
    torch.testing.assert_close(distance, expected)
    if layer.transform is None:  # its gradient: 2 (ŵ − q) / std within the threshold, 0 outside
        (grad,) = torch.autograd.grad(distance, layer.weight)
        error = torch.where(w.abs() <= 1.4, w - layer.quantized_weight().detach(), 0)
        torch.testing.assert_close(grad, 2 * error / layer.weight.detach().std(), rtol=1e-4, atol=1e-5)
    distance_to_levels(model).backward()
    assert layer.weight_alpha is not None
    assert layer.weight_alpha.grad is None
    assert distance_to_levels(nn.Linear(2, 2)) == 0
