from __future__ import annotations

import copy
import itertools
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import torchvision
from sklearn.datasets import load_digits
from torch import Tensor, nn

from apot_fat import allocate_bits, quantize
from apot_fat.models import create_model
from apot_fat.quant import threshold_layers
from apot_fat.quant.convert.allocation import Allocation
from tests.quant.convert.conftest import Released


def convolutional() -> nn.Module:
    torch.manual_seed(0)
    widths = (6, 8, 12, 16, 6)
    layers: list[nn.Module] = [nn.Conv2d(3, widths[0], 3, padding=1), nn.ReLU()]
    for before, width in itertools.pairwise(widths):
        layers += [nn.Conv2d(before, width, 3, padding=1), nn.ReLU()]
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(6 * 36, 4)).eval()


def images() -> Tensor:
    return torch.rand(32, 3, 6, 6, generator=torch.Generator().manual_seed(1))


def test_the_bits_are_what_quantize_takes_and_the_network_stays() -> None:
    model = convolutional()
    before, state = copy.deepcopy(model), list(model.modules())
    given = allocate_bits(model, images(), average=3.0)
    assert list(model.modules()) == state
    assert all(torch.equal(a, b) for a, b in zip(before.parameters(), model.parameters(), strict=True))
    assert [type(module) for module in before.modules()] == [type(module) for module in model.modules()]
    assert given.average <= 3.0
    assert len({row.bits for row in given.rows}) > 1
    quantize(model, overrides=given, calibration=images())
    bits = {name: layer.spec.weight_bits for name, layer in threshold_layers(model)}
    assert bits == {row.name: row.bits for row in given.rows}
    assert all(layer.spec.act_bits == layer.spec.weight_bits for _, layer in threshold_layers(model))
    sizes = {name: layer.weight.numel() for name, layer in threshold_layers(model)}
    assert given.average == sum(r.bits * sizes[r.name] for r in given.rows) / sum(sizes.values())
    assert all(row.name in str(given) for row in given.rows)
    assert f"{given.bytes:,} bytes" in str(given)


def test_the_loss_of_a_layer_is_what_quantizing_it_alone_costs() -> None:
    model = convolutional()
    given = allocate_bits(model, images(), choices=(2, 4))
    for row in given.rows[:2]:
        others = [other.name for other in given.rows if other is not row]
        for bits in (2, 4):
            done = quantize(
                copy.deepcopy(model), bits, exclude=["0", "11", *others], edge_bits=32, calibration=images()
            )
            assert done.error is not None
            assert row.losses[bits] == pytest.approx(done.error**2, rel=1e-4)


@pytest.mark.parametrize(
    "budget",
    [{"average": 2.5}, {"average": 4.2}, {"bytes": 1700}, {"bit_operations": 2e6}, {"average": 4, "bytes": 1500}],
)
def test_no_other_choice_within_the_budget_loses_less(budget: dict[str, Any]) -> None:
    choices = (2, 3, 4, 8)
    given = allocate_bits(convolutional(), images(), choices=choices, **budget)
    fits = []
    for bits in itertools.product(choices, repeat=len(given.rows)):
        rows = tuple(replace(row, bits=b) for row, b in zip(given.rows, bits, strict=True))
        other = Allocation(rows)
        if all(getattr(other, name) <= value for name, value in budget.items()):
            fits.append(other.error)
    assert all(getattr(given, name) <= value for name, value in budget.items())
    assert given.error == pytest.approx(min(fits))


def test_multiplications_are_those_of_the_cost_report() -> None:
    from apot_fat import cost_report

    model = create_model("resnet20", bits=32)
    given = allocate_bits(model, torch.rand(4, 3, 16, 16), choices=(4, 8), average=8)
    quantize(model, 8)
    costs = {row.name: row.macs for row in cost_report(model, (3, 16, 16)).rows}
    assert {row.name: row.macs for row in given.rows} == {row.name: costs[row.name] for row in given.rows}
    assert "conv1" not in {row.name for row in given.rows}


def test_layers_within_an_encoder_layer_cost_something() -> None:
    encoder = nn.TransformerEncoderLayer(16, 2, 32, dropout=0.0, batch_first=True)
    model = nn.Sequential(nn.Linear(8, 16), encoder, nn.Linear(16, 4)).eval()
    given = allocate_bits(model, torch.randn(8, 5, 8), choices=(2, 8), average=4)
    assert {row.name for row in given.rows} == {"1.linear1", "1.linear2"}
    assert all(row.losses[2] > row.losses[8] > 0 for row in given.rows)
    assert encoder.activation_relu_or_gelu


