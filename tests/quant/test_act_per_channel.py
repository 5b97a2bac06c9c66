"""One activation threshold an input channel: each channel is quantized as a layer with one threshold would."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from apot_fat import QuantConv2d, QuantLinear, clipping_table, load_packed, load_weights, preset, quantize, save_packed
from apot_fat.export import export_onnx
from apot_fat.integer import IntegerLayer, integer_program
from apot_fat.quant import initialize_thresholds, quantize_activation, quantize_weight, set_kernels, threshold_layers
from apot_fat.quant.measure import measure_layers

CONV, UNBATCHED, LINEAR = (4, 6, 5, 5), (6, 5, 5), (3, 7, 6)


def layer_of(shape: tuple[int, ...], name: str = "apot-cifar", **options: Any) -> QuantConv2d | QuantLinear:
    relu = bool(options.pop("relu", False))
    spec = preset(name, 3, act_per_channel=True, **options)
    if shape == LINEAR:
        return QuantLinear(6, 4, spec=spec, relu=relu)
    return QuantConv2d(6, 4, 3, groups=2, spec=spec, relu=relu)


def one_by_one(layer: QuantConv2d | QuantLinear, dim: int) -> Callable[[Tensor, Tensor], Tensor]:
    spec, clip = layer.spec, "relu" if layer.relu else layer.spec.act_clip

    def quantized(x: Tensor, alphas: Tensor) -> Tensor:
        parts = []
        for channel, alpha in zip(x.unbind(dim), alphas, strict=True):
            if spec.act_signed and not layer.relu:
                parts.append(quantize_weight(channel, alpha, spec.act_set, clip_gradient=True))
            else:
                gradient = spec.act_alpha_gradient
                parts.append(quantize_activation(channel, alpha, spec.act_set, clip=clip, alpha_gradient=gradient))
        return torch.stack(parts, dim)

    return quantized


@pytest.mark.parametrize(
    ("shape", "kernels"),
    [
        (CONV, "eager"),
        pytest.param(CONV, "compiled", marks=pytest.mark.slow),
        (UNBATCHED, "eager"),
        (LINEAR, "eager"),
    ],
)
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"relu": True},
        {"name": "fat-imagenet"},
        {"name": "lsq", "act_signed": True, "grad_scale": None},
        {"act_signed": True, "relu": True},
    ],
    ids=str,
)
def test_each_channel_is_quantized_by_its_threshold(
    options: dict[str, Any], shape: tuple[int, ...], kernels: str
) -> None:
    set_kernels(kernels)
    torch.manual_seed(0)
    layer, dim = layer_of(shape, **options), -1 if shape == LINEAR else -3
    assert layer.act_alpha is not None
    assert layer.act_alpha.shape == (6,)
    with torch.no_grad():
        layer.act_alpha.copy_(torch.linspace(0.2, 2.0, 6))
        layer.act_alpha[2] = -1.0  # read as the floor
    results = []
    for quantized in (lambda x, _: layer.quantized_input(x), one_by_one(layer, dim)):
        x, alphas = torch.randn(shape, generator=torch.Generator().manual_seed(1)), layer.act_alpha.detach().clone()
        x.requires_grad_()
        layer.act_alpha.grad, alphas.requires_grad = None, True
        y = quantized(x, alphas)
        (y * torch.arange(y.numel()).view(y.shape).cos()).sum().backward()
        results.append((y.detach(), x.grad, layer.act_alpha.grad if alphas.grad is None else alphas.grad))
    for mine, expected in zip(*results, strict=True):
        torch.testing.assert_close(mine, expected, rtol=1e-5, atol=1e-6)
    x = torch.randn(shape)
    operands = layer.quantized_input(x), layer.quantized_weight(), layer.bias
    expected = F.linear(*operands) if isinstance(layer, QuantLinear) else layer._conv_forward(*operands)
    torch.testing.assert_close(layer(x), expected)
    layer.eval()
    with torch.no_grad():
        torch.testing.assert_close(layer(x), expected)


def channels_of_many_sizes(images: int = 32) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.rand(images, 6, 5, 5, generator=generator) * torch.logspace(-1, 1, 6).view(-1, 1, 1)


def error(layer: QuantConv2d, x: Tensor) -> Tensor:
    return ((layer.quantized_input(x) - x).square().sum((0, 2, 3)) / x.square().sum((0, 2, 3))).detach()


@pytest.mark.parametrize("rule", ["mse", "lsq"])
def test_channels_of_different_sizes_are_all_met(rule: str) -> None:
    x, layer = channels_of_many_sizes(), layer_of(CONV)
    assert isinstance(layer, QuantConv2d)
    initialize_thresholds(nn.Sequential(layer), x, rule)
    apart = error(layer, x)
    layer.spec = preset("apot-cifar", 3)
    assert layer.act_alpha is not None
    assert layer.act_alpha.shape == ()
    initialize_thresholds(nn.Sequential(layer), x, rule)
    assert apart.max() < 0.05
    assert error(layer, x)[0] > 0.9  # the smallest channel goes to 0 with one threshold


def test_a_user_s_network_is_converted_trained_and_kept(tmp_path: Path) -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(6, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(8, 3))
    x = channels_of_many_sizes()
    quantize(net, bits=3, calibration=x, reconstruct=True, overrides={"2": {"act_per_channel": True}})
    layer = net[2]
    assert isinstance(layer, QuantConv2d)
    assert layer.act_alpha is not None
    assert layer.act_alpha.shape == (8,)
    assert len(layer.act_alpha.unique()) > 1  # reconstruction moved each
    before = layer.act_alpha.detach().clone()
    F.cross_entropy(net.train()(x), torch.arange(32) % 3).backward()
    torch.optim.SGD(net.parameters(), 0.1).step()
    assert not torch.equal(layer.act_alpha, before)
    save_packed(net.eval(), tmp_path / "net.safetensors")
    blank = nn.Sequential(nn.Conv2d(6, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(8, 3))
    assert torch.equal(load_packed(tmp_path / "net.safetensors", blank)(x), net(x))
    assert clipping_table(net)[0].act_alpha == pytest.approx(layer.act_alpha.mean().item())
    measured = {row.name: row for row in measure_layers(net, x)}["2"]
    assert measured.input is not None
    assert sum(measured.input.shares) == pytest.approx(1)
    assert measured.input.sqnr is not None


def test_a_layer_s_threshold_becomes_that_of_each_channel() -> None:
    whole = QuantConv2d(6, 4, 3, spec=preset("apot-cifar", 3, act_alpha=1.5))
    apart = QuantConv2d(6, 4, 3, spec=preset("apot-cifar", 3, act_per_channel=True))
    load_weights(apart, whole.state_dict())
    x = torch.rand(2, 6, 5, 5)
    assert torch.equal(apart.quantized_input(x), whole.quantized_input(x))
    with pytest.raises(ValueError, match="act thresholds are one a channel: build the network with act_per_channel"):
        load_weights(whole, apart.state_dict())


def test_what_adds_integers_refuses_it_and_says_why(tmp_path: Path) -> None:
    net = nn.Sequential(layer_of(CONV))
    x = torch.rand(4, 6, 5, 5)
    (_, layer), *_ = threshold_layers(net)
    for refused in (
        lambda: IntegerLayer(layer)(x),
        lambda: export_onnx(net, tmp_path / "net.onnx", (6, 5, 5)),
        lambda: integer_program(net, x, mean=[0.0] * 6, std=[1.0] * 6),
    ):
        with pytest.raises(ValueError, match="act_per_channel True"):
            refused()
