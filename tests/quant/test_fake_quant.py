from __future__ import annotations

import math

import pytest
import torch

from apot_fat.quant import ALPHA_FLOOR, LevelSet, eight_bit_weight, level_set, project, quantize_weight
from apot_fat.quant import quantize_activation as quantize_act

SETS = [level_set(family, bits) for family in ("uniform", "pot", "apot") for bits in (1, 2, 3, 4, 5, 8)]


def alpha_of(value: float) -> torch.Tensor:
    return torch.tensor(value, requires_grad=True)


@pytest.mark.parametrize("levels", SETS, ids=lambda s: f"{len(s)}/{min(s.denominator, 10**6)}")
def test_projection_is_the_nearest_level(levels: LevelSet) -> None:
    u = torch.rand(2000, dtype=torch.float64)
    values = levels.tensor(torch.float64)
    nearest = values[(u[:, None] - values).abs().argmin(1)]
    torch.testing.assert_close(project(u, levels), nearest, atol=1e-15, rtol=0)


@pytest.mark.parametrize("levels", SETS, ids=lambda s: f"{len(s)}/{min(s.denominator, 10**6)}")
def test_levels_project_onto_themselves(levels: LevelSet) -> None:
    values = levels.tensor()
    torch.testing.assert_close(project(values, levels), values, atol=0, rtol=0)


def test_weight_quantization_is_odd_and_clips() -> None:
    w = torch.randn(500)
    alpha = torch.tensor(0.7)
    q = quantize_weight(w, alpha, level_set("apot", 3), clip_gradient=False)
    torch.testing.assert_close(
        quantize_weight(-w, alpha, level_set("apot", 3), clip_gradient=False), -q, atol=0, rtol=0
    )
    assert q.abs().max() == alpha


@pytest.mark.parametrize("clip_gradient", [False, True])
def test_weight_gradients_are_the_closed_forms(clip_gradient: bool) -> None:
    levels = level_set("apot", 3)
    w = torch.randn(1000, dtype=torch.float64, requires_grad=True)
    alpha = torch.tensor(1.1, dtype=torch.float64, requires_grad=True)
    g = torch.randn(1000, dtype=torch.float64)
    quantize_weight(w, alpha, levels, clip_gradient=clip_gradient, grad_scale=0.3).backward(g)
    u = (w / alpha).detach()
    q = u.sign() * project(u.abs().clamp(max=1), levels)
    inside = u.abs() <= 1
    assert w.grad is not None
    assert alpha.grad is not None
    torch.testing.assert_close(w.grad, g * inside if clip_gradient else g)
    torch.testing.assert_close(alpha.grad, 0.3 * (g * torch.where(inside, q - u, u.sign())).sum())


def test_bounds_count_as_inside() -> None:
    x = torch.tensor([-0.5, 0.0, 1.0, 2.0], requires_grad=True)
    alpha = alpha_of(1.0)
    quantize_act(x, alpha, level_set("apot", 2), clip="both").sum().backward()
    assert x.grad is not None
    assert x.grad.tolist() == [0, 1, 1, 0]
    assert alpha.grad is not None
    assert alpha.grad.item() == 1  # q = u at 0 and 1; below 0 nothing; above 1 one


def test_negative_inputs_by_variant() -> None:
    x = torch.tensor([-0.9], requires_grad=True)
    for family, expected in (("apot", 0.0), ("pot", 0.0), ("uniform", -1.0)):
        y = quantize_act(x, alpha_of(1.0), level_set(family, 2), clip="above")
        assert y.item() == expected  # uniform levels round on below 0
        (grad,) = torch.autograd.grad(y.sum(), x)
        assert grad.item() == 1
    assert quantize_act(x, alpha_of(1.0), level_set("uniform", 2), clip="both").item() == 0


@pytest.mark.parametrize("value", [0.0, -2.0])
def test_a_threshold_at_or_below_zero_is_read_as_the_floor(value: float) -> None:
    x = torch.tensor([0.0, 1.0, 2.0], requires_grad=True)
    alpha = alpha_of(value)
    y = quantize_act(x, alpha, level_set("apot", 3))
    assert y.tolist() == pytest.approx([0, ALPHA_FLOOR, ALPHA_FLOOR])
    y.sum().backward()
    assert alpha.grad is not None
    assert alpha.grad.item() == 2  # so that training can raise it
    w = quantize_weight(torch.tensor([-1.0, 1.0]), alpha, level_set("apot", 3), clip_gradient=False)
    assert w.tolist() == pytest.approx([-ALPHA_FLOOR, ALPHA_FLOOR])


@pytest.mark.parametrize("value", [1e-30, 1e-9, 1e-4, 3.0])
def test_a_positive_threshold_is_used_as_it_is(value: float) -> None:
    x = torch.tensor([2 * value])
    assert quantize_act(x, torch.tensor(value), level_set("apot", 3)).item() == pytest.approx(value)


@pytest.mark.parametrize("family", ["uniform", "pot", "apot"])
@pytest.mark.parametrize("bits", [2, 4])
def test_nan_stays_nan(family: str, bits: int) -> None:
    x = torch.tensor([math.nan, 0.4])
    for result in (
        quantize_act(x, torch.tensor(1.0), level_set(family, bits)),
        quantize_weight(x, torch.tensor(1.0), level_set(family, bits), clip_gradient=False),
    ):
        assert result.isnan().tolist() == [True, False]
    assert quantize_act(torch.ones(2), torch.tensor(math.nan), level_set(family, bits)).isnan().all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_types_are_kept_and_levels_chosen_in_float32(dtype: torch.dtype) -> None:
    x = torch.rand(1000).to(dtype)
    y = quantize_act(x, torch.tensor(0.8), level_set("apot", 4))
    assert y.dtype == dtype
    expected = quantize_act(x.to(torch.promote_types(dtype, torch.float32)), torch.tensor(0.8), level_set("apot", 4))
    torch.testing.assert_close(y, expected.to(dtype), atol=0, rtol=0)


def test_inputs_are_not_changed_and_memory_format_is_kept() -> None:
    x = torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last)
    before = x.clone()
    y = quantize_act(x, torch.tensor(1.0), level_set("apot", 4))
    torch.testing.assert_close(x, before, atol=0, rtol=0)
    assert y.is_contiguous(memory_format=torch.channels_last)
    assert quantize_act(torch.empty(0), torch.tensor(1.0), level_set("apot", 4)).shape == (0,)


def test_eight_bit_weight() -> None:
    w = torch.tensor([-1.0, 0.3, 0.5], requires_grad=True)
    q = eight_bit_weight(w)
    torch.testing.assert_close(q, torch.tensor([-1.0, round(0.3 / 0.5 * 127) / 127 * 0.5, 0.5]))
    q.sum().backward()
    assert w.grad is not None
    assert w.grad.tolist() == [1, 1, 1]
    negative = torch.tensor([-1.0, -0.2])
    torch.testing.assert_close(eight_bit_weight(negative), negative, atol=0, rtol=0)
