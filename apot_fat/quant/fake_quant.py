"""Fake quantization: project onto a level set, with the published gradients.

Every function here is pure: tensors in, tensors out. Forward and backward of each quantizer are one pointwise function
each (with the sum for the threshold), which ``seam.speed`` runs. Half-precision inputs are computed in float32 and
returned in their own type; a level is α times a float, so bfloat16 rounds the result once more.

Legend: u is the value in units of the threshold α, q the projected u, g the upstream gradient, 1[·] an indicator; the
bounds count as inside. NaN stays NaN.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from apot_fat.quant import seam
from apot_fat.quant.levels import LevelSet
from apot_fat.quant.spec import ActAlphaGradient, InputClip
from apot_fat.quant.units import in_units


def quantize_weight(
    w: Tensor, alpha: Tensor, levels: LevelSet, *, clip_gradient: bool, grad_scale: float = 1.0
) -> Tensor:
    """Fake-quantize a (normalised) weight.

    Equation: u = w / α;  w_q = α · sign(u) · Π_L(min(|u|, 1)), of a signed set α · Π_L(clip(u, l, 1)); l is the lowest
    level: −1 for magnitudes.

    Args:
        w: weight, any shape (C, …) with one threshold a channel.
        alpha: clipping threshold, 0-d or (C,), same unit as w; read as ``ALPHA_FLOOR`` where it is not positive.
        levels: magnitude levels, or signed ones.
        clip_gradient: False passes the gradient whole ("calibrated"), True only where l ≤ u ≤ 1.
        grad_scale: factor on the threshold's gradient.

    Returns:
        w_q, shape and type of w.

    Gradient: ∂L/∂w = g, or g · 1[l ≤ u ≤ 1];  ∂L/∂α = grad_scale · Σ g · (1[u > 1] + l 1[u < l] + (q − u) 1[l ≤ u ≤ 1])
    over the weights of the threshold.

    Paper: APoT, "Reparameterized Clipping Function"; the calibrated gradient is the published code's. A non-positive
    α gives zeros or NaN there, here a network that can recover. LSQ, equations 1 to 5, for signed sets.
    """
    lowest = levels.levels[0] if levels.is_signed else -1.0
    return _Quantize.apply(w, alpha, (weight_forward, levels), (weight_backward, clip_gradient, lowest), grad_scale)


def quantize_activation(
    x: Tensor,
    alpha: Tensor,
    levels: LevelSet,
    *,
    clip: InputClip = "above",
    alpha_gradient: ActAlphaGradient = "full",
    grad_scale: float = 1.0,
) -> Tensor:
    """Fake-quantize an activation.

    Equation: u = x / α;  x_q = α · Π_L(clip(u)), clip to [0, 1] (``both``) or above at 1 only (``above``): then a
    negative goes to level 0 with APoT and PoT levels, and to a negative multiple of the step with uniform ones.

    Args:
        x: activation, any shape (C, …) with one threshold a channel.
        alpha: clipping threshold, 0-d or (C,), same unit as x; read as ``ALPHA_FLOOR`` where it is not positive.
        levels: levels on [0, 1].
        clip: ``above``, ``both``, or ``relu`` for the quantized max(x, 0) in one pass.
        alpha_gradient: ``full`` or ``clipped-only``.
        grad_scale: factor on the threshold's gradient.

    Returns:
        x_q, shape and type of x.

    Gradient: ∂L/∂x = g · 1[u ≤ 1] (``both``: g · 1[0 ≤ u ≤ 1]; ``relu``: g · 1[0 < u ≤ 1]);
    ∂L/∂α = grad_scale · Σ g · (1[u > 1] + (q − u) 1[u ≤ 1]) (``both`` and ``relu``: the second term 0 below 0;
    ``clipped-only``: the first term alone).

    Paper: APoT, "Reparameterized Clipping Function"; PACT for the ``clipped-only`` gradient.
    """
    return _Quantize.apply(
        x, alpha, (activation_forward, levels, clip), (activation_backward, clip, alpha_gradient), grad_scale
    )


def eight_bit_weight(w: Tensor) -> Tensor:
    """The published 8-bit weight of first and last layers.

    Equation: s = max(w) (the maximum, not the largest magnitude); w_q = round(127 w / s) / 127 · s.

    Args:
        w: weight, any shape. A weight with max(w) ≤ 0 has no such scale and is returned as it is.

    Gradient: ∂L/∂w = g (straight-through).

    Departs from the published code where max(w) ≤ 0: that divides by zero or flips the roles of the signs.
    """
    with torch.no_grad():
        exact = w.to(torch.promote_types(w.dtype, torch.float32))
        scale = exact.max()
        rounded = (exact / scale * 127).round() / 127 * scale
        rounded = torch.where(scale > 0, rounded, exact).to(w.dtype)
    return w + (rounded - w).detach()


def scaled(grad_alpha: Tensor, grad_scale: float) -> Tensor:
    """A threshold's gradient times ``grad_scale``: outside of the kernels, which layers of any scale thus share."""
    return grad_alpha if grad_scale == 1 else grad_alpha * grad_scale


