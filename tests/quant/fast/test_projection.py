from __future__ import annotations

import pytest
import torch

from apot_fat.quant import level_set, project
from apot_fat.quant.fast import projection
from apot_fat.quant.levels import LEVEL_FAMILIES, SIGNED_FAMILIES


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.parametrize("family", [*LEVEL_FAMILIES, *SIGNED_FAMILIES])
def test_decisions_are_the_plain_ones_to_the_bit(family: str, bits: int, dtype: torch.dtype) -> None:
    levels = level_set(family, bits)
    edges = torch.tensor([*levels.thresholds, *levels.levels, 1e-40, 0.0], dtype=torch.float64).to(dtype)
    beside = [edges.nextafter(torch.full_like(edges, side)) for side in (-9.0, 9.0)]
    special = torch.tensor([-0.0, 1.5, -3.0, torch.inf, -torch.inf, torch.nan], dtype=dtype)
    u = torch.cat([edges, -edges, *beside, special, torch.rand(2000, dtype=dtype), torch.randn(500, dtype=dtype)])
    torch.testing.assert_close(
        projection.project(u.clone(), levels), project(u, levels), atol=0, rtol=0, equal_nan=True
    )
