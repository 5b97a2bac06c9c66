"""Quantized activations as the numerators of their levels, a byte each.

Pointwise functions like those of ``apot_fat.quant.fake_quant``, in its notation.
"""

from __future__ import annotations

import torch
from torch import Tensor

from apot_fat.quant.fake_quant import activation_gradients, project_input
from apot_fat.quant.fast.projection import codes_from_table, literal, over_steps, search
from apot_fat.quant.levels import LevelSet
from apot_fat.quant.spec import ActAlphaGradient, InputClip
from apot_fat.quant.units import in_units, threshold_in_use


def has_codes(levels: LevelSet, clip: InputClip) -> bool:
    """Whether every projected value has a numerator from 0 to 255."""
    return levels.fits_byte and (clip != "above" or not levels.is_uniform)


def activation_forward_with_codes(x: Tensor, alpha: Tensor, levels: LevelSet, clip: InputClip) -> tuple[Tensor, Tensor]:
    """x_q of ``quantize_activation``, and the numerators of its levels as bytes: for ``has_codes`` only."""
    alpha_used, u = in_units(x, alpha)
    q = project_input(u, levels, clip)
    return (q * alpha_used).to(x.dtype), _codes_of(q, levels)


def activation_codes(x: Tensor, alpha: Tensor, levels: LevelSet, clip: InputClip) -> Tensor:
    """The numerators of ``quantize_activation``'s levels as bytes, for ``has_codes``; of NaN any byte."""
    u = in_units(x, alpha)[1]
    if torch.compiler.is_compiling() and not levels.is_uniform and not levels.is_pot:
        return search(u, levels).to(torch.uint8)
    if not torch.compiler.is_compiling() and levels.has_table:
        return codes_from_table(u.clamp_(0, 1), levels)
    return _codes_of(project_input(u, levels, clip), levels)


def activation_from_codes(codes: Tensor, alpha: Tensor, levels: LevelSet, dtype: torch.dtype) -> Tensor:
    """x_q again, from its numerators."""
    alpha_used = threshold_in_use(alpha).to(torch.promote_types(dtype, torch.float32))
    return (_levels_of(codes, levels, alpha_used.dtype) * alpha_used).to(dtype)


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
    u = in_units(x, alpha)[1]
    return activation_gradients(grad, _levels_of(codes, levels, u.dtype), u, alpha, clip, alpha_gradient)


def _codes_of(q: Tensor, levels: LevelSet) -> Tensor:
    return (q * literal(levels.steps, q) + 0.5).to(torch.uint8)


def _levels_of(codes: Tensor, levels: LevelSet, dtype: torch.dtype) -> Tensor:
    return over_steps(codes.to(dtype), levels.steps)
