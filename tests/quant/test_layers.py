from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from apot_fat import QuantConv2d, QuantLinear, QuantSpec, clipping_table, preset, set_bits, show_params
from apot_fat.quant import ALPHA_FLOOR, EIGHT_BIT, PRESETS, eight_bit_weight, keep_thresholds_positive, quantize

LAYER_BITS = (2, 3, 4, 5)
PUBLISHED = [name for name in PRESETS if name not in ("lsq", "pact")]  # by the authors of APoT and FAT


@pytest.mark.parametrize("bits", LAYER_BITS)
@pytest.mark.parametrize("name", [*PUBLISHED, "apot-imagenet-gradscale", "uniform-mobilenet-signed"])
def test_forward_and_gradients_equal_the_published_code(reference: Path, name: str, bits: int) -> None:
    arrays = np.load(reference / "reference/layers.npz")
    seeds = sorted({key.split("/")[2] for key in arrays.files if key.startswith(f"{name}/bit{bits}/")})
    assert seeds, f"no fixture for {name} at {bits} bits"
    for seed in seeds:
        given = {
            key.rsplit("/", 1)[1]: torch.from_numpy(arrays[key])
            for key in arrays.files
            if key.startswith(f"{name}/bit{bits}/{seed}/")
        }
        options = {"grad_scale": 0.05} if name.endswith("-gradscale") else {}
        base = name.removesuffix("-gradscale").removesuffix("-signed")
        layer = QuantConv2d(4, 6, 3, padding=1, spec=preset(base, bits=bits, **options))
        layer.load_state_dict({key: given[key] for key in layer.state_dict()})
        x = given["x"].requires_grad_()
        y = layer(x)
        y.backward(given["grad_out"])
        got = {"weight_q": layer.quantized_weight(), "act_q": layer.quantized_input(x), "y": y, "grad_x": x.grad}
        got |= {f"grad_{key}": parameter.grad for key, parameter in layer.named_parameters()}
        assert set(given) == {*got, *layer.state_dict(), "x", "grad_out"}
        for key, value in got.items():
            assert value is not None
            error = (value.detach() - given[key]).abs().max() / given[key].abs().max()
            assert error < 1e-5, f"{name} {bits} bits {seed} {key}: {error:.1e}"


@pytest.mark.parametrize("kind", ["first-conv", "last-fc"])
def test_the_8_bit_ends_equal_the_published_code_at_any_bits_set(reference: Path, kind: str) -> None:
    arrays = np.load(reference / "reference/layers.npz")
    keys = [key for key in arrays.files if key.startswith(f"{kind}/")]
    given = {key.rsplit("/", 1)[1]: torch.from_numpy(arrays[key]) for key in keys}
    first, last = QuantConv2d(3, 8, 3, padding=1, spec=EIGHT_BIT), QuantLinear(16, 10, spec=EIGHT_BIT)
    layer = first if kind == "first-conv" else last
    assert set(layer.state_dict()) == ({"weight"} if kind == "first-conv" else {"weight", "bias"})
    layer.load_state_dict({key: given[key] for key in layer.state_dict()})
    network = nn.ModuleList([layer, QuantLinear(4, 2)])
    assert [row.name for row in clipping_table(set_bits(network, 3))] == ["1"]
    assert layer.spec == EIGHT_BIT
    x = given["x"].requires_grad_()
    y = layer(x)
    y.backward(given["grad_out"])
    got = {"y": y.detach(), "grad_x": x.grad, **{f"grad_{k}": p.grad for k, p in layer.named_parameters()}}
    for key, value in got.items():
        torch.testing.assert_close(value, given[key], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("name", "value"), [("weight_bits", 4), ("act_bits", 8), ("weight_norm", "center"), ("weight_levels", "pot")]
)
def test_a_scale_by_the_maximum_is_for_the_8_bit_ends_alone(name: str, value: Any) -> None:
    wanted = getattr(EIGHT_BIT, name)
    with pytest.raises(ValueError, match=f"'max' with {name} {value!r}: choose {name} {wanted!r}, or weight_scale"):
        replace(EIGHT_BIT, **{name: value})


def test_a_layer_becomes_an_8_bit_end_and_another_again() -> None:
    layer, plain = QuantConv2d(4, 6, 3, spec=preset("fat-cifar"), relu=True), nn.Conv2d(4, 6, 3, bias=False)
    layer.spec = EIGHT_BIT
    with torch.no_grad():
        plain.weight.copy_(eight_bit_weight(layer.weight))
    x = torch.randn(2, 4, 5, 5)
    assert list(layer.state_dict()) == ["weight"]
    torch.testing.assert_close(layer(x), plain(x.relu()), atol=0, rtol=0)
    layer.spec = preset("apot-cifar")
    assert set(layer.state_dict()) == {"weight", "weight_alpha", "act_alpha"}


@pytest.mark.parametrize("bits", [2, 3, 8, 32])
@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_in_both_layers(name: str, bits: int) -> None:
    spec = preset(name, bits=bits)
    cases = [
        (QuantConv2d(4, 6, 3, padding=1, groups=2, spec=spec), torch.rand(2, 4, 5, 5)),
        (QuantLinear(4, 6, spec=spec), torch.rand(2, 3, 4)),
    ]
    for layer, x in cases:
        y = layer(x.requires_grad_())
        y.square().sum().backward()
        assert y.isfinite().all()
        assert x.grad is not None
        assert all(p.grad is not None and p.grad.isfinite().all() for p in layer.parameters() if p.requires_grad)
        again = copy.deepcopy(layer)
        again.load_state_dict(layer.state_dict())
        torch.testing.assert_close(again(x), y, atol=0, rtol=0)
        if bits == 32:
            assert dict(layer.named_parameters()).keys() <= {"weight", "bias"}


