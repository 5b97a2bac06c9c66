"""Values in units of their clipping threshold, which a tensor or each of its rows has."""

from __future__ import annotations

import torch
from torch import Tensor

ALPHA_FLOOR = 1e-3
"""A threshold at or below zero is read as this (same unit as the threshold)."""


def threshold_in_use(alpha: Tensor) -> Tensor:
    """The threshold as used: α where it is positive (or NaN), ``ALPHA_FLOOR`` where it is not."""
    return torch.where(alpha <= 0, ALPHA_FLOOR, alpha)


def along_rows(values: Tensor, dim: int) -> Tensor:
    """Values to multiply tensors of ``dim`` dimensions with: 0-d as it is; one a row, (C,), in the shape (C, 1, …)."""
    return values.view(-1, *[1] * (dim - 1)) if values.dim() else values


def in_units(x: Tensor, alpha: Tensor) -> tuple[Tensor, Tensor]:
    """The threshold as used and u = x / α, both in the type computed in: float32, or float64 if x is."""
    alpha_used = threshold_in_use(alpha).to(torch.promote_types(x.dtype, torch.float32))
    return alpha_used, x.to(alpha_used.dtype) / alpha_used
