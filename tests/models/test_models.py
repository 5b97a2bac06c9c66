from __future__ import annotations

import copy

import pytest
import torch

from apot_fat.models import create_model, default_preset, find_architecture, list_models
from apot_fat.quant import EIGHT_BIT, PRESETS, QuantConv2d, threshold_layers

ALTERNATING = {2: "apot", 3: "fat", 4: "fat", 5: "apot", 32: "apot"}
SIDES = {"vgg_small": 32, "vgg16": 32}


# the deepest are the same blocks again
DEEP = ("resnet34", "resnet50", "resnet101", "resnet152", "resnet110")
EVERY = [
    pytest.param(name, bits, marks=pytest.mark.slow if name in DEEP and bits != 4 else ())
    for name in list_models()
    for bits in ALTERNATING
]


@pytest.mark.parametrize(("name", "bits"), EVERY)
def test_every_network(name: str, bits: int) -> None:
    where = "cifar" if find_architecture(name).dataset == "cifar10" else "imagenet"
    method = "apot" if name in ("resnet101", "resnet152") else ALTERNATING[bits]  # resnet50's twins: FAT takes long
    model = create_model(name, f"{method}-{where}", bits, num_classes=7)
    # through 152 layers, batch statistics of two images of one pixel each would make the gradient overflow
    x = torch.rand(8, 3, 32, 32) if where == "imagenet" else torch.rand(2, 3, SIDES.get(name, 16), SIDES.get(name, 16))
    y = model(x)
    assert y.shape == (len(x), 7)
    y.square().sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
    twin = copy.deepcopy(model)
    for parameter in twin.parameters():
        parameter.data.zero_()
    twin.load_state_dict(model.state_dict())
    torch.testing.assert_close(twin.eval()(x), model.eval()(x), atol=0, rtol=0)


@pytest.mark.parametrize("name", ["resnet20", "vgg_small", "resnet18", "mobilenet_v2"])
def test_every_preset_on_one_network_a_family(name: str) -> None:
    for preset in PRESETS:
        model = create_model(name, preset, 3, num_classes=5)
        y = model(torch.rand(2, 3, 32, 32))
        y.square().sum().backward()
        learned = [p for p in model.parameters() if p.requires_grad]
        assert all(p.grad is not None and p.grad.isfinite().all() for p in learned), preset


@pytest.mark.parametrize("preset", ["apot-cifar", "fat-cifar"])
@pytest.mark.parametrize(("weight_bits", "act_bits"), [(3, 32), (32, 3)])
def test_weights_or_activations_alone(preset: str, weight_bits: int, act_bits: int) -> None:
    model = create_model("resnet20", preset, weight_bits=weight_bits, act_bits=act_bits, num_classes=4)
    x = torch.rand(2, 3, 16, 16)
    model(x).square().sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters() if p.requires_grad)
    inner = [layer for _, layer in threshold_layers(model) if isinstance(layer, QuantConv2d)]
    assert {layer.spec.act_bits for layer in inner} == {act_bits}
    assert {layer.spec.weight_bits for layer in inner} == {weight_bits}
    with torch.no_grad():
        assert model.eval()(x).isfinite().all()


def test_mobilenet_mixes_as_published() -> None:
    model = create_model("mobilenet_v2", bits=4)
    kinds = {name: layer.spec.transform for name, layer in threshold_layers(model)}
    assert sum(kinds.values()) == 17  # the linear bottlenecks
    assert all(name.endswith(("conv.1", "conv.2")) for name, transformed in kinds.items() if transformed)
    plain = {layer.spec.weight_norm for _, layer in threshold_layers(model) if not layer.spec.transform}
    assert plain == {"center"}
    assert not any(layer.spec.transform for _, layer in threshold_layers(create_model("mobilenetv2", bits=4)))


def test_widths_have_torchvisions_shapes() -> None:
    from torchvision.models import mobilenet_v2

    for width, name in ((1.0, "mobilenet_v2"), (0.5, "mobilenet_v2_x0_5"), (1.4, "mobilenet_v2_x1_4")):
        theirs = {k: v.shape for k, v in mobilenet_v2(width_mult=width).state_dict().items()}
        ours = {k: v.shape for k, v in create_model(name, bits=32).state_dict().items()}
        assert ours == theirs


@pytest.mark.parametrize(
    ("spelling", "name", "preset"),
    [
        ("res20", "resnet20", "apot-cifar"),
        ("resnet20", "resnet20", "apot-cifar"),
        ("resnet_20", "resnet20", "fat-cifar"),
        ("ResNet-56", "resnet56", "apot-cifar"),
        ("vgg_7_bn", "vgg_small", "fat-cifar"),
        ("vgg_16_bn", "vgg16", "fat-cifar"),
        ("resnet18", "resnet18", "apot-imagenet"),
        ("resnet_34", "resnet34", "fat-imagenet"),
        ("mobilenet_v2", "mobilenet_v2", "fat-imagenet"),
        ("mobilenetv2", "mobilenet_v2", "apot-imagenet"),
    ],
)
def test_published_spellings(spelling: str, name: str, preset: str) -> None:
    assert find_architecture(spelling).name == name
    assert default_preset(spelling) == preset


def test_full_precision_keeps_the_published_ends() -> None:
    resnet = create_model("res20", bits=32)
    assert resnet.conv1.spec == resnet.fc.spec == EIGHT_BIT  # type: ignore[union-attr]
    assert not list(threshold_layers(resnet))
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


@pytest.mark.parametrize(
    "name",
    ["vgg_tiny"]
    + [pytest.param(name, marks=pytest.mark.slow) for name in ("resnet20", "vgg_small", "resnet18", "mobilenet_v2")],
)
def test_a_network_of_each_family_compiles_in_one_graph(name: str) -> None:
    # float64: in float32 another rounding would move single values to the next level, and those the logits
    model = create_model(name, bits=4, num_classes=5).eval().double()
    x = torch.rand(2, 3, 32, 32, dtype=torch.float64)
    with torch.no_grad():
        torch.testing.assert_close(torch.compile(model, backend="aot_eager", fullgraph=True)(x), model(x))
