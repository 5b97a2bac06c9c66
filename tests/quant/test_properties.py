"""What holds for every level set, shape, type and memory format."""

from __future__ import annotations

import copy
import io
import pickle

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from apot_fat.quant import LevelSet, QuantConv2d, QuantLinear, level_set, preset, quantize_activation, quantize_weight
from apot_fat.quant.seam import set_kernels

FAMILIES = st.sampled_from(["apot", "pot", "uniform"])
BITS = st.integers(1, 5)
TYPES = st.sampled_from([torch.float16, torch.bfloat16, torch.float32, torch.float64])
QUICK = settings(max_examples=40, deadline=None, derandomize=True)


@st.composite
def level_sets(draw: st.DrawFn) -> LevelSet:
    return level_set(draw(FAMILIES), draw(BITS))


@st.composite
def tensors(draw: st.DrawFn, dtype: torch.dtype = torch.float64) -> Tensor:
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    shape = draw(st.sampled_from([(), (0,), (1,), (37,), (2, 3, 4, 5), (2, 0, 3), (4, 2, 6, 6)]))
    x = torch.randn(shape, generator=generator, dtype=torch.float64) * draw(st.sampled_from([1e-3, 0.5, 1.0, 30.0]))
    layout = draw(st.sampled_from(["contiguous", "channels-last", "sliced"]))
    if layout == "channels-last" and x.dim() == 4:
        x = x.to(memory_format=torch.channels_last)
    if layout == "sliced" and x.dim():
        x = torch.stack([x, x], -1)[..., 0]
    return x.to(dtype)


