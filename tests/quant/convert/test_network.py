from __future__ import annotations

import copy
import itertools
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from apot_fat import (
    QuantConv2d,
    QuantLinear,
    Reconstruction,
    allocate_bits,
    dequantize,
    load_packed,
    preset,
    quantize,
    save_packed,
    set_bits,
)
from apot_fat.models import create_model
from apot_fat.quant import (
    EIGHT_BIT,
    fit_threshold,
    initialize_thresholds,
    level_set,
    quantize_activation,
    set_kernels,
    threshold_layers,
)
from apot_fat.quant.fast import kernels
from apot_fat.quant.watching import watch_inputs
from tests.quant.convert.conftest import Released


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
    assert model.stem.spec == model.head.spec == EIGHT_BIT
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
    signed = {name: layer.spec.act_signed for name, layer in threshold_layers(model)}
    assert signed == {"2": False, "4": True, "5": True}
    layer = model[5]
    assert isinstance(layer, QuantLinear)
    assert layer.act_alpha is not None
    x_q = layer.quantized_input(torch.tensor([-0.5, 0.0, 0.5]) * layer.act_alpha)
    assert x_q[0] == -x_q[2] != 0
    for kwargs, expected in (({}, True), ({"signed": False}, False), ({"signed": True}, True)):
        fresh = nn.Sequential(*(nn.Linear(3, 3) for _ in range(3)))
        note = quantize(fresh, 3, **kwargs).rows[1].note  # type: ignore[arg-type]
        assert next(threshold_layers(fresh))[1].spec.act_signed is expected
        assert "no calibration batch" in note or "by hand" in note


class Heads(nn.Module):
    """Two heads on one trunk that calls its convolution by keyword; and what needs no layer before it."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.body = nn.Conv2d(8, 8, 3, padding=1)
        self.classes = nn.Conv2d(8, 5, 1)
        self.boxes = nn.Conv2d(8, 4, 1)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        x = F.relu(self.body(input=F.relu(self.stem(x))), inplace=True)
        return {"classes": self.classes(x), "boxes": self.boxes(x).sigmoid()}


class Residual(nn.Module):
    """No head: every block's last layer reaches the output by the skip connections."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Linear(6, 8)
        self.layers = nn.ModuleList(nn.Linear(8, 8) for _ in range(6))

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for layer in self.layers:
            x = x + layer(F.relu(x))
        return x


def test_first_and_last_layers_are_those_that_none_comes_before_or_after() -> None:
    x = torch.randn(4, 3, 6, 6)
    done = quantize(heads := Heads(), 8, calibration=x)
    assert {row.name: row.note for row in done.rows if "layer" in row.note} == {
        "stem": "first layer",
        "classes": "last layer",
        "boxes": "last layer",
    }
    assert type(heads.body) is QuantConv2d
    assert done.error is not None
    assert done.error < 0.05
    notes = [row.note for row in quantize(Residual(), 8, calibration=torch.randn(16, 6)).rows]
    assert [note for note in notes if note.endswith("layer")] == ["first layer", "last layer"]
    blind = Residual()
    blind.forward = torch.no_grad()(blind.forward)  # type: ignore[method-assign]
    notes = [row.note for row in quantize(blind, 8, calibration=torch.randn(16, 6)).rows]
    assert [note for note in notes if note.endswith("layer")] == ["first layer", "last layer"]


def trained_network() -> tuple[nn.Module, Tensor]:
    """A network with batch norms whose statistics are those of its images."""
    model = nn.Sequential(
        *(nn.Conv2d(3, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16), nn.ReLU()),
        *(nn.Conv2d(16, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16), nn.ReLU()),
        *(nn.Conv2d(16, 16, 3, padding=1, groups=16), nn.BatchNorm2d(16), nn.Hardswish()),
        *(nn.Conv2d(16, 8, 1), nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(32, 10)),
    )
    x = torch.randn(64, 3, 8, 8)
    for _ in range(30):
        model(x)
    return model.eval(), x


