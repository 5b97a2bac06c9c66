"""Some of many values, chosen at random: an even stride would meet the same column of every image."""

from __future__ import annotations

import torch
from torch import Tensor


def sample(values: Tensor, count: int) -> Tensor:
    """About ``count`` values, flat; all of them where they are no more. The places depend on the numbers alone."""
    flat = values.detach().flatten()
    return flat if len(flat) <= count else flat[_places(len(flat), count, flat.device)]


def sample_columns(rows_CK: Tensor, count: int) -> Tensor:
    """The same ``count`` columns of each row; all of them where they are no more."""
    columns = rows_CK.shape[1]
    return rows_CK if columns <= count else rows_CK[:, _places(columns, count, rows_CK.device)]


def _places(size: int, count: int, device: torch.device) -> Tensor:
    generator = torch.Generator().manual_seed(size)
    return torch.randint(size, (count,), generator=generator).to(device)
