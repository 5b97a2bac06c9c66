"""LSQ and PACT against their papers' equations, written plainly with autograd."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from apot_fat import QuantConv2d, QuantLinear, load_weights, preset
from apot_fat.models import create_model
from apot_fat.quant import LevelSet, initialize_thresholds, level_set, quantize_weight, threshold_layers
from apot_fat.quant.seam import set_kernels


def lsq(v: Tensor, s: Tensor, lowest: int, highest: int, features: int) -> Tensor:
    """Appendix B of the paper: straight-through rounding, and a step whose gradient is scaled."""
    scale = 1 / math.sqrt(features * highest)
    s = (s - s * scale).detach() + s * scale
    u = (v / s).clamp(lowest, highest)
    return ((u.round() - u).detach() + u) * s


@pytest.mark.parametrize("remembers", [False, True])
@pytest.mark.parametrize("options", [{"kernel_size": 3, "padding": 1}, {"kernel_size": 1, "stride": 2}], ids=str)
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_sgd_on_the_threshold_is_sgd_on_lsq_s_step(
    bits: int, options: dict[str, Any], remembers: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("apot_fat.quant.fast.layer_output.REMEMBER_ELEMENTS", 0 if remembers else 1 << 62)
    layer = QuantConv2d(3, 5, spec=preset("lsq", bits=bits), **options).double()
    x = torch.rand(4, 3, 6, 6).double()
    target = torch.randn_like(layer(x))
    initialize_thresholds(layer, x, "lsq")
    assert layer.weight_alpha is not None
    assert layer.act_alpha is not None
    q_weight, q_act = 2 ** (bits - 1) - 1, 2**bits - 1
    w = layer.weight.detach().clone().requires_grad_()
    s_w = (2 * w.abs().mean() / math.sqrt(q_weight)).detach().requires_grad_()
    s_x = (2 * x.abs().mean() / math.sqrt(q_act)).detach().requires_grad_()
    ours, theirs = (
        torch.optim.SGD(parameters, 0.05, momentum=0.9, weight_decay=0.01)
        for parameters in (list(layer.parameters()), [w, s_w, s_x])
    )
    for _ in range(6):
        torch.testing.assert_close(layer.weight_alpha, s_w * q_weight, rtol=1e-9, atol=1e-12)
        torch.testing.assert_close(layer.act_alpha, s_x * q_act, rtol=1e-9, atol=1e-12)
        torch.testing.assert_close(layer.weight.detach(), w.detach(), rtol=1e-9, atol=1e-12)
        x_q = lsq(x, s_x, 0, q_act, x[0].numel())
        w_q = lsq(w, s_w, -q_weight - 1, q_weight, w.numel())
        y = F.conv2d(x_q, w_q, None, layer.stride, layer.padding)
        torch.testing.assert_close(layer(x), y, rtol=1e-9, atol=1e-12)
        for optimizer, output in ((ours, layer(x)), (theirs, y)):
            optimizer.zero_grad()
            (output - target).square().mean().backward()
            optimizer.step()


def dorefa(w: Tensor, bits: int) -> Tensor:
    """DoReFa-Net's weight: straight-through rounding, gradient through tanh and maximum."""
    steps = 2**bits - 1
    bounded = torch.tanh(w)
    unit = bounded / bounded.abs().max() / 2 + 0.5
    return 2 * ((unit * steps).round() / steps - unit).detach() + 2 * unit - 1


def pact(x: Tensor, alpha: Tensor, bits: int) -> Tensor:
    """Equation 1 as it is written, equations 2 and 3."""
    steps = 2**bits - 1
    y = (x.abs() - (x - alpha).abs() + alpha) / 2
    return y + ((y * steps / alpha).round() * alpha / steps - y).detach()


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_pact_is_the_paper_s(bits: int) -> None:
    layer = QuantLinear(40, 7, spec=preset("pact", bits=bits, act_alpha=0.6)).double()
    x = torch.rand(9, 40).double().requires_grad_()
    assert layer.weight_alpha is not None
    assert layer.act_alpha is not None
    assert layer.bias is not None
    leaves = [x, layer.weight, layer.act_alpha]
    outputs = layer(x), F.linear(pact(x, layer.act_alpha, bits), dorefa(layer.weight, bits), layer.bias)
    torch.testing.assert_close(*outputs)
    torch.testing.assert_close(*(torch.autograd.grad(y.square().sum(), leaves) for y in outputs))
    assert (layer.quantized_weight() != 0).all()
    assert len(layer.quantized_weight().unique()) <= 2**bits
    optimizer = torch.optim.SGD(layer.parameters(), 0.1, weight_decay=0.1)
    layer(x).square().sum().backward()
    optimizer.step()
    assert layer.weight_alpha.item() == 1  # not learned, and so not decayed


