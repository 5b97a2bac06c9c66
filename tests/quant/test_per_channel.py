"""One weight threshold an output channel: what holds for a layer's holds for each channel's."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from apot_fat import QuantConv2d, QuantLinear, clipping_table, load_packed, load_weights, preset, quantize, save_packed
from apot_fat.checkpoint import checkpoint_thresholds
from apot_fat.integer import IntegerLayer, simulated_accumulator
from apot_fat.models import create_model
from apot_fat.quant import (
    ALPHA_FLOOR,
    QuantSpec,
    dequantize,
    fit_threshold,
    initialize_thresholds,
    keep_thresholds_positive,
    level_set,
    quantize_weight,
    set_bits,
    threshold_layers,
)
from apot_fat.quant.seam import set_kernels


def weight(shape: tuple[int, ...], layout: str) -> Tensor:
    w = torch.randn(shape)
    if layout == "channels-last":
        return w.to(memory_format=torch.channels_last)
    return torch.stack([w, w], -1)[..., 0] if layout == "sliced" else w


def grads(w: Tensor, alpha: Tensor, family: str, *, clip: bool) -> tuple[Tensor, ...]:
    leaf, threshold = w.detach().requires_grad_(), alpha.clone().requires_grad_()
    w_q = quantize_weight(leaf, threshold, level_set(family, 3), clip_gradient=clip, grad_scale=0.3)
    return w_q.detach(), *torch.autograd.grad(
        (w_q * torch.arange(w_q.numel()).view(w_q.shape).cos()).sum(), [leaf, threshold]
    )


@pytest.mark.parametrize("family", ["apot", "pot", "uniform", "twos-complement", "odd"])
def test_each_channel_is_quantized_as_a_tensor_of_its_own(family: str) -> None:
    torch.compiler.reset()
    shapes = [(4, 3, 2, 2), (3, 5), (4, 4), (1, 7), (5, 1, 1, 1), (6, 2, 1, 3), (7, 7), (1, 1, 1, 1), (9, 130)]
    compiled = shapes[:5] if family == "twos-complement" else []  # equal and single sizes have kernels of their own
    for clip, layouts in ((True, ("contiguous", "channels-last", "sliced")), (False, ("contiguous",))):
        for shape in shapes:
            for layout in layouts if len(shape) == 4 else ("contiguous",):
                w, alpha = weight(shape, layout), torch.rand(shape[0]) + 0.2
                alpha[0] = -1.0  # read as the floor
                set_kernels("eager")
                eager = grads(w, alpha, family, clip=clip)
                g = torch.arange(w.numel()).view(w.shape).cos()
                for channel in range(shape[0]):
                    leaf, threshold = w[channel].detach().requires_grad_(), alpha[channel].clone().requires_grad_()
                    levels = level_set(family, 3)
                    w_q = quantize_weight(leaf, threshold, levels, clip_gradient=clip, grad_scale=0.3)
                    expected = torch.autograd.grad((w_q * g[channel]).sum(), [leaf, threshold])
                    for ours, theirs in zip(eager, (w_q, *expected), strict=True):
                        torch.testing.assert_close(ours[channel], theirs.detach())
                if clip and shape in compiled:
                    set_kernels("compiled")
                    fused = grads(w, alpha, family, clip=clip)
                    for i, (ours, theirs) in enumerate(zip(fused, eager, strict=True)):
                        tolerance = 0.0 if i < 2 else 1e-5
                        torch.testing.assert_close(ours, theirs, atol=tolerance, rtol=tolerance)
                        assert ours.stride() == theirs.stride()


@pytest.mark.parametrize("name", ["apot-cifar", "fat-imagenet-log", "lsq", "pact"])
def test_a_network_with_a_threshold_a_channel(name: str, tmp_path: Path) -> None:
    model = create_model("resnet20", name, 3, num_classes=4, weight_per_channel=True)
    x = torch.randn(4, 3, 12, 12)
    initialize_thresholds(model, x, "lsq" if name == "lsq" else "mse")
    before = copy.deepcopy(model.state_dict())
    model(x).square().sum().backward()
    for _, layer in threshold_layers(model):
        alpha = layer.weight_alpha
        assert alpha is not None
        assert alpha.shape == (layer.weight.shape[0],)
        if name == "pact":
            assert (alpha == 1).all()
            continue
        assert len(alpha.unique()) > 1
        assert alpha.grad is not None
        assert alpha.grad.shape == alpha.shape
        if name == "apot-cifar":
            rows = layer.transformed_weight().flatten(1)
            fitted = [fit_threshold(row, layer.spec.weight_set, signed=True) for row in rows[:4]]
            torch.testing.assert_close(alpha[:4].detach(), torch.tensor(fitted))
    twin = create_model("resnet20", name, 3, num_classes=4, weight_per_channel=True)
    twin.load_state_dict(model.state_dict())
    with torch.no_grad():
        expected = model.eval()(x)
        torch.testing.assert_close(twin.eval()(x), expected, atol=0, rtol=0)
        save_packed(model, tmp_path / "packed")
        packed = load_packed(tmp_path / "packed")
        torch.testing.assert_close(packed(x), expected, atol=0, rtol=0)
        plain = dequantize(model)
        _, first = next(threshold_layers(model))
        assert torch.equal(plain.get_submodule("layer1.0.conv1").weight, first.quantized_weight())  # type: ignore[arg-type]
    found = checkpoint_thresholds(before)
    assert list(found) == [row.name for row in clipping_table(model)]
    row = clipping_table(model)[0]
    assert row.weight_alpha == pytest.approx(first.weight_alpha.mean().item())  # type: ignore[union-attr]
    set_bits(model, 4)
    model(x)


def test_loading_one_threshold_into_many_and_not_back() -> None:
    one = create_model("resnet20", "apot-cifar", 4, num_classes=3, weight_alpha=1.7)
    many = create_model("resnet20", "apot-cifar", 4, num_classes=3, weight_per_channel=True)
    for other_bits in (False, True):
        load_weights(many, one.state_dict(), other_bits=other_bits)
    x = torch.rand(2, 3, 8, 8)
    with torch.no_grad():
        torch.testing.assert_close(many.eval()(x), one.eval()(x), atol=0, rtol=0)
    with pytest.raises(ValueError, match=r"weight_alpha \(16,\) for \(\).*build the network with weight_per_channel"):
        load_weights(one, many.state_dict())
    lower = create_model("resnet20", "apot-cifar", 2, num_classes=3, weight_per_channel=True)
    load_weights(lower, many.state_dict(), other_bits=True)
    assert next(threshold_layers(lower))[1].weight_alpha.tolist() == pytest.approx([1.7] * 16)  # type: ignore[union-attr]


def test_changing_between_one_and_many() -> None:
    layer = QuantLinear(6, 3, spec=preset("apot-cifar", bits=3, weight_alpha=1.5))
    layer.spec = preset("apot-cifar", bits=3, weight_per_channel=True)
    assert layer.weight_alpha is not None
    assert layer.weight_alpha.tolist() == [1.5] * 3
    with torch.no_grad():
        layer.weight_alpha.copy_(torch.tensor([-1.0, 2.0, 0.0]))
    assert keep_thresholds_positive(layer) == 2
    assert layer.weight_alpha.tolist() == pytest.approx([ALPHA_FLOOR, 2.0, ALPHA_FLOOR])
    layer.spec = preset("apot-cifar", bits=3)
    assert layer.weight_alpha.shape == ()
    with pytest.raises(ValueError, match="weight_per_channel 'yes': choose True or False"):
        QuantSpec(weight_per_channel="yes")  # type: ignore[arg-type]


def test_quantize_and_pack_a_network_of_one_s_own(tmp_path: Path) -> None:
    def build() -> nn.Sequential:
        return nn.Sequential(
            nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3, groups=8), nn.GELU(), nn.Flatten(), nn.Linear(32, 4)
        )

    x = torch.randn(3, 3, 6, 6)
    for method in ("lsq", "pact", "apot"):
        model = build()
        quantize(model, 3, method, overrides={"*": {"weight_per_channel": True}}, calibration=x)
        assert [layer.weight_alpha.shape for _, layer in threshold_layers(model)] == [(8,), (8,), (4,)]  # type: ignore[union-attr]
        model(x).sum().backward()
        save_packed(model, tmp_path / method)
        with torch.no_grad():
            loaded = load_packed(tmp_path / method, build())
            torch.testing.assert_close(loaded(x), model.eval()(x), atol=0, rtol=0)


@pytest.mark.parametrize("name", ["apot-cifar", "lsq", "pact"])
def test_integer_arithmetic(name: str) -> None:
    spec = preset(name, bits=4, weight_per_channel=True, act_alpha=1.0)
    cases: list[tuple[QuantConv2d | QuantLinear, Tensor]] = [
        (QuantConv2d(4, 6, 3, padding=1, groups=2, bias=True, spec=spec), torch.rand(2, 4, 5, 5)),
        (QuantLinear(8, 3, spec=spec), torch.rand(2, 5, 8)),
    ]
    for layer, x in cases:
        assert layer.weight_alpha is not None
        if name != "pact":
            nn.init.uniform_(layer.weight_alpha, 0.05, 0.3)
        with torch.no_grad():
            for arithmetic in ("multiply", "shift"):
                integer = IntegerLayer(layer, arithmetic)
                assert torch.equal(integer.accumulate(x).long(), simulated_accumulator(layer, x))
                torch.testing.assert_close(integer(x), layer(x))


@pytest.mark.parametrize("name", ["apot-imagenet-pot", "lsq", "pact"])
def test_a_network_compiles_in_one_graph(name: str) -> None:
    layer = QuantConv2d(4, 6, 3, padding=1, spec=preset(name, bits=3, weight_per_channel=True))
    torch.compiler.reset()
    for side in (4, 5):  # another size: what depends on the input's becomes symbolic
        x = torch.rand(2, 4, side, side)
        results = []
        for run in (layer, torch.compile(layer, fullgraph=True, backend="aot_eager")):
            layer.zero_grad()
            y = run(x)
            y.square().sum().backward()
            results.append([y, *(p.grad for p in layer.parameters() if p.requires_grad)])
        for ours, theirs in zip(*results, strict=True):
            torch.testing.assert_close(ours, theirs)
