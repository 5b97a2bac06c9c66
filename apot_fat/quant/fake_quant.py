"""Fake quantization: project onto a level set, with the published gradients.

Every function here is pure: tensors in, tensors out. Half-precision inputs are computed in float32 and returned in
their own type; a level is α times a float, so bfloat16 rounds the result once more.

Legend: u is the value in units of the threshold α, q the projected u, g the upstream gradient, 1[·] an indicator; the
bounds count as inside. NaN stays NaN.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from apot_fat.quant.levels import LevelSet
from apot_fat.quant.spec import ActAlphaGradient, ActClip

ALPHA_FLOOR = 1e-3
"""A threshold at or below zero is read as this (same unit as the threshold)."""


def project(u: Tensor, levels: LevelSet) -> Tensor:
    """Nearest level to u.

    Equation: Π_L(u) = argmin over l in L of |u − l|. A tie goes up, but for uniform levels to the even multiple, as
    torch.round does and the published code did.

    Args:
        u: any shape, float32 or float64, range [0, 1]; uniform levels take any real number (rounded to the nearest
            multiple of 1 / d, which the published FAT and MobileNetV2 networks rely on below 0).
        levels: the level set.

    Returns:
        The levels, shape and type of u. No gradient: the callers define their own.
    """
    if levels.is_uniform:
        return (u * levels.denominator).round() / levels.denominator
    if levels.has_table:
        cells = (u * (2 * levels.denominator)).to(torch.int32).clamp_(0, 2 * levels.denominator)
        q = _cell_levels(levels, u.dtype, u.device)[cells]
    else:
        q = _level_tensor(levels, u.dtype, u.device)[
            torch.bucketize(u, _thresholds(levels, u.dtype, u.device), right=True)
        ]
    return torch.where(u.isnan(), u, q)


def quantize_weight(
    w: Tensor, alpha: Tensor, levels: LevelSet, *, clip_gradient: bool, grad_scale: float = 1.0
) -> Tensor:
    """Fake-quantize a (normalised) weight.

    Equation: u = w / α;  w_q = α · sign(u) · Π_L(min(|u|, 1)).

    Args:
        w: weight, any shape.
        alpha: clipping threshold, 0-d, same unit as w; read as ``ALPHA_FLOOR`` where it is not positive.
        levels: magnitude levels.
        clip_gradient: False passes the gradient whole ("calibrated"), True only where |u| ≤ 1.
        grad_scale: factor on the threshold's gradient.

    Returns:
        w_q, shape and type of w.

    Gradient: ∂L/∂w = g, or g · 1[|u| ≤ 1];  ∂L/∂α = grad_scale · Σ g · (sign(u) 1[|u| > 1] + (q − u) 1[|u| ≤ 1]).

    Paper: APoT, "Reparameterized Clipping Function"; the calibrated gradient is the published code's. A non-positive
    α gives zeros or NaN there, here a network that can recover.
    """
    return _QuantizeWeight.apply(w, alpha, levels, clip_gradient, grad_scale)


def quantize_activation(
    x: Tensor,
    alpha: Tensor,
    levels: LevelSet,
    *,
    clip: ActClip = "above",
    alpha_gradient: ActAlphaGradient = "full",
    grad_scale: float = 1.0,
) -> Tensor:
    """Fake-quantize an activation.

    Equation: u = x / α;  x_q = α · Π_L(clip(u)), clip to [0, 1] (``both``) or above at 1 only (``above``): then a
    negative goes to level 0 with APoT and PoT levels, and to a negative multiple of the step with uniform ones.

    Args:
        x: activation, any shape.
        alpha: clipping threshold, 0-d, same unit as x; read as ``ALPHA_FLOOR`` where it is not positive.
        levels: levels on [0, 1].
        clip: ``above`` or ``both``.
        alpha_gradient: ``full`` or ``clipped-only``.
        grad_scale: factor on the threshold's gradient.

    Returns:
        x_q, shape and type of x.

    Gradient: ∂L/∂x = g · 1[u ≤ 1] (``both``: g · 1[0 ≤ u ≤ 1]);
    ∂L/∂α = grad_scale · Σ g · (1[u > 1] + (q − u) 1[u ≤ 1]) (``both``: the second term 0 below 0; ``clipped-only``:
    the first term alone).

    Paper: APoT, "Reparameterized Clipping Function"; PACT for the ``clipped-only`` gradient.
    """
    return _QuantizeActivation.apply(x, alpha, levels, clip, alpha_gradient, grad_scale)


def eight_bit_weight(w: Tensor) -> Tensor:
    """The published 8-bit weight of first and last layers.

    Equation: s = max(w) (the maximum, not the largest magnitude); w_q = round(127 w / s) / 127 · s.

    Args:
        w: weight, any shape. A weight with max(w) ≤ 0 has no such scale and is returned as it is.

    Gradient: ∂L/∂w = g (straight-through).

    Departs from the published code where max(w) ≤ 0: that divides by zero or flips the roles of the signs.
    """
    with torch.no_grad():
        scale = w.max()
        rounded = (w / scale * 127).round() / 127 * scale
        rounded = torch.where(scale > 0, rounded, w)
    return w + (rounded - w).detach()


def positive(alpha: Tensor) -> Tensor:
    """The threshold as used: α where it is positive (or NaN), ``ALPHA_FLOOR`` where it is not."""
    return torch.where(alpha <= 0, ALPHA_FLOOR, alpha)


class _QuantizeWeight(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, w: Tensor, alpha: Tensor, levels: LevelSet, clip_gradient: bool, grad_scale: float) -> Tensor:
        alpha_used = positive(alpha).to(_compute_type(w))
        u = w.to(alpha_used.dtype) / alpha_used
        w_q = (u.sign() * project(u.abs().clamp(max=1), levels) * alpha_used).to(w.dtype)
        ctx.save_for_backward(w, w_q, alpha)
        ctx.clip_gradient, ctx.grad_scale = clip_gradient, grad_scale
        return w_q

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None, None, None]:
        w, w_q, alpha = ctx.saved_tensors
        alpha_used = positive(alpha).to(_compute_type(w))
        u = w.to(alpha_used.dtype) / alpha_used
        outside = u.abs() > 1
        grad_w = grad.masked_fill(outside, 0) if ctx.clip_gradient else grad
        slope = torch.where(outside, u.sign(), w_q / alpha_used - u)
        return grad_w, _alpha_gradient(grad, slope, alpha, ctx.grad_scale), None, None, None


class _QuantizeActivation(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        alpha: Tensor,
        levels: LevelSet,
        clip: ActClip,
        alpha_gradient: ActAlphaGradient,
        grad_scale: float,
    ) -> Tensor:
        alpha_used = positive(alpha).to(_compute_type(x))
        u = x.to(alpha_used.dtype) / alpha_used
        u = u.clamp(0, 1) if clip == "both" else u.clamp(max=1)
        x_q = (project(u, levels) * alpha_used).to(x.dtype)
        ctx.save_for_backward(x, x_q, alpha)
        ctx.clip, ctx.alpha_gradient, ctx.grad_scale = clip, alpha_gradient, grad_scale
        return x_q

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None, None, None, None]:
        x, x_q, alpha = ctx.saved_tensors
        alpha_used = positive(alpha).to(_compute_type(x))
        u = x.to(alpha_used.dtype) / alpha_used
        above = u > 1
        grad_x = grad.masked_fill(above | (u < 0) if ctx.clip == "both" else above, 0)
        if ctx.alpha_gradient == "clipped-only":
            slope = above.to(u.dtype)
        else:
            inside = x_q / alpha_used - (u.clamp(min=0) if ctx.clip == "both" else u)
            slope = torch.where(above, 1, inside)
        return grad_x, _alpha_gradient(grad, slope, alpha, ctx.grad_scale), None, None, None, None


def _alpha_gradient(grad: Tensor, slope: Tensor, alpha: Tensor, grad_scale: float) -> Tensor:
    return ((grad * slope).sum() * grad_scale).to(alpha.dtype)


def _compute_type(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)


@lru_cache(maxsize=256)
def _cell_levels(levels: LevelSet, dtype: torch.dtype, device: torch.device) -> Tensor:
    return torch.tensor([levels.levels[code] for code in levels.cell_codes], dtype=dtype, device=device)


@lru_cache(maxsize=256)
def _level_tensor(levels: LevelSet, dtype: torch.dtype, device: torch.device) -> Tensor:
    return levels.tensor(dtype, device)


@lru_cache(maxsize=256)
def _thresholds(levels: LevelSet, dtype: torch.dtype, device: torch.device) -> Tensor:
    return torch.tensor(levels.thresholds, dtype=dtype, device=device)