@pytest.mark.parametrize(("bits", "limit"), [(8, 0.05), (6, 0.1), (4, 0.3)])
@pytest.mark.parametrize("method", ["apot", "uniform", "fat"])
def test_a_network_goes_on_computing_what_it_did(method: str, bits: int, limit: float) -> None:
    model, x = trained_network()
    new = torch.randn(64, 3, 8, 8)
    with torch.no_grad():
        expected, expected_new = model(x), model(new)
        done = quantize(model, bits, method, calibration=x)
        got = model(x)
        assert (model(new) - expected_new).norm() < limit * expected_new.norm()
    error = ((got - expected).norm() / expected.norm()).item()
    assert done.error == pytest.approx(error, rel=1e-4)
    assert done.sqnr == pytest.approx(-20 * torch.tensor(error).log10().item(), rel=1e-4)
    errors = [row.error for row in done.rows]
    assert all(e is not None and e < 2 * limit for e in errors), errors
    assert f"error {error:.3g}" in str(done)


def test_batch_norms_move_by_what_quantization_moved() -> None:
    model, x = trained_network()
    before = copy.deepcopy(model)
    quantize(model, 2, calibration=x)
    for name, norm in before.named_modules():
        if isinstance(norm, nn.BatchNorm2d):
            means = [mean_before(network, name, x) for network in (before, model)]
            moved = model.get_submodule(name).running_mean - norm.running_mean  # type: ignore[operator]
            torch.testing.assert_close(moved, means[1] - means[0], rtol=1e-3, atol=1e-4)


def test_batch_norms_move_alike_whatever_the_size_of_the_batches() -> None:
    torch.manual_seed(1)
    norms = [nn.BatchNorm1d(64) for _ in range(3)]
    widths = itertools.pairwise((10, 64, 64, 64))
    layers = [(nn.Linear(a, b), norm, nn.ReLU()) for (a, b), norm in zip(widths, norms, strict=True)]
    model, x = nn.Sequential(*itertools.chain(*layers), nn.Linear(64, 5)), torch.randn(512, 10)
    with torch.no_grad():
        for _ in range(30):
            model(x[torch.randperm(512)[:128]])
    errors = {}
    for size in (512, 32, 4, 2, 1):
        done = quantize(network := copy.deepcopy(model), 4, calibration=x.split(size))
        assert done.error is not None
        errors[size] = done.error
        assert not torch.equal(network[1].running_mean, model[1].running_mean)  # type: ignore[arg-type]
    assert max(errors.values()) < 1.1 * errors[512], errors


def test_a_batch_norm_that_sees_few_values_stays() -> None:
    model = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.ReLU(), nn.Linear(6, 6), nn.Linear(6, 2)).eval()
    before = copy.deepcopy(model[1].state_dict())
    quantize(model, 3, calibration=torch.randn(15, 4))
    torch.testing.assert_close(model[1].state_dict(), before, atol=0, rtol=0)


def mean_before(network: nn.Module, name: str, x: Tensor) -> Tensor:
    seen: list[Tensor] = []
    with watch_inputs([network.get_submodule(name)], lambda _, inputs: seen.append(inputs[0])):
        network(x)
    return seen[0].mean((0, 2, 3))


def test_calibration_sees_all_of_an_image() -> None:
    model = nn.Sequential(nn.Conv2d(1, 4, 1), nn.ReLU(), nn.Conv2d(4, 4, 1), nn.ReLU(), nn.Conv2d(4, 4, 1))
    nn.init.constant_(model[0].weight, 1.0)  # type: ignore[arg-type]
    nn.init.constant_(model[0].bias, 0.0)  # type: ignore[arg-type]
    x = torch.full((64, 1, 64, 64), 0.1)  # 2^20 values behind the first layer, as even a stride as there is
    x[..., 17] = 4.0
    quantize(model, 8, "uniform", calibration=x)
    assert model[2].act_alpha.item() > 3  # type: ignore[operator]


def test_calibration_comes_as_people_have_it() -> None:
    x = torch.randn(64, 3, 8, 8)
    labels = torch.zeros(64)
    loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(x, labels), batch_size=16)
    thresholds = []
    model, _ = trained_network()
    for calibration in (x, [x], loader, [(part, labels) for part in x.split(16)], iter(x.split(16))):
        network = copy.deepcopy(model)
        done = quantize(network, 8, calibration=calibration)
        thresholds.append(dict(threshold_layers(network))["3"].act_alpha.item())  # type: ignore[union-attr]
        assert done.error is not None
        assert done.error < 0.05
    assert thresholds == pytest.approx([thresholds[0]] * 5, rel=0.05)

    class Keywords(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4))

        def forward(self, *, tokens: Tensor) -> Tensor:
            return self.layers(tokens)

    assert quantize(Keywords(), 8, calibration=[{"tokens": torch.randn(32, 4)}]).error is not None
    with pytest.raises(ValueError, match="calibration: no batch"):
        quantize(Keywords(), 8, calibration=[])