def alpha_of(value: float, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.tensor(value, dtype=dtype)


@QUICK
@given(level_sets(), tensors(), st.floats(0.01, 20))
def test_activations_are_idempotent_monotone_and_nearest(levels: LevelSet, x: Tensor, alpha: float) -> None:
    a = alpha_of(alpha)
    y = quantize_activation(x, a, levels, clip="both")
    assert (y.shape, y.dtype, y.device) == (x.shape, x.dtype, x.device)
    torch.testing.assert_close(quantize_activation(y, a, levels, clip="both"), y, atol=1e-12, rtol=1e-12)
    order = x.flatten().argsort()
    assert (y.flatten()[order].diff() >= 0).all()
    values = levels.tensor(torch.float64) * alpha
    u = x.clamp(0, alpha)
    distance = (u[..., None] - values).abs()
    # nearest, but at ties (both neighbours are equally far)
    torch.testing.assert_close((y - u).abs(), distance.min(-1).values, atol=1e-9, rtol=1e-9)


@QUICK
@given(level_sets(), tensors(), st.floats(0.01, 20))
def test_weights_are_odd_and_idempotent(levels: LevelSet, w: Tensor, alpha: float) -> None:
    a = alpha_of(alpha)
    q = quantize_weight(w, a, levels, clip_gradient=False)
    torch.testing.assert_close(quantize_weight(-w, a, levels, clip_gradient=False), -q, atol=0, rtol=0)
    torch.testing.assert_close(quantize_weight(q, a, levels, clip_gradient=False), q, atol=1e-12, rtol=1e-12)
    assert (q.abs() <= alpha * (1 + 1e-12)).all()


@QUICK
@given(st.sampled_from(["twos-complement", "odd"]), st.integers(2, 5), tensors(), st.floats(0.01, 20))
def test_signed_levels_are_idempotent_monotone_and_nearest(family: str, bits: int, w: Tensor, alpha: float) -> None:
    a, levels = alpha_of(alpha), level_set(family, bits)
    q = quantize_weight(w, a, levels, clip_gradient=True)
    assert (q.shape, q.dtype) == (w.shape, w.dtype)
    torch.testing.assert_close(quantize_weight(q, a, levels, clip_gradient=True), q, atol=1e-12, rtol=1e-12)
    assert (q.flatten()[w.flatten().argsort()].diff() >= 0).all()
    values = levels.tensor(torch.float64) * alpha
    inside = w.clamp(values[0], values[-1])
    nearest = (inside[..., None] - values).abs().min(-1).values
    torch.testing.assert_close((q - inside).abs(), nearest, atol=1e-9, rtol=1e-9)


@QUICK
@given(level_sets(), tensors(), st.floats(0.01, 20))
def test_equal_thresholds_of_all_channels_are_one_threshold(levels: LevelSet, w: Tensor, alpha: float) -> None:
    if not w.dim():
        return
    one, many = alpha_of(alpha).requires_grad_(), alpha_of(alpha).repeat(len(w)).requires_grad_()
    q, q_one = (quantize_weight(w, a, levels, clip_gradient=False) for a in (many, one))
    torch.testing.assert_close(q, q_one, atol=0, rtol=0)
    assert q.stride() == q_one.stride()
    q.square().sum().backward()
    q_one.square().sum().backward()
    torch.testing.assert_close(many.grad.sum(), one.grad, atol=1e-9, rtol=1e-9)  # type: ignore[union-attr]


@QUICK
@given(level_sets(), tensors(), st.integers(-8, 8), st.floats(0.01, 20))
def test_a_power_of_two_scales_input_and_threshold_alike(levels: LevelSet, x: Tensor, k: int, alpha: float) -> None:
    a, scale = alpha_of(alpha), 2.0**k
    for function in (
        lambda v, t: quantize_activation(v, t, levels),
        lambda v, t: quantize_weight(v, t, levels, clip_gradient=True),
    ):
        torch.testing.assert_close(function(x * scale, a * scale), function(x, a) * scale, atol=0, rtol=0)


@QUICK
@given(level_sets(), TYPES, st.data())
def test_types_and_nan(levels: LevelSet, dtype: torch.dtype, data: st.DataObject) -> None:
    x = data.draw(tensors(dtype))
    a = alpha_of(1.5, torch.promote_types(dtype, torch.float32))
    y = quantize_activation(x, a, levels, clip="both")
    assert y.dtype == dtype
    exact = quantize_activation(x.to(a.dtype), a, levels, clip="both")
    torch.testing.assert_close(y, exact.to(dtype), atol=0, rtol=0)
    poisoned = torch.cat([x.flatten(), torch.tensor([torch.nan, torch.inf, -torch.inf], dtype=dtype)])
    for clip in ("above", "both", "relu"):
        z = quantize_activation(poisoned, a, levels, clip=clip)
        assert z[-3].isnan()
        assert z[-2] == a.to(dtype)
    assert quantize_weight(poisoned, a, levels, clip_gradient=True)[-3].isnan()


@QUICK
@given(level_sets(), tensors(), st.sampled_from(["above", "both", "relu"]), st.booleans())
def test_gradients_are_the_closed_forms(levels: LevelSet, x: Tensor, clip: str, full: bool) -> None:
    x, a = x.requires_grad_(), alpha_of(1.1).requires_grad_()
    gradient = "full" if full else "clipped-only"
    y = quantize_activation(x, a, levels, clip=clip, alpha_gradient=gradient)  # type: ignore[arg-type]
    g = torch.cos(x.detach() * 3)
    y.backward(g)
    u, q = x.detach() / a.detach(), y.detach() / a.detach()
    inside = {"above": u <= 1, "both": (u >= 0) & (u <= 1), "relu": (u > 0) & (u <= 1)}[clip]
    torch.testing.assert_close(x.grad, g * inside)
    slope = (u > 1).double()
    if full:
        slope = torch.where(u > 1, 1.0, q - (u if clip == "above" else u.clamp(min=0)))
    torch.testing.assert_close(a.grad, (g * slope).sum(), atol=1e-9, rtol=1e-9)


@settings(max_examples=12, deadline=None, derandomize=True)
@given(st.data())
@pytest.mark.parametrize("family", ["apot", "pot", "uniform"])
def test_compiled_equals_eager(family: str, data: st.DataObject) -> None:
    levels = level_set(family, 4)
    x = data.draw(tensors(torch.float32))
    a = alpha_of(1.3, torch.float32)
    results = []
    for kernels in ("eager", "compiled"):
        set_kernels(kernels)
        results.append(quantize_activation(x, a, levels))
    torch.testing.assert_close(results[1], results[0], atol=0, rtol=0)


@pytest.mark.parametrize("name", ["apot-cifar", "fat-imagenet-log", "uniform-mobilenet", "lsq", "pact"])
def test_layers_are_copied_pickled_saved_and_exported(name: str) -> None:
    model = nn.Sequential(
        QuantConv2d(3, 4, 3, spec=preset(name, bits=3)), nn.ReLU(), nn.Flatten(), QuantLinear(36, 2, spec=preset(name))
    ).eval()
    x = torch.randn(2, 3, 5, 5)
    with torch.no_grad():
        expected = model(x)
        for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
            torch.testing.assert_close(other(x), expected, atol=0, rtol=0)
        buffer = io.BytesIO()
        torch.save(model.state_dict(), buffer)
        buffer.seek(0)
        for layer in model:
            if isinstance(layer, QuantConv2d | QuantLinear):
                layer.weight.mul_(0.5).add_(0.1)
        model.load_state_dict(torch.load(buffer, weights_only=True))
        torch.testing.assert_close(model(x), expected, atol=0, rtol=0)
        exported = torch.export.export(model, (x,)).module()
        torch.testing.assert_close(exported(x), expected, atol=1e-6, rtol=1e-6)
