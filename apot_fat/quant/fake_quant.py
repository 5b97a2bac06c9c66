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
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from apot_fat.quant.kernels import along_rows, run
from apot_fat.quant.levels import LevelSet
from apot_fat.quant.spec import ActAlphaGradient, InputClip

ALPHA_FLOOR = 1e-3
"""A threshold at or below zero is read as this (same unit as the threshold)."""
_MAX_EXACT_POT_DENOMINATOR = 1 << 64  # smaller levels come near float32's subnormals


def project(u: Tensor, levels: LevelSet) -> Tensor:
    """Nearest level to u.

    Equation: Π_L(u) = argmin over l in L of |u − l|. A tie goes up, but for uniform levels to the even multiple, as
    torch.round does and the published code did.

    Args:
        u: any shape, float32 or float64, range [0, 1]; uniform levels take any real number (rounded to the nearest
            multiple of 1 / d, which the published FAT and MobileNetV2 networks rely on below 0), and so do signed sets
            (what lies outside goes to the outermost level).
        levels: the level set.

    Returns:
        The levels, shape and type of u. No gradient: the callers define their own.
    """
    return _project_own(u.clone(), levels)


def _project_own(u: Tensor, levels: LevelSet) -> Tensor:
    # u may be overwritten: fresh memory costs more than the arithmetic
    if levels.is_signed:
        steps, lowest, one = (_literal(value, u) for value in (levels.steps, levels.levels[0], 1.0))
        n = u.clamp_(lowest, one).mul_(steps)
        n = n.sub_(1).div_(2).round_().mul_(2).add_(1) if levels.spacing == 2 else n.round_()
        return _over(n, levels.steps)
    if levels.is_uniform:
        return _over(u.mul_(_literal(levels.steps, u)).round_(), levels.steps)
    by_bits = levels.is_pot and u.dtype == torch.float32 and levels.denominator <= _MAX_EXACT_POT_DENOMINATOR
    if by_bits and not torch.compiler.is_compiling():
        octaves = u.view(torch.int32).bitwise_right_shift_(22).bitwise_and_(0x1FF)  # exponent and half of an octave
        return _octave_levels(levels, u.device).index_select(0, octaves.flatten()).view(u.shape)
    if levels.has_table and not torch.compiler.is_compiling():
        # NaN has a cell of its own; index_select takes half the time of indexing
        cells = u.clamp_(0, 1).mul_(2 * levels.denominator).nan_to_num_(nan=2 * levels.denominator + 1).to(torch.int32)
        return _cell_levels(levels, u.dtype, u.device).index_select(0, cells.flatten()).view(u.shape)
    if by_bits:
        q = _round_to_power_of_two(u, levels.levels[1])
    elif torch.compiler.is_compiling():
        q = _search(u, levels)
        q = _over(q, levels.steps) if levels.has_table else q
    else:
        thresholds = _constant(levels.thresholds, u.dtype, u.device)
        q = _constant(levels.levels, u.dtype, u.device)[torch.bucketize(u, thresholds, right=True)]
    return q.masked_fill_(u != u, math.nan)  # Inductor computes isnan() one element at a time


def _round_to_power_of_two(u: Tensor, smallest: float) -> Tensor:
    # half of the largest mantissa added to a float's bits carries into the exponent from 1.5 · 2^k on
    exponent = (u.view(torch.int32) + 0x00400000).bitwise_and_(-0x00800000)
    rounded = exponent.view(torch.float32).clamp_(min=_literal(smallest, u))
    return rounded.masked_fill_(u < _literal(smallest / 2, u), 0.0)