def test_an_encoder_layer_runs_quantized_in_evaluation_too() -> None:
    encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(16, 2, 32, dropout=0.0, batch_first=True), 2)
    model = nn.Sequential(nn.Linear(8, 16), encoder, nn.Linear(16, 4))
    x = torch.randn(8, 5, 8)
    done = quantize(model, 3, calibration=x)
    assert {"1.layers.0.linear1", "1.layers.1.linear2"} <= set(done.converted)
    with torch.no_grad():
        torch.testing.assert_close(model.eval()(x), model.train()(x))


class ReadsWeights(nn.Module):
    """Calls its layer only while somebody looks."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(4, 4) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x) if layer._forward_pre_hooks else F.linear(x, layer.weight, layer.bias)  # type: ignore[arg-type]
        return x


def test_what_would_not_run_quantized_is_an_error_or_left() -> None:
    model = ReadsWeights()
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match=r"ReadsWeights: layer 'layers.0', .* exclude=\['layers.0', 'layers.1'"):
        quantize(model, 4, calibration=torch.randn(16, 4))
    assert all(type(layer) is nn.Linear for layer in model.layers)
    assert before.keys() == model.state_dict().keys()
    plain = nn.Sequential(*(nn.Linear(4, 4) for _ in range(4)))
    plain[1].forward = plain[1].forward
    done = quantize(plain, 4, calibration=torch.randn(16, 4))
    assert {row.name: row.note for row in done.rows}["1"].startswith("its forward was replaced")
    assert "1" in done.left


@pytest.mark.parametrize("arch", ["resnet20", "resnet_20"])
def test_our_own_networks_go_through_as_they_are(arch: str) -> None:
    model = create_model(arch, bits=32, num_classes=4).eval()
    x = torch.randn(16, 3, 16, 16)
    expected = model(x)
    done = quantize(model, 8, "apot", calibration=x)
    assert model.conv1.spec == EIGHT_BIT  # type: ignore[union-attr]
    assert len(done.converted) == 22
    signed = {layer.spec.act_signed for _, layer in threshold_layers(model)}
    assert signed == {False}
    assert (model(x) - expected).norm() < 0.05 * expected.norm()


def test_an_8_bit_end_takes_the_relu_that_the_layer_took() -> None:
    spec = preset("apot-cifar", 32)
    model = nn.Sequential(QuantConv2d(3, 4, 3, spec=spec, relu=True), nn.ReLU(), QuantConv2d(4, 4, 3, spec=spec)).eval()
    x = torch.randn(4, 3, 12, 12)
    expected = model(x)
    quantize(model, 8, calibration=x)
    assert [layer.spec for layer in (model[0], model[2])] == [EIGHT_BIT, EIGHT_BIT]
    assert (model(x) - expected).norm() < 0.02 * expected.norm()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("method", "bits", "at_least"),
    [
        *(("apot", 8, 956), ("apot", 6, 950), ("apot", 4, 900), ("apot", 3, 880)),
        *(("uniform", 8, 950), ("uniform", 6, 945), ("uniform", 4, 900), ("uniform", 3, 870)),
        *(("fat", 8, 945), ("fat", 6, 945), ("fat", 4, 900), ("fat", 3, 870)),
    ],
)
def test_the_released_network_keeps_its_accuracy(method: str, bits: int, at_least: int, released: Released) -> None:
    quantize(released.model, bits, method, calibration=released.images[:500])
    correct = released.correct(released.model)
    print(f"{method}, {bits} bits, calibrated: {correct} of 1,017")
    assert correct >= at_least


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
    assert [layer.spec.weight_bits for _, layer in threshold_layers(model)] == [5, 8, 8, 2]
    assert model(torch.rand(1, 2, 3, 3)).isfinite().all()


@pytest.mark.parametrize("method", ["apot", "fat"])
def test_a_network_comes_back_from_32_bits(method: str, tmp_path: Path) -> None:
    model, x = trained_network()
    with torch.no_grad():
        expected = model(x)
        quantize(model, 4, method, calibration=x)
        before = model(x)
        set_bits(model, 32)
        assert (model(x) - expected).norm() < 0.2 * expected.norm()
        save_packed(model, tmp_path / "float.safetensors")
        loaded = load_packed(tmp_path / "float.safetensors", trained_network()[0])
        for network in (model,) if method == "fat" else (model, loaded):  # a file holds no transform
            torch.testing.assert_close(set_bits(network, 4)(x), before, atol=0, rtol=0)


def test_weights_that_were_float_from_the_start_get_fitted_thresholds() -> None:
    model, x = trained_network()
    with torch.no_grad():
        expected = model(x)
        quantize(model, 32, calibration=x)
        for _, layer in threshold_layers(set_bits(model, 4)):
            assert (layer.quantized_weight() - layer.weight).norm() < 0.2 * layer.weight.norm()
        initialize_thresholds(model, x)
        assert (model(x) - expected).norm() < 0.4 * expected.norm()


def test_a_preset_s_network_starts_again_at_its_constants() -> None:
    model = create_model("resnet20", "apot-cifar", 3)
    for _, layer in threshold_layers(model):
        layer.weight_alpha.data.fill_(2.0)  # type: ignore[union-attr]
        layer.act_alpha.data.fill_(2.0)  # type: ignore[union-attr]
    set_bits(set_bits(model, 32), 3)
    assert {layer.clipping_thresholds() for _, layer in threshold_layers(model)} == {(3.0, 8.0)}


def test_a_float_side_is_called_float() -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3), nn.Conv2d(8, 4, 3))
    (row,) = [row for row in quantize(model, 4, "fat", weight_bits=32).rows if row.name == "1"]
    assert (row.weight, row.input) == ("float", "uniform/4")
    assert "fat" not in repr(model[1])


def test_thresholds_of_least_squared_error() -> None:
    levels = level_set("apot", 4)
    values = torch.randn(5000).abs()
    alpha = fit_threshold(values, levels, signed=False)

    def error(a: float) -> float:
        return (quantize_activation(values, torch.tensor(a), levels) - values).square().mean().item()

    assert error(alpha) <= min(error(alpha * 0.9), error(alpha * 1.1), error(8.0))
    assert fit_threshold(-values, levels, signed=False) == 1.0
    assert fit_threshold(torch.zeros(3), levels, signed=True) == 1.0


def test_quantizers_are_not_compiled_for_two_passes_over_few_inputs(monkeypatch: pytest.MonkeyPatch) -> None:
    x, large = torch.randn(16, 3, 8, 8), torch.zeros(1 << 18)
    set_kernels("auto")
    monkeypatch.setattr(kernels, "AUTO_ELEMENTS", large.numel())
    monkeypatch.setattr(kernels, "compiler_works", lambda _: True)
    for few in (True, False):
        model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4), nn.Conv2d(4, 4, 3))
        found: list[bool] = []
        model[2].register_forward_hook(lambda *_, found=found: found.append(kernels._compiles(large)))
        monkeypatch.setattr("apot_fat.quant.convert.network.COMPILED_FROM", 1 << 20 if few else 0)
        quantize(model, 4, calibration=x)
        assert found[0]
        assert kernels._compiles(large)
        assert found[-2:] == [not few] * 2  # batch norms moved, and outputs compared


def test_dequantize_folds_the_quantized_weights() -> None:
    model = create_model("resnet20", "fat-cifar", 3, num_classes=4).eval()
    before = copy.deepcopy(model.state_dict())
    plain = dequantize(model)
    assert not list(threshold_layers(plain))
    assert not any(name.endswith(("alpha", "transform")) for name in plain.state_dict())
    torch.testing.assert_close(dict(model.state_dict()), dict(before), atol=0, rtol=0)
    quantized = dict(threshold_layers(model))["layer1.0.conv2"]
    folded = plain.get_submodule("layer1.0.conv2")
    assert isinstance(folded, nn.Conv2d)
    torch.testing.assert_close(folded.weight, quantized.quantized_weight(), atol=0, rtol=0)
    set_bits(model, 32)  # float inputs, and the ReLU that the convolutions take
    weights = dict(plain.named_parameters())
    for name, parameter in model.named_parameters():
        parameter.data.copy_(weights[name])
    x = torch.randn(2, 3, 16, 16)
    torch.testing.assert_close(plain(x), model.eval()(x), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("wrong", [float("nan"), float("inf")])
@pytest.mark.parametrize("work", [quantize, allocate_bits])
def test_inputs_and_networks_that_are_not_finite_are_refused(work: Callable[..., object], wrong: float) -> None:
    model, x = trained_network()
    before = copy.deepcopy(model.state_dict())
    damaged = x.clone()
    damaged[40, 1, 2, 3] = wrong
    with pytest.raises(ValueError, match=r"calibration: batch 3 of 4 holds NaN or infinity"):
        work(model, calibration=damaged.split(16))
    torch.testing.assert_close(dict(model.state_dict()), dict(before), atol=0, rtol=0)
    with torch.no_grad():
        model[7].bias[0] = wrong  # type: ignore[index]
        before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match=r"Sequential: layer '9' takes NaN or infinity on batch 1 of 1"):
        work(model, calibration=x)
    torch.testing.assert_close(dict(model.state_dict()), dict(before), atol=0, rtol=0, equal_nan=True)
    with torch.no_grad():
        model[7].bias[0] = 0.0  # type: ignore[index]
        model[12].bias[0] = float("nan")  # type: ignore[index]
    with pytest.raises(ValueError, match=r"Sequential: it gives NaN"):
        work(model, calibration=x)


class Masked(nn.Module):
    """Takes tokens, and a mask of −∞ by keyword."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(9, 8)
        self.layers = nn.ModuleList(nn.Linear(8, 8) for _ in range(3))

    def forward(self, tokens: Tensor, mask: Tensor | None = None) -> Tensor:
        x = self.embedding(tokens)
        scores = x @ x.transpose(1, 2) if mask is None else x @ x.transpose(1, 2) + mask
        x = scores.softmax(-1) @ x
        for layer in self.layers:
            x = layer(x)
        return x


