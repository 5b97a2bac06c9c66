from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from apot_fat import load_weights
from apot_fat.checkpoint import best_accuracy, checkpoint_thresholds, read_checkpoint, state_dict_of
from apot_fat.data import ImageBatches, ImageSet
from apot_fat.data.normalization import CIFAR_APOT
from apot_fat.models import create_model
from apot_fat.quant import ALPHA_FLOOR
from apot_fat.quant.all_layers import clipping_table
from apot_fat.training import evaluate

QUANTIZER = re.compile(r"\.(weight_alpha|act_alpha|transform)$")


def published(state: dict[str, torch.Tensor], *, fat: bool) -> dict[str, torch.Tensor]:
    """A state dict of ours under the names the published code gives its parameters."""
    renamed = {}
    for name, tensor in state.items():
        name = name.replace(".weight_alpha", ".weight_quant.wgt_alpha")
        name = name.replace(".transform", ".weight_quant.transform.weight")
        renamed[f"module.{name.replace('fc.', 'linear.') if fat else name}"] = tensor
    if fat:
        renamed["module.conv1.transform.weight"] = torch.ones(16, 16)
    return renamed


@pytest.mark.parametrize("arch", ["res20", "resnet_20"])
@pytest.mark.parametrize("wrap", [None, "state_dict", "model"])
def test_published_names_load(arch: str, wrap: str | None) -> None:
    source, target = create_model(arch, bits=3), create_model(arch, bits=3)
    state = published(source.state_dict(), fat="_" in arch)
    load_weights(target, state if wrap is None else {wrap: state, "epoch": 3, "best_acc1": 91.5})
    for name, tensor in source.state_dict().items():
        torch.testing.assert_close(target.state_dict()[name], tensor, atol=0, rtol=0)


@pytest.mark.parametrize("arch", ["resnet18", "resnet_18", "mobilenet_v2"])
def test_unused_thresholds_of_published_32_bit_networks_are_left_out(arch: str) -> None:
    source, target = create_model(arch, bits=32, num_classes=4), create_model(arch, bits=32, num_classes=4)
    quantized = create_model(arch, bits=4, num_classes=4)
    unused = {name: tensor.clone() for name, tensor in quantized.state_dict().items() if QUANTIZER.search(name)}
    assert unused
    load_weights(target, {"state_dict": published({**source.state_dict(), **unused}, fat="_" in arch)})
    for name, tensor in source.state_dict().items():
        torch.testing.assert_close(target.state_dict()[name], tensor, atol=0, rtol=0)
    load_weights(quantized, {**quantized.state_dict(), **{name: t + 1 for name, t in unused.items()}})
    for name, tensor in unused.items():
        torch.testing.assert_close(quantized.state_dict()[name], tensor + 1)
    for foreign in ("stem.act_alpha", "layer1.act_alpha", "fc.alpha"):
        with pytest.raises(ValueError, match=f"left over {foreign}"):
            load_weights(target, {**source.state_dict(), foreign: torch.ones(())})
    trained = {name: tensor + i for i, (name, tensor) in enumerate(unused.items())}
    with pytest.raises(ValueError, match=r"left over .* the network full-precision: check the bits"):
        load_weights(target, {**source.state_dict(), **trained})