def test_published_arguments_mean_the_imagenet_variants() -> None:
    assert QuantSpec() == QuantConv2d(3, 8, 3).spec == QuantLinear(3, 8).spec == preset("apot-imagenet", bits=5)
    assert QuantConv2d(3, 8, 3, bit=3, additive=False).spec == preset("apot-imagenet-pot", bits=3)
    assert QuantLinear(3, 8, bit=4, power=False, grad_scale=0.1).spec == preset(
        "apot-imagenet-uniform", bits=4, grad_scale=0.1
    )
    assert QuantConv2d(3, 8, 3).bias is None
    assert QuantConv2d(3, 8, 3).bit == 5


def test_thresholds_are_0d_and_the_transform_square() -> None:
    layer = QuantConv2d(3, 8, 3, spec=preset("fat-cifar", bits=3))
    assert layer.weight_alpha is not None
    assert layer.act_alpha is not None
    assert layer.transform is not None
    assert (layer.weight_alpha.shape, layer.act_alpha.shape) == ((), ())
    assert layer.transform.shape == (8, 8)
    assert layer.transform.unique().tolist() == [0.125]
    mask = layer.mask_range()
    assert mask is not None
    assert 0 < mask[1] <= mask[0] < 1


@pytest.mark.parametrize("bits", [0, 1, 9, 33, 1.5, "4", True])
def test_bad_bits(bits: object) -> None:
    with pytest.raises(ValueError, match="choose an integer from 2 to 8, or 32"):
        QuantConv2d(3, 8, 3, bit=bits)  # type: ignore[arg-type]


def test_bad_presets_and_fields() -> None:
    with pytest.raises(ValueError, match="did you mean 'apot-cifar'"):
        preset("apot-cifra")
    with pytest.raises(ValueError, match="unknown field 'alpha'"):
        preset("apot-cifar", alpha=3)
    with pytest.raises(ValueError, match=r"weight_alpha -1\.0: must be positive"):
        preset("apot-cifar", weight_alpha=-1.0)
    with pytest.raises(ValueError, match="act_clip 'below'"):
        preset("apot-cifar", act_clip="below")


def test_set_bits_keeps_thresholds_and_creates_missing_ones() -> None:
    model = nn.Sequential(QuantConv2d(3, 4, 3, spec=preset("fat-cifar", bits=32)), QuantLinear(4, 2, bit=32))
    assert len(list(model.parameters())) == 3
    set_bits(model, 4)
    first = model[0]
    assert isinstance(first, QuantConv2d)
    assert first.weight_alpha is not None
    first.weight_alpha.data.fill_(1.25)
    set_bits(model, 3)
    assert first.weight_alpha.item() == 1.25
    assert first.spec.weight_bits == 3
    assert first.transform is not None
    with pytest.raises(ValueError, match="holds no QuantConv2d"):
        set_bits(nn.Linear(2, 2), 3)


@pytest.mark.parametrize("float_side", ["weight_bits", "act_bits"])
def test_set_bits_leaves_float_what_quantize_left_float(float_side: str) -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 4), nn.Linear(4, 2))
    quantize(model, 5, edge_bits=32, **{float_side: 32})  # type: ignore[arg-type]
    layer = model[1]
    assert isinstance(layer, QuantLinear)
    kept = set(layer.state_dict())
    for bits in (4, 2):
        set_bits(model, bits)
        assert {layer.spec.weight_bits, layer.spec.act_bits} == {bits, 32}
        assert getattr(layer.spec, float_side) == 32
        assert set(layer.state_dict()) == kept


def test_show_params_prints_the_published_line(capsys: pytest.CaptureFixture[str]) -> None:
    layer = QuantConv2d(3, 4, 3, spec=preset("apot-cifar", bits=3, weight_alpha=1.5694, act_alpha=1.4376))
    show_params(nn.Sequential(layer, nn.ReLU(), QuantLinear(4, 2, bit=32)))
    assert capsys.readouterr().out == "clipping threshold weight alpha: 1.569000, activation alpha: 1.438000\n"


def test_clipping_table() -> None:
    model = nn.Sequential(QuantConv2d(3, 4, 3, spec=preset("fat-cifar", bits=3)), nn.Linear(4, 2))
    (row,) = clipping_table(model)
    assert (row.name, row.weight_bits, row.act_bits, row.weight_alpha, row.act_alpha) == ("0", 3, 3, 3.0, 5.0)
    assert row.mask_max is not None


def test_thresholds_are_brought_back_above_zero() -> None:
    layer = QuantLinear(4, 2, bit=3)
    assert layer.act_alpha is not None
    assert keep_thresholds_positive(layer) == 0
    layer.act_alpha.data.fill_(-0.4)
    assert clipping_table(layer)[0].act_alpha == pytest.approx(ALPHA_FLOOR)
    assert layer(torch.rand(3, 4)).isfinite().all()
    assert keep_thresholds_positive(layer) == 1
    assert layer.act_alpha.item() == pytest.approx(ALPHA_FLOOR)


def test_a_constant_weight_is_finite() -> None:
    layer = QuantConv2d(2, 2, 3, spec=preset("apot-imagenet", bits=4))
    layer.weight.data.fill_(0.3)
    y = layer(torch.rand(1, 2, 5, 5))
    y.sum().backward()
    assert y.isfinite().all()
    assert layer.weight.grad is not None
    assert layer.weight.grad.isfinite().all()