def test_tokens_and_masks_are_calibrated_on() -> None:
    tokens, mask = torch.randint(9, (4, 5)), torch.full((5, 5), float("-inf")).triu(1)
    for calibration in (tokens, [{"tokens": tokens, "mask": mask}]):
        done = quantize(Masked(), 8, calibration=calibration)
        assert done.error is not None
        assert done.error < 0.1


@pytest.mark.parametrize("tuned", [False, Reconstruction(steps=2, joint_steps=2)])
def test_a_network_quantized_in_inference_mode_can_be_trained(tuned: bool | Reconstruction) -> None:
    model, x = trained_network()
    plain, x = copy.deepcopy(model), x.clone()
    quantize(plain, 4, calibration=x, reconstruct=tuned)
    set_bits(set_bits(plain, 32), 4)
    with torch.inference_mode():
        assert allocate_bits(model, x.clone(), average=8).rows[0].bits == 8
        done = quantize(model, 4, calibration=[x.clone()], reconstruct=tuned)
        set_bits(set_bits(model, 32), 4)
    assert done.error is not None
    assert not any(tensor.is_inference() for tensor in (*model.parameters(), *model.buffers()))
    torch.testing.assert_close(model(x), plain(x), atol=0, rtol=0)
    model.train()(x).square().sum().backward()
    assert all(parameter.grad is not None for parameter in model.parameters())
    with torch.inference_mode():
        made = nn.Sequential(*(nn.Linear(4, 4) for _ in range(3)))
    with pytest.raises(ValueError, match=r"Sequential was made within torch\.inference_mode"):
        quantize(made, 4)