def _search(u: Tensor, levels: LevelSet) -> Tensor:
    # for a compiler: arithmetic alone, no table, and any real number. Binary search without branches: each comparison
    # with the sum of the middle two of the remaining values, which is twice their midpoint, chooses a half of them.
    # B comparisons and 2^B selections. Where there is a table, over numerators, and one of them is the result: the sums
    # are exact, and so the decisions those of the table.
    exact = levels.has_table
    values = list(levels.float_numerators if exact else levels.levels)
    values += [values[-1]] * ((1 << levels.bits) - len(values))
    twice = u * _literal(2 * levels.steps if exact else 2.0, u)
    left = [_literal(value, u) for value in values]
    while len(left) > 1:
        half = len(left) // 2
        above = twice >= left[half - 1] + left[half]
        left = [torch.where(above, b, a) for a, b in zip(left[:half], left[half:], strict=True)]
    return left[0]


def _over(n: Tensor, steps: float) -> Tensor:
    # n / steps, correctly rounded as levels are; n may be overwritten. Of a number CUDA would take the reciprocal and
    # multiply, and Inductor of a constant, but not of a selection.
    if not torch.compiler.is_compiling():
        return n.div_(_constant((steps,), n.dtype, n.device)[0] if n.is_cuda else steps)
    divisor = _literal(steps, n)
    return n / (torch.where(n != n, math.nan, divisor) if n.is_cuda else divisor)


def _literal(value: float, like: Tensor) -> Any:
    # torch.compile makes an argument of a number it reads from an object, or keeps it and then takes a kernel of other
    # levels from its cache on disk; not so of a filled tensor
    return torch.full((), value, dtype=like.dtype, device=like.device) if torch.compiler.is_compiling() else value


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
    return _QuantizeWeight.apply(w, alpha, levels, clip_gradient, grad_scale)


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
        x: activation, any shape.
        alpha: clipping threshold, 0-d, same unit as x; read as ``ALPHA_FLOOR`` where it is not positive.
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


def keeps_negatives(levels: LevelSet, clip: InputClip, signed: bool) -> bool:
    """Whether an activation's quantizer may turn a negative value into another than 0."""
    return signed or (levels.is_uniform and clip == "above")


def scaled(grad_alpha: Tensor, grad_scale: float) -> Tensor:
    """A threshold's gradient times ``grad_scale``: outside of the kernels, which layers of any scale thus share."""
    return grad_alpha if grad_scale == 1 else grad_alpha * grad_scale


def positive(alpha: Tensor) -> Tensor:
    """The threshold as used: α where it is positive (or NaN), ``ALPHA_FLOOR`` where it is not."""
    return torch.where(alpha <= 0, ALPHA_FLOOR, alpha)


def numerators(value: Tensor, scale: Tensor, denominator: int) -> Tensor:
    """The integers n of quantized values s n / d, int64; s 0-d or one a row."""
    return (value.double() / along_rows(scale.double(), value.dim()) * denominator).round().to(torch.int64)


def weight_forward(w: Tensor, alpha: Tensor, levels: LevelSet) -> Tensor:
    """w_q of ``quantize_weight``."""
    alpha_used, u = _in_units(w, alpha)
    if levels.is_signed:
        return _from_units(_project_own(u, levels), alpha_used, w.dtype)
    return _from_units(u.sign() * _project_clipped(u.abs(), levels, "above"), alpha_used, w.dtype)


def weight_backward(
    grad: Tensor, w_q: Tensor, w: Tensor, alpha: Tensor, clip_gradient: bool, lowest: float
) -> tuple[Tensor, Tensor]:
    """Gradients of ``quantize_weight``: of w, and of α before ``grad_scale``."""
    alpha_used, u = _in_units(w, alpha)
    low = _literal(lowest, u)
    above, below = u > 1, u < low
    slope = torch.where(above, 1, torch.where(below, low, w_q / alpha_used - u))
    grad_w = torch.where(above | below, 0, grad) if clip_gradient else grad
    return grad_w, _alpha_gradient(grad, slope, alpha)


