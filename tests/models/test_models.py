from __future__ import annotations

import pytest
import torch

from apot_fat.models import create_model, default_preset, find_architecture, list_models
from apot_fat.quant import EightBitConv2d, EightBitLinear, quant_layers

DEEP_TWINS = ("resnet44", "resnet110")  # of resnet20: one bit-width is enough
CASES = [
    (name, preset, bits)
    for name in list_models()
    for preset in ("apot-cifar", "fat-cifar-log")
    for bits in ((3,) if name in DEEP_TWINS else (2, 3, 4, 5, 32))
]


@pytest.mark.parametrize(("name", "preset", "bits"), CASES)
def test_every_network(name: str, preset: str, bits: int) -> None:
    model = create_model(name, preset, bits, num_classes=7)
    x = torch.rand(2, 3, 32, 32) if name.startswith("vgg") else torch.rand(2, 3, 16, 16)
    y = model(x)
    assert y.shape == (2, 7)
    y.square().sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
    twin = create_model(name, preset, bits, num_classes=7)
    twin.load_state_dict(model.state_dict())
    torch.testing.assert_close(twin.eval()(x), model.eval()(x), atol=0, rtol=0)


@pytest.mark.parametrize(
    ("spelling", "name", "preset"),
    [
        ("res20", "resnet20", "apot-cifar"),
        ("resnet20", "resnet20", "apot-cifar"),
        ("resnet_20", "resnet20", "fat-cifar"),
        ("ResNet-56", "resnet56", "apot-cifar"),
        ("vgg_7_bn", "vgg_small", "fat-cifar"),
        ("vgg_16_bn", "vgg16", "fat-cifar"),
    ],
)
def test_published_spellings(spelling: str, name: str, preset: str) -> None:
    assert find_architecture(spelling).name == name
    assert default_preset(spelling) == preset


def test_full_precision_keeps_the_published_ends() -> None:
    resnet = create_model("res20", bits=32)
    assert isinstance(resnet.conv1, EightBitConv2d)
    assert isinstance(resnet.fc, EightBitLinear)
    assert not list(quant_layers(resnet))
    vgg = create_model("vgg_7_bn", bits=32)
    first = vgg.get_submodule("features.conv0")
    assert type(first) is torch.nn.Conv2d
    assert first.bias is not None


def test_unknown_names() -> None:
    with pytest.raises(ValueError, match=r"unknown architecture 'res21' .did you mean 'resnet20'"):
        create_model("res21")
    with pytest.raises(ValueError, match="unknown preset"):
        create_model("res20", "apot")
    with pytest.raises(ValueError, match="bits"):
        create_model("res20", bits=33)
