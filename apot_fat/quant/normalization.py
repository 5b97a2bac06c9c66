"""The weight in the unit its threshold is given in."""

from __future__ import annotations

import torch
from torch import Tensor

from apot_fat.quant.spec import QuantSpec

CONSTANT = 1e-6
"""A weight whose standard deviation is at most this share of its |mean| is constant but for rounding."""


def normalize_weight(w: Tensor, spec: QuantSpec) -> Tensor:
    """The weight in the unit its threshold is given in.

    Equation: ŵ = (w − mean(w)) / std(w) over the whole tensor, std unbiased (``standardize``); w − mean(w)
    (``center``); tanh(w) / max |tanh(w)| (``tanh``); w (``none``). A constant weight has std 0 but for rounding,
    std ≤ 1e-6 |mean|, and gives ŵ = 0; with ``tanh`` a weight of zeros does.

    Args:
        w: weight, any shape.
        spec: ``weight_norm`` and ``weight_norm_gradient``.

    Gradient: of the equation, with mean, std and maximum as constants unless ``weight_norm_gradient``.

    Paper: APoT, "Weight Normalization"; DoReFa-Net for ``tanh``, before its affine map to [0, 1] and back.
    """
    if spec.weight_norm == "none":
        return w
    if spec.weight_norm == "tanh":
        bounded = torch.tanh(w)
        largest = (bounded if spec.weight_norm_gradient else bounded.detach()).abs().max()
        return bounded / torch.where(largest == 0, 1, largest)
    source = w if spec.weight_norm_gradient else w.detach()
    mean = source.mean()
    centered = w - mean
    if spec.weight_norm == "center":
        return centered
    if w.numel() < 2:
        return centered
    std = source.std()
    return centered / torch.where(std <= CONSTANT * mean.detach().abs(), 1, std)


def deviation(w: Tensor) -> Tensor:
    """The standard deviation of a weight, a constant for the gradient; 1 for a weight that has none."""
    std = w.detach().std(correction=0)
    return torch.where(std > 0, std, 1)