def weight_forward(w: Tensor, alpha: Tensor, levels: LevelSet) -> Tensor:
    """w_q of ``quantize_weight``."""
    alpha_used, u = in_units(w, alpha)
    if levels.is_signed:
        q = seam.speed.project(u, levels)
    else:
        q = u.sign() * seam.speed.project(u.abs().clamp_(max=1), levels)
    return _from_units(q, alpha_used, w.dtype)


def weight_backward(
    grad: Tensor, w_q: Tensor, w: Tensor, alpha: Tensor, clip_gradient: bool, lowest: float
) -> tuple[Tensor, Tensor]:
    """Gradients of ``quantize_weight``: of w, and of α before ``grad_scale``."""
    alpha_used, u = in_units(w, alpha)
    low = u.new_full((), lowest)
    above, below = u > 1, u < low
    slope = torch.where(above, 1, torch.where(below, low, w_q / alpha_used - u))
    grad_w = torch.where(above | below, 0, grad) if clip_gradient else grad
    parts = slope.mul_(grad)
    return grad_w, (_sum_of_rows(parts) if alpha.dim() else parts.sum()).to(alpha.dtype)


def activation_forward(x: Tensor, alpha: Tensor, levels: LevelSet, clip: InputClip) -> Tensor:
    """x_q of ``quantize_activation``."""
    alpha_used, u = in_units(x, alpha)
    return _from_units(project_input(u, levels, clip), alpha_used, x.dtype)


def project_input(u: Tensor, levels: LevelSet, clip: InputClip) -> Tensor:
    """Π_L(clip(u)) of ``quantize_activation``; u may be overwritten."""
    return seam.speed.project(u.clamp_(max=1) if clip == "above" else u.clamp_(0, 1), levels)


def activation_backward(
    grad: Tensor, x_q: Tensor, x: Tensor, alpha: Tensor, clip: InputClip, alpha_gradient: ActAlphaGradient
) -> tuple[Tensor, Tensor]:
    """Gradients of ``quantize_activation``: of x, and of α before ``grad_scale``."""
    alpha_used, u = in_units(x, alpha)
    return activation_gradients(grad, x_q / alpha_used, u, alpha, clip, alpha_gradient)


def activation_gradients(
    grad: Tensor, q: Tensor, u: Tensor, alpha: Tensor, clip: InputClip, alpha_gradient: ActAlphaGradient
) -> tuple[Tensor, Tensor]:
    """``activation_backward`` from the level and the value, both in units of α; u may be overwritten."""
    above = u > 1
    outside = above
    if clip != "above":
        outside = above | (u < 0 if clip == "both" else u <= 0)
    if alpha_gradient == "clipped-only":
        slope = above.to(u.dtype)
    else:
        slope = torch.where(above, 1, q - (u if clip == "above" else u.clamp_(min=0)))
    parts = slope.mul_(grad)
    grad_alpha = _sum_of_rows(parts) if alpha.dim() else seam.speed.total(parts)
    return torch.where(outside, 0, grad), grad_alpha.to(alpha.dtype)


def _sum_of_rows(parts: Tensor) -> Tensor:
    return parts[..., None].flatten(1).sum(1)


class _Quantize(torch.autograd.Function):
    # a forward and a backward function, each with its settings
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, alpha: Tensor, forward: tuple[Any, ...], backward: tuple[Any, ...], grad_scale: float
    ) -> Tensor:
        function, *settings = forward
        (x_q,) = seam.speed.pointwise(function, (x,), (alpha,), *settings)
        ctx.save_for_backward(x, x_q, alpha)
        ctx.backward, ctx.grad_scale = backward, grad_scale
        return x_q

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, x_q, alpha = ctx.saved_tensors
        function, *settings = ctx.backward
        grad_x, grad_alpha = seam.speed.pointwise(function, (grad, x_q, x), (alpha,), *settings)
        return grad_x, scaled(grad_alpha, ctx.grad_scale), None, None, None


def _from_units(q: Tensor, alpha_used: Tensor, dtype: torch.dtype) -> Tensor:
    # α q; q may be overwritten, fresh memory costs more. PyTorch 2.11 compiles an autograd function without its
    # gradient where the result is written in place, or by a conversion that changes nothing.
    value = q * alpha_used if torch.compiler.is_compiling() else q.mul_(alpha_used)
    return value if value.dtype == dtype else value.to(dtype)
