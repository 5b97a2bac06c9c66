"""Fake quantization: project onto a level set, with the published gradients.

Every function here is pure: tensors in, tensors out. Forward and backward of each quantizer are one pointwise function
each (with the sum for the threshold), which ``kernels.run`` compiles into one pass over memory or runs as it stands.
Half-precision inputs are computed in float32 and returned in their own type; a level is α times a float, so bfloat16
rounds the result once more.

Legend: u is the value in units of the threshold α, q the projected u, g the upstream gradient, 1[·] an indicator; the
bounds count as inside. NaN stays NaN.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from apot_fat.quant.kernels import run
from apot_fat.quant.levels import LevelSet
from apot_fat.quant.spec import ActAlphaGradient, ActClip

ALPHA_FLOOR = 1e-3
"""A threshold at or below zero is read as this (same unit as the threshold)."""
_MAX_EXACT_POT_DENOMINATOR = 1 << 64  # smaller levels come near float32's subnormals


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
    if levels.is_pot and u.dtype == torch.float32 and levels.denominator <= _MAX_EXACT_POT_DENOMINATOR:
        q = _round_to_power_of_two(u, levels.levels[1])
    elif torch.compiler.is_compiling():
        q = _project_pointwise(u, levels)
    elif levels.has_table:
        cells = (u * (2 * levels.denominator)).to(torch.int32).clamp_(0, 2 * levels.denominator)
        # index_select takes half the time of indexing
        q = _cell_levels(levels, u.dtype, u.device).index_select(0, cells.flatten()).view(u.shape)
    else:
        thresholds = _constant(levels.thresholds, u.dtype, u.device)
        q = _constant(levels.levels, u.dtype, u.device)[torch.bucketize(u, thresholds, right=True)]
    return torch.where(u != u, u, q)  # Inductor computes isnan() one element at a time


def _project_pointwise(u: Tensor, levels: LevelSet) -> Tensor:
    # for a compiler: arithmetic alone, no table. The decisions are those of the table: the same product is compared
    # with the same integers.
    if levels.has_table:
        cuts = tuple(a + b for a, b in pairwise(levels.numerators))
        return _search(u * (2 * levels.denominator), cuts, levels.levels, u.dtype)
    return _search(u, levels.thresholds, levels.levels, u.dtype)


def _round_to_power_of_two(u: Tensor, smallest: float) -> Tensor:
    # half of the largest mantissa added to a float's bits carries into the exponent from 1.5 · 2^k on
    exponent = (u.view(torch.int32) + 0x00400000) & -0x00800000
    return torch.where(u < smallest / 2, 0.0, exponent.view(torch.float32).clamp(min=smallest))


def _search(v: Tensor, cuts: Sequence[float], values: Sequence[float], dtype: torch.dtype) -> Tensor:
    # binary search without branches: each comparison chooses the half of the remaining cuts and values that v lies in.
    # B comparisons and 2^(B + 1) selections, where a chain over all cuts takes 2^B of both.
    size = 1 << (len(values) - 1).bit_length()
    left = [_scalar(cut, dtype, v.device) for cut in (*cuts, *[math.inf] * (size - len(values)))]
    right = [_scalar(value, dtype, v.device) for value in (*values, *[values[-1]] * (size - len(values)))]
    while left:
        half = len(left) // 2
        above = v >= left[half]
        left = [torch.where(above, b, a) for a, b in zip(left[:half], left[half + 1 :], strict=True)]
        right = [torch.where(above, b, a) for a, b in zip(right[: half + 1], right[half + 1 :], strict=True)]
    return right[0]


def _scalar(value: float, dtype: torch.dtype, device: torch.device) -> Tensor:
    return torch.full((), value, dtype=dtype, device=device)


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


def weight_forward(w: Tensor, alpha: Tensor, levels: LevelSet) -> Tensor:
    """w_q of ``quantize_weight``."""
    alpha_used, u = _in_units(w, alpha)
    return (u.sign() * project(u.abs().clamp(max=1), levels) * alpha_used).to(w.dtype)


def weight_backward(
    grad: Tensor, w_q: Tensor, w: Tensor, alpha: Tensor, clip_gradient: bool, grad_scale: float
) -> tuple[Tensor, Tensor]:
    """Gradients of ``quantize_weight``: of w, and of α."""
    alpha_used, u = _in_units(w, alpha)
    outside = u.abs() > 1
    slope = torch.where(outside, u.sign(), w_q / alpha_used - u)
    grad_w = torch.where(outside, 0, grad) if clip_gradient else grad
    return grad_w, _alpha_gradient(grad, slope, alpha, grad_scale)


def activation_forward(x: Tensor, alpha: Tensor, levels: LevelSet, clip: ActClip) -> Tensor:
    """x_q of ``quantize_activation``."""
    alpha_used, u = _in_units(x, alpha)
    u = u.clamp(0, 1) if clip == "both" else u.clamp(max=1)
    return (project(u, levels) * alpha_used).to(x.dtype)


def activation_backward(
    grad: Tensor,
    x_q: Tensor,
    x: Tensor,
    alpha: Tensor,
    clip: ActClip,
    alpha_gradient: ActAlphaGradient,
    grad_scale: float,
) -> tuple[Tensor, Tensor]:
    """Gradients of ``quantize_activation``: of x, and of α."""
    alpha_used, u = _in_units(x, alpha)
    above = u > 1
    grad_x = torch.where(above | (u < 0) if clip == "both" else above, 0, grad)
    if alpha_gradient == "clipped-only":
        slope = above.to(u.dtype)
    else:
        inside = x_q / alpha_used - (u.clamp(min=0) if clip == "both" else u)
        slope = torch.where(above, 1, inside)
    return grad_x, _alpha_gradient(grad, slope, alpha, grad_scale)


class _QuantizeWeight(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, w: Tensor, alpha: Tensor, levels: LevelSet, clip_gradient: bool, grad_scale: float) -> Tensor:
        (w_q,) = run(weight_forward, (w,), (alpha,), levels)
        ctx.save_for_backward(w, w_q, alpha)
        ctx.settings = clip_gradient, grad_scale
        return w_q

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        w, w_q, alpha = ctx.saved_tensors
        return *run(weight_backward, (grad, w_q, w), (alpha,), *ctx.settings), None, None, None


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
        (x_q,) = run(activation_forward, (x,), (alpha,), levels, clip)
        ctx.save_for_backward(x, x_q, alpha)
        ctx.settings = clip, alpha_gradient, grad_scale
        return x_q

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, x_q, alpha = ctx.saved_tensors
        return *run(activation_backward, (grad, x_q, x), (alpha,), *ctx.settings), None, None, None, None


def _in_units(x: Tensor, alpha: Tensor) -> tuple[Tensor, Tensor]:
    # the threshold in use and u, both in the type computed in
    alpha_used = positive(alpha).to(torch.promote_types(x.dtype, torch.float32))
    return alpha_used, x.to(alpha_used.dtype) / alpha_used


def _alpha_gradient(grad: Tensor, slope: Tensor, alpha: Tensor, grad_scale: float) -> Tensor:
    return ((grad * slope).sum() * grad_scale).to(alpha.dtype)


# Tables are kept for the eager path alone: what a compiler traces must hold no tensor made outside of it.
@lru_cache(maxsize=256)
def _cell_levels(levels: LevelSet, dtype: torch.dtype, device: torch.device) -> Tensor:
    return _constant(tuple(levels.levels[code] for code in levels.cell_codes), dtype, device)


@lru_cache(maxsize=256)
def _constant(values: tuple[float, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    with torch.inference_mode(False):  # an inference tensor could not be used in training later
        return torch.tensor(values, dtype=dtype, device=device)
