"""Projection onto a level set from tables, from the bits of floats, and for a compiler from arithmetic alone.

The decisions are those of ``apot_fat.quant.projection``, to the bit.
"""

from __future__ import annotations

import math
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from apot_fat.quant import projection
from apot_fat.quant.levels import LevelSet

_MAX_EXACT_POT_DENOMINATOR = 1 << 64  # smaller levels come near float32's subnormals


def project(u: Tensor, levels: LevelSet) -> Tensor:
    """Nearest level to u, which may be overwritten: fresh memory costs more than the arithmetic."""
    if levels.is_signed:
        steps, lowest, one = (literal(value, u) for value in (levels.steps, levels.levels[0], 1.0))
        n = u.clamp_(lowest, one).mul_(steps)
        n = n.sub_(1).div_(2).round_().mul_(2).add_(1) if levels.spacing == 2 else n.round_()
        return over_steps(n, levels.steps)
    if levels.is_uniform:
        return over_steps(u.mul_(literal(levels.steps, u)).round_(), levels.steps)
    by_bits = levels.is_pot and u.dtype == torch.float32 and levels.denominator <= _MAX_EXACT_POT_DENOMINATOR
    if by_bits:
        u = u.clamp_(0, 1)
    if torch.compiler.is_compiling():
        q = _round_to_power_of_two(u, levels.levels[1]) if by_bits else search(u, levels)
        q = over_steps(q, levels.steps) if levels.has_table and not by_bits else q
        return torch.where(u != u, math.nan, q)  # Inductor computes isnan() one element at a time
    if by_bits:
        octaves = u.view(torch.int32).bitwise_right_shift_(22).bitwise_and_(0x1FF)  # exponent and half of an octave
        return _octave_levels(levels, u.device).index_select(0, octaves.flatten()).view(u.shape)
    if levels.has_table:
        return _look_up(_cell_levels(levels, u.dtype, u.device), u.clamp_(0, 1), levels)
    return projection.project(u, levels)


def _look_up(table: Tensor, u: Tensor, levels: LevelSet) -> Tensor:
    # NaN has a cell of its own; index_select takes half the time of indexing
    cells = u.mul_(2 * levels.denominator).nan_to_num_(nan=2 * levels.denominator + 1).to(torch.int32)
    return table.index_select(0, cells.flatten()).view(u.shape)


def codes_from_table(u: Tensor, levels: LevelSet) -> Tensor:
    """Numerator of the level nearest to u, of magnitudes with a table, as bytes; u in [0, 1], which is overwritten."""
    if levels.is_uniform:
        return u.mul_(levels.steps).round_().to(torch.uint8)
    return _look_up(_cell_numerators(levels, u.device), u, levels)


def _round_to_power_of_two(u: Tensor, smallest: float) -> Tensor:
    # half of the largest mantissa added to a float's bits carries into the exponent from 1.5 · 2^k on
    exponent = (u.view(torch.int32) + 0x00400000).bitwise_and_(-0x00800000)
    rounded = exponent.view(torch.float32).clamp_(min=literal(smallest, u))
    return torch.where(u < literal(smallest / 2, u), 0.0, rounded)


def search(u: Tensor, levels: LevelSet) -> Tensor:
    """Nearest level to u, any real number, by arithmetic alone; its numerator where there is a table.

    Binary search without branches: each comparison with the sum of the middle two of the remaining values, which is
    twice their midpoint, chooses a half of them. B comparisons and 2^B selections. Over numerators the sums are exact,
    and so the decisions those of the table.
    """
    exact = levels.has_table
    values = list(levels.float_numerators if exact else levels.levels)
    values += [values[-1]] * ((1 << levels.bits) - len(values))
    twice = u * literal(2 * levels.steps if exact else 2.0, u)
    left = [literal(value, u) for value in values]
    while len(left) > 1:
        half = len(left) // 2
        above = twice >= left[half - 1] + left[half]
        left = [torch.where(above, b, a) for a, b in zip(left[:half], left[half:], strict=True)]
    return left[0]


def over_steps(n: Tensor, steps: float) -> Tensor:
    """n / steps, correctly rounded as levels are; n may be overwritten."""
    # of a number CUDA would take the reciprocal and multiply, and Inductor of a constant, but not of a selection
    if not torch.compiler.is_compiling():
        return n.div_(_constant((steps,), n.dtype, n.device)[0] if n.is_cuda else steps)
    divisor = literal(steps, n)
    return n / (torch.where(n != n, math.nan, divisor) if n.is_cuda else divisor)


def literal(value: float, like: Tensor) -> Any:
    """A number of a formula, as a tensor where it is compiled."""
    # torch.compile makes an argument of a number it reads from an object, or keeps it and then takes a kernel of other
    # levels from its cache on disk; not so of a filled tensor
    return torch.full((), value, dtype=like.dtype, device=like.device) if torch.compiler.is_compiling() else value


# Tables are kept for the eager path alone: what a compiler traces must hold no tensor made outside of it.
@lru_cache(maxsize=256)
def _cell_levels(levels: LevelSet, dtype: torch.dtype, device: torch.device) -> Tensor:
    return _constant((*(levels.levels[code] for code in levels.cell_codes), math.nan), dtype, device)


@lru_cache(maxsize=256)
def _cell_numerators(levels: LevelSet, device: torch.device) -> Tensor:
    return _constant((*(levels.numerators[code] for code in levels.cell_codes), 0), torch.uint8, device)


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