def test_misfits_name_what_is_wrong_and_change_nothing() -> None:
    model = create_model("res20", bits=3)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    state = create_model("res20", bits=3).state_dict()
    with pytest.raises(ValueError, match=r"missing fc\.bias"):
        load_weights(model, {name: t for name, t in state.items() if name != "fc.bias"})
    with pytest.raises(ValueError, match="left over extra"):
        load_weights(model, {**state, "extra": torch.ones(1)})
    with pytest.raises(ValueError, match=r"of another shape fc\.bias \(100,\) for \(10,\)"):
        load_weights(model, {**state, "fc.bias": torch.ones(100)})
    with pytest.raises(ValueError, match="the weights are full-precision, the network quantized"):
        load_weights(model, create_model("res20", bits=32).state_dict())
    with pytest.raises(ValueError, match="does not fit this CifarResNet"):
        load_weights(model, create_model("res32", bits=3).state_dict())
    nothing: list[Any] = [{"epoch": 3}, {1: torch.ones(2)}, {"state_dict": {0: torch.ones(2)}}, {"state_dict": [1]}]
    for none in nothing:
        with pytest.raises(ValueError, match="holds no state dict"):
            load_weights(model, none)
    for odd in (torch.eye(2).to_sparse(), torch.empty(10, device="meta")):
        with pytest.raises(ValueError, match=r"fc\.bias is a tensor .*; expected one that holds each"):
            load_weights(model, {**state, "fc.bias": odd})
    for name, tensor in model.state_dict().items():
        torch.testing.assert_close(tensor, before[name], atol=0, rtol=0)


def test_a_network_s_own_names_are_never_renamed() -> None:
    class Named(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear, self.fc, self.module = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4)

    source = Named().state_dict()
    for state in (source, {f"module.{name}": tensor for name, tensor in source.items()}):
        torch.testing.assert_close(dict(load_weights(Named(), state).state_dict()), dict(source), atol=0, rtol=0)


def test_another_bit_width_keeps_initial_thresholds() -> None:
    full = create_model("res20", bits=32)
    quantized = load_weights(create_model("resnet_20", bits=4), full.state_dict(), other_bits=True)
    conv = "layer1.0.conv1"
    torch.testing.assert_close(
        quantized.get_parameter(f"{conv}.weight"), full.get_parameter(f"{conv}.weight"), atol=0, rtol=0
    )
    alpha = quantized.get_parameter(f"{conv}.act_alpha")
    assert alpha.item() == 5.0
    alpha.data.fill_(2.5)
    lower = load_weights(create_model("resnet_20", bits=3), quantized.state_dict(), other_bits=True)
    assert lower.get_parameter(f"{conv}.act_alpha").item() == 2.5
    load_weights(create_model("res20", bits=32), quantized.state_dict(), other_bits=True)
    vgg = create_model("vgg_7_bn", bits=32)  # its convolutions have biases, the quantized ones have none
    load_weights(create_model("vgg_7_bn", bits=5), vgg.state_dict(), other_bits=True)
    with pytest.raises(ValueError, match="left over"):
        load_weights(create_model("vgg_7_bn", bits=5), vgg.state_dict())


def test_best_accuracy_and_thresholds_without_a_network() -> None:
    assert best_accuracy({"best_top1_acc": torch.tensor(91.25)}) == 91.25
    assert best_accuracy({}) is None
    model = create_model("res20", bits=3)
    found = checkpoint_thresholds({"state_dict": published(model.state_dict(), fat=False)})
    assert list(found.items()) == [(row.name, (row.weight_alpha, row.act_alpha)) for row in clipping_table(model)]


@pytest.mark.parametrize(("bits", "correct"), [(32, 959), (4, 941), (3, 946)])
def test_released_checkpoints(reference: Path, bits: int, correct: int) -> None:
    expected = json.loads((reference / "reference/released/expected.json").read_text())[f"res20_{bits}bit"]
    assert expected["correct"] == correct
    path = reference / f"reference/released/res20_{bits}bit/model_best.pth.tar"
    model = load_weights(create_model("res20", bits=bits), path)
    pixels = np.load(reference / "data/cifar10_lossless_test.npz")
    images = torch.from_numpy(pixels["images"]).permute(0, 2, 3, 1).contiguous()
    batches = ImageBatches(
        ImageSet(images, torch.from_numpy(pixels["labels"].astype(np.int64))), 100, torch.device("cpu"), *CIFAR_APOT
    )
    result = evaluate(model, batches)
    assert result.total == 1017
    assert abs(result.correct - correct) <= 1
    thresholds = [[round(row.weight_alpha or 0, 3), round(row.act_alpha or 0, 3)] for row in clipping_table(model)]
    assert thresholds == expected["alphas_weight_activation"]
    assert state_dict_of(read_checkpoint(path))