def activation_forward(x: Tensor, alpha: Tensor, levels: LevelSet, clip: InputClip) -> Tensor:
    """x_q of ``quantize_activation``."""
    alpha_used, u = _in_units(x, alpha)
    return _from_units(_project_clipped(u, levels, clip), alpha_used, x.dtype)


def activation_forward_with_codes(x: Tensor, alpha: Tensor, levels: LevelSet, clip: InputClip) -> tuple[Tensor, Tensor]:
    """x_q of ``quantize_activation``, and the numerators of its levels as bytes: for ``has_codes`` only."""
    alpha_used, u = _in_units(x, alpha)
    q = _project_clipped(u, levels, clip)
    return (q * alpha_used).to(x.dtype), _codes(q, levels)


def activation_codes(x: Tensor, alpha: Tensor, levels: LevelSet, clip: InputClip) -> tuple[Tensor, Tensor]:
    """The numerators of ``quantize_activation``'s levels as bytes, for ``has_codes``; and 0, but NaN if x holds one."""
    u = _in_units(x, alpha)[1]
    if torch.compiler.is_compiling() and not levels.is_uniform and not levels.is_pot:
        return _search(u, levels).to(torch.uint8), torch.where(u != u, u, 0).sum()
    q = _project_clipped(u, levels, clip)
    return _codes(q, levels), q.sum() * 0.0  # of an integer 0 PyTorch 2.11 knows the product, of NaN too


def has_codes(levels: LevelSet, clip: InputClip) -> bool:
    """Whether every projected value has a numerator from 0 to 255."""
    return levels.fits_byte and (clip != "above" or not levels.is_uniform)


def activation_from_codes(codes: Tensor, alpha: Tensor, levels: LevelSet, dtype: torch.dtype) -> Tensor:
    """x_q again, from its numerators."""
    alpha_used = positive(alpha).to(torch.promote_types(dtype, torch.float32))
    return (_level(codes, levels, alpha_used.dtype) * alpha_used).to(dtype)


def activation_backward(
    grad: Tensor,
    x_q: Tensor,
    x: Tensor,
    alpha: Tensor,
    clip: InputClip,
    alpha_gradient: ActAlphaGradient,
) -> tuple[Tensor, Tensor]:
    """Gradients of ``quantize_activation``: of x, and of α before ``grad_scale``."""
    alpha_used, u = _in_units(x, alpha)
    return _activation_gradients(grad, x_q / alpha_used, u, alpha, clip, alpha_gradient)


def activation_backward_from_codes(
    grad: Tensor,
    codes: Tensor,
    x: Tensor,
    alpha: Tensor,
    levels: LevelSet,
    clip: InputClip,
    alpha_gradient: ActAlphaGradient,
) -> tuple[Tensor, Tensor]:
    """``activation_backward`` from the numerators."""
    u = _in_units(x, alpha)[1]
    return _activation_gradients(grad, _level(codes, levels, u.dtype), u, alpha, clip, alpha_gradient)


def _codes(q: Tensor, levels: LevelSet) -> Tensor:
    return (q * _literal(levels.steps, q) + 0.5).to(torch.uint8)


def _level(codes: Tensor, levels: LevelSet, dtype: torch.dtype) -> Tensor:
    return _over(codes.to(dtype), levels.steps)


def _project_clipped(u: Tensor, levels: LevelSet, clip: InputClip) -> Tensor:
    # u may be overwritten; look-up and search clip by themselves, and all but uniform levels have none below 0
    if levels.is_uniform or levels.is_pot:
        u = u.clamp_(max=1) if clip == "above" and levels.is_uniform else u.clamp_(0, 1)
    return _project_own(u, levels)


def _activation_gradients(
    grad: Tensor,
    q: Tensor,
    u: Tensor,
    alpha: Tensor,
    clip: InputClip,
    alpha_gradient: ActAlphaGradient,
) -> tuple[Tensor, Tensor]:
    above = u > 1
    outside = above
    if clip != "above":
        outside = above | (u < 0 if clip == "both" else u <= 0)
    if alpha_gradient == "clipped-only":
        slope = above.to(u.dtype)
    else:
        slope = torch.where(above, 1, q - (u if clip == "above" else u.clamp_(min=0)))
    return torch.where(outside, 0, grad), _alpha_gradient(grad, slope, alpha)


