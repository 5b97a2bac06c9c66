"""Filters negated in front of batch norms."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from apot_fat import balance_filters
from apot_fat.models import create_model


def trained(model: nn.Module, *shape: int) -> nn.Module:
    """A network whose batch norms are like those of a trained one, and whose filters have means."""
    torch.manual_seed(0)
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.affine:
            nn.init.uniform_(module.weight, 0.2, 1.2)
            nn.init.uniform_(module.bias, -0.5, 0.5)
        if isinstance(module, nn.Conv2d | nn.Linear):
            module.weight.data -= module.weight.data.std() * 0.2
    for _ in range(3):
        model(torch.randn(8, *shape))
    return model


@pytest.mark.parametrize(("arch", "size"), [("resnet20", 32), ("vgg_small", 32), ("mobilenet_v2", 64)])
def test_the_function_stays_to_the_bit_and_the_means_go(arch: str, size: int) -> None:
    model = trained(create_model(arch, bits=32, num_classes=10), 3, size, size)
    before = copy.deepcopy(model)
    x = torch.randn(4, 3, size, size)
    assert balance_filters(model) is model
    with torch.no_grad():
        assert torch.equal(model.eval()(x), before.eval()(x))
        outputs = []
        for net in (model, before):
            torch.manual_seed(1)  # of dropout
            outputs.append(net.train()(x))
    torch.testing.assert_close(*outputs)
    shares = {
        name: (layer.weight.mean() / layer.weight.std()).abs().item()
        for name, layer in model.named_modules()
        if type(layer) is nn.Conv2d
    }
    assert max(shares.values()) < 0.02, shares
    assert all((a.abs() == b.abs()).all() for a, b in zip(model.parameters(), before.parameters(), strict=True))


class Awkward(nn.Module):
    """Layers that must stay as they are, each for its own reason, and one that need not."""

    def __init__(self) -> None:
        super().__init__()
        self.twice, self.twice_norm = nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4)
        self.read, self.read_norm = nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4)
        self.split, self.split_norm = nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4)
        self.plain = nn.Conv2d(4, 4, 3, padding=1)
        self.unscaled, self.unscaled_norm = nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4, affine=False)
        self.unseen, self.unseen_norm = nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4, track_running_stats=False)
        self.shared_norm = nn.BatchNorm2d(4)
        self.one, self.two = nn.Conv2d(4, 4, 1), nn.Conv2d(4, 4, 1)
        self.fine, self.fine_norm = nn.Conv2d(4, 6, 3), nn.BatchNorm2d(6)
        self.flat, self.flat_norm = nn.Linear(6, 5, bias=False), nn.BatchNorm1d(5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.twice_norm(self.twice(self.twice(x)))
        x = self.read_norm(self.read(x)) + F.conv2d(x, self.read.weight, padding=1)
        y = self.split(x)
        x = self.split_norm(y) + y.relu()
        x = self.plain(x).relu() + self.unscaled_norm(self.unscaled(x)) + self.unseen_norm(self.unseen(x))
        x = self.shared_norm(self.one(x)) + self.shared_norm(self.two(x))
        x = self.fine_norm(self.fine(x)).relu().mean((2, 3))
        return self.flat_norm(self.flat(x))


def test_a_layer_that_others_depend_on_stays() -> None:
    model = trained(Awkward(), 4, 6, 6).eval()
    before = copy.deepcopy(model)
    x = torch.randn(5, 4, 6, 6)
    balance_filters(model)
    changed = {
        name.partition(".")[0]
        for (name, a), b in zip(model.named_parameters(), before.parameters(), strict=True)
        if not torch.equal(a, b)
    }
    assert changed == {"fine", "fine_norm"}
    assert torch.equal(model(x), before(x))


@pytest.mark.parametrize("length", [6, 4])
def test_a_batch_norm_over_another_dimension_than_the_filters_changes_nothing(length: int) -> None:
    model = trained(nn.Sequential(nn.Linear(5, 6), nn.BatchNorm1d(length), nn.ReLU()), length, 5).eval()
    before, x = copy.deepcopy(model), torch.randn(3, length, 5)
    balance_filters(model)
    assert torch.equal(model(x), before(x))


def test_a_convolution_over_a_sequence_is_balanced() -> None:
    model = trained(nn.Sequential(nn.Conv1d(5, 6, 3, bias=False), nn.BatchNorm1d(6)), 5, 9).eval()
    before, x = copy.deepcopy(model), torch.randn(3, 5, 9)
    balance_filters(model)
    assert not torch.equal(model[0].weight, before[0].weight)  # type: ignore[index]
    assert torch.equal(model(x), before(x))


def test_a_forward_that_cannot_be_traced_is_said() -> None:
    class Branching(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x if x.sum() > 0 else -x

    with pytest.raises(ValueError, match=r"Branching: torch.fx cannot trace it"):
        balance_filters(Branching())
