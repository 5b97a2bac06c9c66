from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from apot_fat import QuantConv2d, QuantLinear, dequantize, quantize, set_bits
from apot_fat.models import create_model
from apot_fat.quant import EightBitConv2d, EightBitLinear, fit_threshold, level_set, quant_layers, quantize_activation


class Odd(nn.Module):
    """A shared layer, a functional convolution, a nested Sequential, a subclass, attention, an unused layer."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.shared = nn.Conv2d(8, 8, 3, padding=1, groups=4)
        self.blocks = nn.Sequential(nn.Sequential(self.shared, nn.ReLU()), nn.Sequential(nn.GELU(), nn.Conv2d(8, 8, 1)))
        self.kernel = nn.Parameter(torch.randn(8, 8, 1, 1) * 0.1)
        self.own = OwnConv(8, 8, 1)
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.unused = nn.Linear(8, 8)
        self.head = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.shared(F.relu(self.stem(x)))
        x = self.own(F.conv2d(self.blocks(x), self.kernel))
        x = x.flatten(2).transpose(1, 2)
        return self.head(self.attention(x, x, x)[0].mean(1))


class OwnConv(nn.Conv2d):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * 2


@pytest.mark.parametrize("method", ["apot", "pot", "uniform", "fat", "fat-log", "fat-imagenet"])
def test_a_network_never_seen_before(method: str) -> None:
    model, x = Odd(), torch.randn(2, 3, 6, 6)
    before = dict(model.named_parameters())
    assert model.shared.weight is before["shared.weight"]
    assert model.training
    hooks: list[int] = []
    model.shared.register_forward_hook(lambda *_: hooks.append(1))
    done = quantize(model, 4, method, calibration=x)
    hooks.clear()
    assert model.training
    assert model.shared is model.blocks[0][0]  # type: ignore[index]
    assert isinstance(model.shared, QuantConv2d)
    assert isinstance(model.stem, EightBitConv2d)
    assert isinstance(model.head, EightBitLinear)
    assert model.shared.weight is before["shared.weight"]  # what an optimiser or a user held stays the parameter
    notes = {row.name: row.note for row in done.rows}
    assert set(done.converted) == {"stem", "shared", "blocks.1.1", "head"}
    assert set(done.left) == {"own", "attention.out_proj", "unused", "kernel", "attention.in_proj_weight"}
    assert "never called" in notes["unused"]
    assert "subclass" in notes["own"]
    assert "neither" in notes["kernel"]
    assert all(name in str(done) for name in notes)
    model.zero_grad()
    model(x).square().sum().backward()
    assert hooks == [1, 1]
    for name, parameter in model.named_parameters():
        if not name.startswith("unused"):
            assert parameter.grad is not None, name
            assert torch.isfinite(parameter.grad).all(), name


def test_signed_inputs_are_found_and_never_clipped_to_zero() -> None:
    model = nn.Sequential(
        nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 8), nn.GELU(), nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 2)
    )
    x = torch.randn(32, 4)
    quantize(model, 4, calibration=x, edge_bits=32)
    signed = {name: layer.spec.act_signed for name, layer in quant_layers(model)}
    assert signed == {"2": False, "4": True, "5": True}
    layer = model[5]
    assert isinstance(layer, QuantLinear)
    assert layer.act_alpha is not None
    x_q = layer.quantized_input(torch.tensor([-0.5, 0.0, 0.5]) * layer.act_alpha)
    assert x_q[0] == -x_q[2] != 0
    for kwargs, expected in (({}, True), ({"signed": False}, False), ({"signed": True}, True)):
        fresh = nn.Sequential(*(nn.Linear(3, 3) for _ in range(3)))
        note = quantize(fresh, 3, **kwargs).rows[1].note  # type: ignore[arg-type]
        assert next(quant_layers(fresh))[1].spec.act_signed is expected
        assert "no calibration batch" in note or "by hand" in note


def test_overrides_exclusions_and_set_bits() -> None:
    model = nn.Sequential(*(nn.Sequential(nn.Conv2d(2, 2, 1), nn.ReLU()) for _ in range(6)))
    given: dict[str, dict[str, object]] = {
        "[12].0": {"bits": 8},
        "2.0": {"weight_levels": "uniform", "act_bits": 32},
        "0.0": {"weight_bits": 5},
    }
    done = quantize(model, 3, act_bits=5, exclude=["3.*"], overrides=given, signed=False)
    rows = {row.name: (row.weight, row.input) for row in done.rows}
    assert rows == {
        "0.0": ("apot/5", "apot/5"),
        "1.0": ("apot/8", "apot/8"),
        "2.0": ("uniform/8", "float"),
        "3.0": ("float", "float"),
        "4.0": ("apot/3", "apot/5"),
        "5.0": ("8 bits", "float"),
    }
    set_bits(model, 2)
    assert [layer.spec.weight_bits for _, layer in quant_layers(model)] == [5, 8, 8, 2]
    assert model(torch.rand(1, 2, 3, 3)).isfinite().all()


def test_thresholds_of_least_squared_error() -> None:
    levels = level_set("apot", 4)
    values = torch.randn(5000).abs()
    alpha = fit_threshold(values, levels, signed=False)

    def error(a: float) -> float:
        return (quantize_activation(values, torch.tensor(a), levels) - values).square().mean().item()

    assert error(alpha) <= min(error(alpha * 0.9), error(alpha * 1.1), error(8.0))
    assert fit_threshold(-values, levels, signed=False) == 1.0
    assert fit_threshold(torch.zeros(3), levels, signed=True) == 1.0


def test_dequantize_folds_the_quantized_weights() -> None:
    model = create_model("resnet20", "fat-cifar", 3, num_classes=4).eval()
    before = copy.deepcopy(model.state_dict())
    plain = dequantize(model)
    assert not list(quant_layers(plain))
    assert not any(name.endswith(("alpha", "transform")) for name in plain.state_dict())
    torch.testing.assert_close(dict(model.state_dict()), dict(before), atol=0, rtol=0)
    quantized = dict(quant_layers(model))["layer1.0.conv2"]
    folded = plain.get_submodule("layer1.0.conv2")
    assert isinstance(folded, nn.Conv2d)
    torch.testing.assert_close(folded.weight, quantized.quantized_weight(), atol=0, rtol=0)
    set_bits(model, 32)  # float inputs, and the ReLU that the convolutions take
    weights = dict(plain.named_parameters())
    for name, parameter in model.named_parameters():
        parameter.data.copy_(weights[name])
    x = torch.randn(2, 3, 16, 16)
    torch.testing.assert_close(plain(x), model.eval()(x), atol=1e-5, rtol=1e-5)


def test_bad_requests_change_nothing() -> None:
    model = Odd()
    for kwargs, message in (
        ({"method": "apott"}, "did you mean 'apot'"),
        ({"bits": 9}, "bits 9"),
        ({"bits": 4.0}, "bits 4.0"),
        ({"edge_bits": 4}, "edge_bits 4"),
        ({"exclude": ["layer9.*"]}, "'layer9.*' matches no"),
        ({"exclude": "stem"}, "give a list"),
        ({"overrides": {"shared": {"bit": 3}}}, "unknown field 'bit'"),
        ({"overrides": {"nothing": {"bits": 3}}}, "'nothing' matches no"),
        ({"overrides": {"shared": {"bits": 1}}}, "bits 1"),
        ({"calibration": torch.randn(2, 5)}, "refuses it"),
    ):
        with pytest.raises(ValueError, match=message):
            quantize(model, **kwargs)
        assert type(model.stem) is nn.Conv2d
        assert type(model.shared) is nn.Conv2d
        assert model.training
    with pytest.raises(ValueError, match="nothing to convert"):
        quantize(nn.ReLU())
    quantize(model)
    with pytest.raises(ValueError, match="quantized already"):
        quantize(model)