class _QuantizeWeight(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, w: Tensor, alpha: Tensor, levels: LevelSet, clip_gradient: bool, grad_scale: float) -> Tensor:
        (w_q,) = run(weight_forward, (w,), (alpha,), levels)
        ctx.save_for_backward(w, w_q, alpha)
        ctx.settings = clip_gradient, levels.levels[0] if levels.is_signed else -1.0
        ctx.grad_scale = grad_scale
        return w_q

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        w, w_q, alpha = ctx.saved_tensors
        grad_w, grad_alpha = run(weight_backward, (grad, w_q, w), (alpha,), *ctx.settings)
        return grad_w, scaled(grad_alpha, ctx.grad_scale), None, None, None


class _QuantizeActivation(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        alpha: Tensor,
        levels: LevelSet,
        clip: InputClip,
        alpha_gradient: ActAlphaGradient,
        grad_scale: float,
    ) -> Tensor:
        (x_q,) = run(activation_forward, (x,), (alpha,), levels, clip)
        ctx.save_for_backward(x, x_q, alpha)
        ctx.settings = clip, alpha_gradient
        ctx.grad_scale = grad_scale
        return x_q

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, x_q, alpha = ctx.saved_tensors
        grad_x, grad_alpha = run(activation_backward, (grad, x_q, x), (alpha,), *ctx.settings)
        return grad_x, scaled(grad_alpha, ctx.grad_scale), None, None, None, None


def _in_units(x: Tensor, alpha: Tensor) -> tuple[Tensor, Tensor]:
    # the threshold in use and u, both in the type computed in
    alpha_used = positive(alpha).to(torch.promote_types(x.dtype, torch.float32))
    return alpha_used, x.to(alpha_used.dtype) / alpha_used


def _from_units(q: Tensor, alpha_used: Tensor, dtype: torch.dtype) -> Tensor:
    # α q; q may be overwritten. PyTorch 2.11 compiles an autograd function without its gradient where the result is
    # written in place, or by a conversion that changes nothing.
    value = q * alpha_used if torch.compiler.is_compiling() else q.mul_(alpha_used)
    return value if value.dtype == dtype else value.to(dtype)


def _alpha_gradient(grad: Tensor, slope: Tensor, alpha: Tensor) -> Tensor:
    parts = slope.mul_(grad)
    return (parts.flatten(1).sum(1) if alpha.dim() else parts.sum()).to(alpha.dtype)


# Tables are kept for the eager path alone: what a compiler traces must hold no tensor made outside of it.
@lru_cache(maxsize=256)
def _cell_levels(levels: LevelSet, dtype: torch.dtype, device: torch.device) -> Tensor:
    return _constant((*(levels.levels[code] for code in levels.cell_codes), math.nan), dtype, device)


@lru_cache(maxsize=256)
def _octave_levels(levels: LevelSet, device: torch.device) -> Tensor:
    # nearest level of every float32 by its exponent and the first bit of its mantissa, on which alone it depends
    with torch.inference_mode(False):
        inside = (torch.arange(0x1FF, dtype=torch.int32) << 22) + (1 << 21)
        codes = torch.bucketize(inside.view(torch.float32).double(), torch.tensor(levels.thresholds).double())
        nearest = torch.tensor(levels.levels)[codes]
        nearest[0x1FE:] = math.nan
        return torch.cat([nearest, nearest[-1:]]).to(device)


@lru_cache(maxsize=256)
def _constant(values: tuple[float, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    with torch.inference_mode(False):  # an inference tensor could not be used in training later
        return torch.tensor(values, dtype=dtype, device=device)
