"""Fitted thresholds: of all candidates the one of least error."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from apot_fat.quant import LevelSet, fit_threshold, level_set, quantize_weight
from apot_fat.quant.fitting import fit_rows

SETS = [("apot", 1), ("apot", 4), ("apot", 8), ("pot", 3), ("pot", 8), ("uniform", 2), ("uniform", 7)]
SIGNED_SETS = [("twos-complement", 2), ("twos-complement", 8), ("odd", 1), ("odd", 4)]


def errors(values: Tensor, candidates: Tensor, levels: LevelSet) -> Tensor:
    quantized = [quantize_weight(values, alpha, levels, clip_gradient=True) for alpha in candidates]
    return torch.stack([(q - values).square().sum() for q in quantized])


def least_error(values: Tensor, levels: LevelSet) -> Tensor:
    """By one pass over the values for each candidate."""
    values = values.double()
    step = 400 ** (1 / 99)
    candidates = values.abs().max() * torch.logspace(-2, 0.6020599913279624, 100, dtype=torch.float64)
    coarse = candidates[errors(values, candidates, levels).argmin()]
    fine = coarse * step ** torch.linspace(-1, 1, 21, dtype=torch.float64)
    return errors(values, fine, levels).min()


@pytest.mark.parametrize(("family", "bits"), [*SETS, *SIGNED_SETS])
def test_a_rows_threshold_has_the_least_error_of_all_candidates(family: str, bits: int) -> None:
    levels = level_set(family, bits)
    rows = torch.stack([torch.randn(500), torch.rand(500) ** 4, torch.randn(500) * 1e-6, 1 + torch.rand(500)])
    for row, alpha in zip(rows, fit_rows(rows, levels, signed=True), strict=True):
        found = errors(row.double(), alpha.double()[None], levels)[0]
        torch.testing.assert_close(found, least_error(row, levels), rtol=1e-5, atol=0)


@pytest.mark.parametrize(("family", "bits"), [("apot", 4), ("pot", 8), ("twos-complement", 4)])
def test_a_rows_threshold_depends_on_the_row_alone(family: str, bits: int) -> None:
    levels = level_set(family, bits)
    rows = torch.randn(300, 40)
    rows[7], rows[8], rows[9] = 0, torch.nan, torch.inf
    together = fit_rows(rows, levels, signed=True)
    assert together[7:10].tolist() == [1, 1, 1]
    assert together.tolist() == [fit_threshold(row, levels, signed=True) for row in rows]