def test_signed_level_sets() -> None:
    assert level_set("twos-complement", 3) == LevelSet(tuple(range(-4, 4)), 3)
    assert level_set("odd", 2).levels == (-1, -1 / 3, 1 / 3, 1)
    assert level_set("uniform", 1).signed_numerators == (-1, 0, 1)
    for bits in (2, 5, 8):
        for family in ("twos-complement", "odd"):
            levels = level_set(family, bits)
            assert (len(levels), levels.bits) == (2**bits, bits)
            assert levels.signed_numerators == levels.numerators
    with pytest.raises(ValueError, match="from 2 to 8"):
        level_set("twos-complement", 1)
    with pytest.raises(ValueError, match="equally spaced"):
        LevelSet((-2, -1, 1), 1)
    with pytest.raises(ValueError, match="act_levels 'odd'"):
        preset("pact", act_levels="odd")
    with pytest.raises(ValueError, match="grad_scale 'lqs': choose a positive number, 'lsq' or None"):
        preset("lsq", grad_scale="lqs")


@pytest.mark.parametrize("family", ["twos-complement", "odd"])
def test_signed_levels_are_nearest_and_clip_at_their_own_ends(family: str) -> None:
    levels, alpha = level_set(family, 3), torch.tensor(0.7, dtype=torch.float64, requires_grad=True)
    w = (3 * torch.randn(500, dtype=torch.float64)).requires_grad_()
    w_q = quantize_weight(w, alpha, levels, clip_gradient=True)
    values = torch.tensor(levels.levels, dtype=torch.float64) * alpha.detach()
    torch.testing.assert_close((w - w_q).abs(), (w[:, None] - values).abs().min(1).values)
    torch.testing.assert_close(quantize_weight(w_q, alpha, levels, clip_gradient=True), w_q)
    inside = (w >= values[0]) & (w <= values[-1])
    w_q.sum().backward()
    torch.testing.assert_close(w.grad, inside.double())
    slope = torch.where(inside, (w_q - w) / alpha, w_q / alpha)
    torch.testing.assert_close(alpha.grad, slope.sum().detach())
    poisoned = torch.tensor([torch.nan, torch.inf, -torch.inf])
    got = quantize_weight(poisoned, torch.tensor(1.0), levels, clip_gradient=True)
    assert got[0].isnan()
    assert got[1:].tolist() == [1.0, pytest.approx(levels.levels[0])]


def test_initial_steps() -> None:
    layer = QuantLinear(6, 4, spec=preset("lsq", bits=3))
    expected = 2 * layer.weight.detach().abs().mean() / math.sqrt(3) * 3
    torch.testing.assert_close(layer.weight_alpha, expected, check_dtype=True)
    fixed = QuantLinear(4, 2, spec=preset("pact", bits=3))
    model = nn.Sequential(layer, nn.ReLU(), fixed)
    x = torch.rand(8, 6)
    initialize_thresholds(model, x, "lsq")
    torch.testing.assert_close(layer.act_alpha, 2 * x.mean() * math.sqrt(7))
    assert fixed.weight_alpha is not None
    assert fixed.weight_alpha.item() == 1


@pytest.mark.parametrize("family", ["twos-complement", "odd"])
def test_compiled_and_eager_kernels_agree(family: str) -> None:
    levels, alpha = level_set(family, 4), torch.tensor(0.8)
    w = torch.cat([torch.randn(500), 0.8 * torch.tensor(levels.thresholds), torch.tensor([torch.nan, torch.inf])])
    results = []
    for kernels in ("eager", "compiled"):
        set_kernels(kernels)
        leaf = w.clone().requires_grad_()
        y = quantize_weight(leaf, alpha, levels, clip_gradient=True)
        y[:500].sum().backward()
        results.append((y.detach(), leaf.grad))
    torch.testing.assert_close(results[1], results[0], atol=0, rtol=0, equal_nan=True)


def test_a_load_from_full_precision_starts_at_the_loaded_weight_s_step() -> None:
    full, quantized = create_model("resnet20", bits=32), create_model("resnet20", "lsq", 3)
    with torch.no_grad():
        for parameter in full.parameters():
            parameter.mul_(5)
    load_weights(quantized, full.state_dict(), other_bits=True)
    for _, layer in threshold_layers(quantized):
        expected = 2 * layer.weight.detach().abs().mean() * math.sqrt(3)
        torch.testing.assert_close(layer.weight_alpha, expected)
