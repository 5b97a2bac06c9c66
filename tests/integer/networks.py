"""Small networks and images that the tests of integer programs share."""

from __future__ import annotations

from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor, nn

from apot_fat.quant import EIGHT_BIT, QuantConv2d, QuantLinear, preset

Network = TypeVar("Network", bound=nn.Module)

MEAN, STD = (0.45, 0.5, 0.55), (0.2, 0.25, 0.3)
NORMALIZATION: dict[str, Any] = {"mean": MEAN, "std": STD}


def random_pixels(count: int, size: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (count, 3, size, size)).astype(np.uint8)


def normalized(pixels: np.ndarray) -> Tensor:
    mean, std = (torch.tensor(part, dtype=torch.float64)[:, None, None] for part in (MEAN, STD))
    return ((torch.from_numpy(pixels).double() / 255 - mean) / std).float()


def with_statistics(model: Network, images: Tensor) -> Network:
    """In evaluation, its batch norms with statistics of the images and gains of both signs."""
    for module in model.modules():
        if isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d):
            nn.init.normal_(module.weight)
            nn.init.normal_(module.bias, std=0.3)
            with torch.no_grad():
                module.weight[0] = 0
            module.momentum = None
    model.train()(images)
    return model.eval().requires_grad_(False)


class Residual(nn.Module):
    """Shortcuts as they are, by a convolution, and of a tensor that is read three times."""

    def __init__(self, name: str, bits: int) -> None:
        super().__init__()
        spec = preset(name, bits=bits, act_alpha=2.0)
        self.stem = nn.Sequential(
            QuantConv2d(3, 8, 3, padding=1, bias=True, spec=EIGHT_BIT), nn.BatchNorm2d(8), nn.ReLU()
        )
        self.body = nn.Sequential(
            QuantConv2d(8, 8, 3, padding=1, spec=spec),
            nn.BatchNorm2d(8),
            QuantConv2d(8, 8, 3, padding=1, spec=spec, relu=True),
            nn.BatchNorm2d(8),
        )
        self.shortcut = nn.Sequential(QuantConv2d(8, 8, 1, spec=spec), nn.BatchNorm2d(8))
        self.norm = nn.BatchNorm2d(8)
        self.fc = QuantLinear(8, 5, spec=EIGHT_BIT)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        x = torch.relu(self.body(x) + x)
        y = self.body(x) + self.shortcut(x)
        x = torch.relu(self.norm(y)) + x
        return self.fc(x.mean((2, 3)))
