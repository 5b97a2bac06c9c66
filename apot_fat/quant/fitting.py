"""The clipping threshold of given values: of least squared error, or from LSQ's initial step."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from apot_fat.quant.fake_quant import quantize_weight
from apot_fat.quant.levels import LevelSet
from apot_fat.quant.sampling import sample, sample_columns

FIT_SAMPLES = 1 << 16
"""Values that a threshold is fitted to."""
_FIT_CHANNEL_SAMPLES = 1 << 10
_FIT_RANGE, _FIT_STEPS, _FINE_STEPS = (0.01, 4.0), 100, 21


def fit_threshold(values: Tensor, levels: LevelSet, *, signed: bool) -> float:
    """The clipping threshold of least squared error.

    Equation: argmin over α of Σ (v − v_q(α))², α / max |v| on a geometric grid of 100 from 1/100 to 4 (levels of powers
    of two lie densest near 0, so that it may pay to leave the upper ones unused), then on 21 around the best of them;
    about 65,000 values taken at random stand for more.

    Args:
        values: any shape, not empty.
        levels: the level set.
        signed: whether levels stand for magnitudes; otherwise a negative value goes to 0.

    Returns:
        α, same unit as the values; 1 where no value is positive (or, signed, not zero).
    """
    return fit_all(values, levels, signed=signed).item()


@torch.no_grad()
def fit_all(values: Tensor, levels: LevelSet, *, signed: bool) -> Tensor:
    """``fit_threshold`` as a tensor, 0-d."""
    values = sample(values, FIT_SAMPLES).float()
    return _fit_rows((values if signed else values.clamp(min=0))[None], levels)[0]


@torch.no_grad()
def fit_rows(values_CK: Tensor, levels: LevelSet, *, signed: bool) -> Tensor:
    """``fit_threshold`` of each row, (C,); about 1,000 values taken at random stand for a row's."""
    values_CK = sample_columns(values_CK, _FIT_CHANNEL_SAMPLES).float()
    return _fit_rows(values_CK if signed else values_CK.clamp(min=0), levels)


def initial_step_threshold(mean_magnitude: Tensor, levels: LevelSet) -> Tensor:
    """LSQ's initial step as a threshold.

    Equation: α = Q_P s, s = 2 mean |v| / √Q_P, Q_P the number of levels above 0.

    Paper: LSQ, "Learned Step Size Quantization", section 2.1.
    """
    return 2 * levels.positive_levels**0.5 * mean_magnitude


def _fit_rows(values_CK: Tensor, levels: LevelSet) -> Tensor:
    # the threshold of each row, (C,)
    largest_C = values_CK.abs().amax(1)
    coarse_S = torch.logspace(math.log10(_FIT_RANGE[0]), math.log10(_FIT_RANGE[1]), _FIT_STEPS, device=values_CK.device)
    best_C = _best_of(values_CK, coarse_S[:, None] * largest_C, levels)
    step = math.log10(_FIT_RANGE[1] / _FIT_RANGE[0]) / (_FIT_STEPS - 1)
    best_C = _best_of(
        values_CK, torch.logspace(-step, step, _FINE_STEPS, device=values_CK.device)[:, None] * best_C, levels
    )
    return torch.where((largest_C > 0) & largest_C.isfinite(), best_C, 1.0)


def _best_of(values_CK: Tensor, candidates_SC: Tensor, levels: LevelSet) -> Tensor:
    errors = [
        (quantize_weight(values_CK, alpha_C, levels, clip_gradient=True) - values_CK).square().sum(1)
        for alpha_C in candidates_SC
    ]
    return candidates_SC.gather(0, torch.stack(errors).argmin(0, keepdim=True))[0]
