"""The clipping threshold of given values: of least squared error, or from LSQ's initial step."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from apot_fat.quant.levels import LevelSet
from apot_fat.quant.sampling import sample, sample_columns

FIT_SAMPLES = 1 << 16
"""Values that a threshold is fitted to."""
_FIT_CHANNEL_SAMPLES = 1 << 10
_FIT_RANGE, _FIT_STEPS, _FINE_STEPS = (0.01, 4.0), 100, 21
_FIT_CUTS = 1 << 18  # decision thresholds at once, a row's those of all candidates: some megabytes


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
    low, high = (math.log10(bound) for bound in _FIT_RANGE)
    step, device = (high - low) / (_FIT_STEPS - 1), values_CK.device
    coarse = _Candidates(torch.logspace(low, high, _FIT_STEPS, device=device), levels)
    fine = _Candidates(torch.logspace(-step, step, _FINE_STEPS, device=device), levels)
    best = []
    for part_CK in values_CK.split(max(1, _FIT_CUTS // len(coarse.cuts_M))):
        largest_C = part_CK.abs().amax(1)
        sorted_CK = (part_CK if levels.is_signed else part_CK.abs()).double().sort(1).values
        best_C = fine.best_of(sorted_CK, coarse.best_of(sorted_CK, largest_C))
        best.append(torch.where((largest_C > 0) & largest_C.isfinite(), best_C, 1.0))
    return torch.cat(best)


class _Candidates:
    """Thresholds in units that each row of values has: their errors come from a histogram, not from a pass for each.

    Equation: of K sorted values u in such units, and a threshold f with its decision thresholds c_i, n_i values lie
    below c_i, and P_n is the sum of the first n. As the largest level is 1, Σ (u − u_q)² − Σ u² =
    f² (K − Σ_i (l²_{i+1} − l²_i) n_i) − 2f (P_K − Σ_i (l_{i+1} − l_i) P_{n_i}), in float64, since most of it cancels.
    In units, the c_i of all thresholds are those of every row: one histogram between them gives all n_i.
    """

    def __init__(self, factors_S: Tensor, levels: LevelSet) -> None:
        self.factors_S, self.levels_L = factors_S, levels.tensor(torch.float64, factors_S.device)
        cuts_ST = factors_S.double()[:, None] * (self.levels_L[1:] + self.levels_L[:-1]) / 2
        self.shape_ST = cuts_ST.shape
        self.cuts_M, order_M = cuts_ST.flatten().sort()
        self.places_M = order_M.argsort()

    def best_of(self, sorted_CK: Tensor, unit_C: Tensor) -> Tensor:
        """Of each row's thresholds the first of least error, (C,); values as magnitudes, but for signed levels."""
        u_CK = sorted_CK / unit_C[:, None]
        cells_CK = torch.bucketize(u_CK, self.cuts_M, right=True)
        counts_CM = cells_CK.new_zeros(len(u_CK), len(self.cuts_M) + 1)
        counts_CM.scatter_add_(1, cells_CK, torch.ones_like(cells_CK))
        below_CM = counts_CM.cumsum(1).index_select(1, self.places_M)
        sums_CN = F.pad(u_CK.cumsum(1), (1, 0))
        sums_CST = sums_CN.gather(1, below_CM).unflatten(1, self.shape_ST)
        products_CS = sums_CN[:, -1:] - sums_CST @ self.levels_L.diff()
        below_CST = below_CM.double().unflatten(1, self.shape_ST)
        squares_CS = u_CK.shape[1] - below_CST @ self.levels_L.square().diff()
        errors_CS = self.factors_S * (self.factors_S * squares_CS - 2 * products_CS)
        return self.factors_S[errors_CS.argmin(1)] * unit_C