@pytest.mark.parametrize("error", [AssertionError(), KeyError("image size")])
def test_a_network_may_refuse_a_batch_in_any_way(error: Exception) -> None:
    class Picky(nn.Sequential):
        def forward(self, x: Tensor) -> Tensor:
            raise error

    with pytest.raises(
        ValueError, match=r"of shape \(2, 4\): the network refuses it \((AssertionError|'image size')\)"
    ):
        quantize(Picky(nn.Linear(4, 4), nn.Linear(4, 4)), calibration=torch.rand(2, 4))


def test_bad_requests_change_nothing() -> None:
    model = Odd()
    for kwargs, message in (
        ({"method": "apott"}, "did you mean 'apot'"),
        ({"bits": 9}, "bits 9"),
        ({"bits": 4.0}, "bits 4.0"),
        ({"edge_bits": 4}, "edge_bits 4"),
        ({"exclude": ["layer9.*"]}, "'layer9.*' matches no"),
        ({"exclude": "stem"}, "give a list"),
        ({"exclude": [3]}, "exclude .* give a list"),
        ({"exclude": 3}, "exclude 3: give a list"),
        ({"overrides": {"stem": 4}}, "overrides .* give fields by pattern, such as"),
        ({"overrides": ["stem"]}, "overrides .* give fields by pattern, such as"),
        ({"overrides": {3: {"bits": 4}}}, "overrides .* give a list"),
        ({"calibration": 5}, "calibration 5: give a tensor of inputs, or"),
        ({"calibration": torch.empty(0, 3, 8, 8)}, "batch 1 of 1 holds no inputs"),
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
