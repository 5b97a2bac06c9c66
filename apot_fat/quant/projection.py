"""Projection onto a level set: of each value the nearest level."""

from __future__ import annotations

import math
from itertools import pairwise

import torch
from torch import Tensor

from apot_fat.quant.levels import LevelSet


def project(u: Tensor, levels: LevelSet) -> Tensor:
    """Nearest level to u.

    Equation: Π_L(u) = argmin over l in L of |u − l|. A tie goes up, but for uniform levels to the even multiple, as
    torch.round does and the published code did.

    Args:
        u: any shape, float32 or float64, range [0, 1]; what lies outside goes to the outermost level, but uniform
            levels of magnitudes go on outside (rounded to the nearest multiple of 1 / d, which the published FAT and
            MobileNetV2 networks rely on below 0).
        levels: the level set.

    Returns:
        The levels, shape and type of u; NaN stays NaN. No gradient: the callers define their own.
    """

    def number(value: float) -> Tensor:
        # CUDA would multiply with a float's reciprocal, and torch.compile confuse the kernels of different floats
        return u.new_full((), value)

    if levels.is_signed or levels.is_uniform:
        n = (u.clamp(number(levels.levels[0]), number(1)) if levels.is_signed else u) * number(levels.steps)
        n = n.round() if levels.spacing == 1 else 2 * ((n - 1) / 2).round() + 1
        return n / number(levels.steps)
    midpoints = levels.thresholds
    if levels.has_table:  # over 2d they are integers, compared without rounding
        u, midpoints = u * number(2 * levels.steps), tuple(a + b for a, b in pairwise(levels.float_numerators))
    nearest = torch.bucketize(u.contiguous(), u.new_tensor(midpoints), right=True)
    return torch.where(u.isnan(), math.nan, u.new_tensor(levels.levels)[nearest])
