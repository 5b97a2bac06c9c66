from __future__ import annotations

import torch
from torch import nn

from apot_fat.quant import ALPHA_FLOOR, QuantConv2d, QuantLinear, initialize_thresholds, preset
from apot_fat.quant.diagnosis import odd_layers
from apot_fat.quant.measure import measure_inputs


def test_a_network_in_order_gives_no_sentence() -> None:
    net = nn.Sequential(QuantConv2d(3, 4, 3, spec=preset("apot-cifar")), nn.BatchNorm2d(4), nn.ReLU())
    before = {name: value.clone() for name, value in net.state_dict().items()}
    assert odd_layers(net, torch.randn(2, 3, 8, 8)) == []
    assert net.training
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())


def test_each_oddity_is_defined_and_named() -> None:
    net = nn.Sequential(QuantLinear(4, 4, spec=preset("apot-cifar")), QuantLinear(4, 2, spec=preset("fat-cifar")))
    constant, floored = net
    assert isinstance(constant, QuantLinear)
    assert isinstance(floored, QuantLinear)
    with torch.no_grad():
        constant.weight.fill_(0.3)
        constant.bias.zero_()
        assert floored.weight_alpha is not None
        floored.weight_alpha.fill_(-1.0)
    assert odd_layers(net, -torch.rand(5, 4)) == [
        "0: its weight is constant and quantized to 0",
        "0: its input is nowhere above 0 and quantized to 0",
        "1: its weight threshold is at its floor: lower weight_alpha_lr",
        "1: its input is 0 and quantized to 0",
    ]
    y = net(-torch.rand(5, 4))
    assert y.isfinite().all()
    y.sum().backward()
    for name, parameter in net.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name
    assert constant.act_alpha is not None
    assert constant.act_alpha.grad == 0


def test_looking_leaves_frozen_modules_frozen() -> None:
    net = nn.Sequential(QuantConv2d(3, 4, 3, spec=preset("apot-cifar")), nn.BatchNorm2d(4)).train()
    net[1].eval()
    odd_layers(net, torch.randn(2, 3, 8, 8))
    measure_inputs(net, torch.randn(2, 3, 8, 8))
    assert [module.training for module in net] == [True, False]


def test_a_dead_filter_is_in_order() -> None:
    net = nn.Sequential(QuantConv2d(3, 4, 3, spec=preset("apot-cifar", weight_per_channel=True)))
    layer, x = net[0], torch.rand(2, 3, 8, 8)
    assert isinstance(layer, QuantConv2d)
    with torch.no_grad():
        layer.weight[1] = 0
        layer.weight[0] -= 4 * layer.weight.mean()  # so that the layer's mean is 0, and the dead filter stays so
        initialize_thresholds(net, x)
        assert layer.weight_alpha is not None
        assert layer.weight_alpha[1] <= ALPHA_FLOOR
        for growth in (2 * ALPHA_FLOOR, 0.2):  # what training makes of it
            layer.weight[1] += growth * layer.weight.std()
            assert odd_layers(net, x) == []
        layer.weight_alpha[2] = 0
    assert odd_layers(net, x) == ["0: its weight threshold is at its floor: lower weight_alpha_lr"]