NAN, INF = float("nan"), float("inf")


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("layer1.0.conv1.weight_alpha", NAN, "holds nan, thresholds are finite"),
        ("layer1.0.conv1.act_alpha", -INF, "holds -inf, thresholds are finite"),
        ("layer1.0.conv2.weight", INF, "holds inf, weights and means are finite"),
        ("fc.bias", 1e39, "holds inf, weights and means are finite"),  # beyond the float32 of the network
        ("bn1.running_mean", NAN, "holds nan, weights and means are finite"),
        ("bn1.running_var", -0.5, "holds -0.5, variances are finite and at least 0"),
        ("bn1.running_var", INF, "holds inf, variances are finite and at least 0"),
        ("bn1.num_batches_tracked", 1 + 1j, "holds values of torch.complex64, expected real numbers"),
        ("layer1.0.conv1.act_alpha", 1 + 0j, "holds values of torch.complex64, expected real numbers"),
    ],
)
def test_values_that_no_network_has_are_refused(name: str, value: complex, message: str) -> None:
    model, source = create_model("res20", bits=3), create_model("res20", bits=3)
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    state = {key: tensor.double() if tensor.is_floating_point() else tensor for key, tensor in before.items()}
    kind = torch.complex64 if isinstance(value, complex) else torch.float64
    state[name] = source.state_dict()[name].to(kind)
    state[name].view(-1)[-1] = value
    with pytest.raises(ValueError, match=rf"{name} {message}"):
        load_weights(model, state)
    assert all(torch.equal(tensor, before[key]) for key, tensor in model.state_dict().items())
    if name.endswith("alpha"):
        with pytest.raises(ValueError, match=rf"^file: {name} {message}"):
            checkpoint_thresholds(state, "file")


def test_thresholds_at_or_below_zero_load_and_are_used_as_the_floor() -> None:
    model = create_model("res20", bits=3)
    state = model.state_dict()
    state["layer1.0.conv1.act_alpha"] = torch.tensor(-0.25)
    state["layer1.0.conv1.weight_alpha"] = torch.tensor(0.0)
    load_weights(model, state)
    assert model.get_parameter("layer1.0.conv1.act_alpha").item() == -0.25
    shown = checkpoint_thresholds(state)["layer1.0.conv1"]
    assert shown == pytest.approx((ALPHA_FLOOR, ALPHA_FLOOR))


def test_complex_buffers_of_a_network_of_one_s_own_load() -> None:
    model = torch.nn.Linear(2, 2)
    model.register_buffer("rotations", torch.tensor([1 + 2j, NAN]))
    state = {**model.state_dict(), "rotations": torch.tensor([1j, 2j])}
    assert load_weights(model, state).get_buffer("rotations")[1] == 2j


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64, torch.int32])
def test_weights_of_other_types_become_the_network_s(dtype: torch.dtype) -> None:
    model = create_model("res20", bits=3)
    state = {name: (10 * tensor).to(dtype) for name, tensor in model.state_dict().items()}
    load_weights(model, state)
    assert torch.equal(model.get_parameter("conv1.weight"), state["conv1.weight"].float())
    assert checkpoint_thresholds(state)["layer1.0.conv1"][0] == state["layer1.0.conv1.weight_alpha"].item()


def test_what_is_no_accuracy_is_not_shown_as_the_best() -> None:
    for wrong in (torch.rand(2), torch.tensor(1j), float("nan"), 10**400, -1, 101.0, "91", None):
        assert best_accuracy({"best_prec": wrong}) is None
    assert best_accuracy({"best_prec": torch.tensor([91.5])}) == 91.5