class ReadsWeight(nn.Module):
    """Calls its middle layer only while somebody looks."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.middle, self.last = (nn.Linear(4, 4) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        x, middle = self.first(x), self.middle
        return self.last(middle(x) if middle._forward_pre_hooks else F.linear(x, middle.weight, middle.bias))


def test_a_layer_that_would_not_run_quantized_has_no_loss() -> None:
    with pytest.raises(ValueError, match=r"layer 'middle' would not run as a quantized one"):
        allocate_bits(ReadsWeight(), torch.randn(8, 4))


class Boxes(nn.Module):
    """Its output is no tensor of one shape."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(*(nn.Linear(4, 4) for _ in range(3)))

    def forward(self, x: Tensor) -> list[int]:
        return self.layers(x).argmax(1).tolist()


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"average": 1.5}, "average 1.5: 2 bits in every layer take 2 already"),
        ({"bytes": 10}, "bytes 10: 2 bits in every layer take"),
        ({"average": -1}, "average -1: give a positive number"),
        ({"average": "3"}, "average '3': give a positive number"),
        ({"choices": ()}, r"choices \(\): give bits from 2 to 8"),
        ({"choices": (1, 2)}, "choices: 1: choose an integer"),
        ({"choices": (4, 32)}, r"choices \(4, 32\): give bits from 2 to 8"),
        ({"method": "none"}, "unknown method"),
    ],
)
def test_bad_budgets_are_named(given: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        allocate_bits(convolutional(), images(), **given)


def test_where_there_is_nothing_to_choose_it_is_said() -> None:
    two = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2))
    for model, x, exclude in ((two, torch.rand(8, 4), []), (convolutional(), images(), ["*"])):
        with pytest.raises(ValueError, match="holds no layer whose bits can be chosen"):
            allocate_bits(model, x, exclude=exclude)
    model = convolutional()
    nn.init.zeros_(model[11].weight)  # type: ignore[index]
    with pytest.raises(ValueError, match="no layer's bits change its output"):
        allocate_bits(model, images())


def test_a_network_without_a_measurable_output_is_refused() -> None:
    model = Boxes()
    with pytest.raises(ValueError, match="which a loss needs"):
        allocate_bits(model, torch.rand(8, 4))
    assert type(model.layers[1]) is nn.Linear


def digits_network() -> Released:
    """MobileNetV2 of torchvision, trained here on the digits at 32 × 32."""
    torch.manual_seed(0)
    images, labels = load_digits(return_X_y=True)
    x = F.interpolate(torch.tensor(images / 8 - 1).float().reshape(-1, 1, 8, 8), size=32).repeat(1, 3, 1, 1)
    y = torch.tensor(labels)
    model = torchvision.models.mobilenet_v2(num_classes=10)
    epochs = 8
    optimizer = torch.optim.SGD(model.parameters(), 0.05, momentum=0.9, weight_decay=5e-4)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.1, epochs * 14)
    for batch in torch.cat([torch.randperm(1400) for _ in range(epochs)]).split(100):
        optimizer.zero_grad()
        F.cross_entropy(model(x[batch]), y[batch]).backward()
        optimizer.step()
        schedule.step()
    return Released(model.eval(), x[:1000], x[1400:], y[1400:])


@pytest.mark.slow
@pytest.mark.parametrize("network", ["resnet20", "mobilenet_v2"])
def test_three_bits_on_average_beat_three_bits_everywhere(network: str, request: pytest.FixtureRequest) -> None:
    trained: Released = request.getfixturevalue("released") if network == "resnet20" else digits_network()
    model, x = trained.model, trained.images[:1024]
    counts, errors = [], []
    given = allocate_bits(model, x, average=3.0)
    print(f"\n{network}\n{given}")
    for overrides in (None, given):
        quantized = copy.deepcopy(model)
        done = quantize(quantized, 3, overrides=overrides, calibration=x)
        assert done.error is not None
        counts.append(trained.correct(quantized))
        errors.append(done.error)
    exact, total = trained.correct(model), len(trained.labels)
    print(f"of {total:,} images: float {exact}, 3 bits everywhere {counts[0]}, on average {counts[1]}; {errors}")
    assert given.bytes <= sum(-(-row.weights * 3 // 8) for row in given.rows)
    assert counts[1] > counts[0]
    assert errors[1] < errors[0]
