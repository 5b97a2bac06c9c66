"""Mixup and cutout, on whole batches of normalised images on their device.

Shape suffixes: ``_BHWC`` images, ``_B`` one entry an image of the batch, ``_N`` one entry an image of the epoch.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor


class Draws(NamedTuple):
    """An epoch's random numbers, by position in its order.

    Args:
        centers_N2: row and column of the squares to cut out, in units of height and width, range [0, 1); or None.
        shares_N: λ of mixup, range [0, 1]; or None.
    """

    centers_N2: Tensor | None
    shares_N: Tensor | None

    def to(self, device: torch.device) -> Draws:
        """The same on a device, once an epoch: a copy a batch would wait for it each time."""
        return Draws(*(None if drawn is None else drawn.to(device) for drawn in self))


@dataclass(frozen=True)
class Mixing:
    """What is mixed into, or cut out of, training images.

    Args:
        mixup: α of mixup, ≥ 0; 0 for none.
        cutout: side of the square, pixels; 0 for none.
    """

    mixup: float = 0.0
    cutout: int = 0

    def draw(self, count: int, generator: torch.Generator) -> Draws:
        """The random numbers of an epoch of so many images; what is off draws none."""
        centers = torch.rand(count, 2, generator=generator) if self.cutout else None
        shares = None
        if self.mixup:
            seed = int(torch.randint(1 << 62, (), generator=generator))
            drawn = np.random.default_rng(seed).beta(self.mixup, self.mixup, count)
            shares = torch.from_numpy(drawn.astype(np.float32))
        return Draws(centers, shares)


def mixup(x_BHWC: Tensor, other_BHWC: Tensor, shares_B: Tensor) -> Tensor:
    """Convex combinations of images.

    Equation: λ x + (1 − λ) x', λ ~ Beta(α, α) an image; the loss takes both labels by the same shares.

    Args:
        x_BHWC, other_BHWC: images and those mixed into them.
        shares_B: λ, range [0, 1].

    Paper: Zhang et al., "mixup: Beyond Empirical Risk Minimization", ICLR 2018, equation 1; there one λ a batch.
    """
    return other_BHWC.lerp(x_BHWC, shares_B.view(-1, 1, 1, 1))


def cut_out(x_BHWC: Tensor, size: int, centers_B2: Tensor) -> Tensor:
    """Images with a square of zeros, the mean colour once normalised; outside the image the square is cut off.

    Args:
        x_BHWC: normalised images.
        size: side of the square, pixels.
        centers_B2: row and column of its centre, in units of height and width, range [0, 1).

    Paper: DeVries, Taylor, "Improved Regularization of Convolutional Neural Networks with Cutout", 2017.
    """
    _, height, width, _ = x_BHWC.shape
    inside = []
    for axis, extent in enumerate((height, width)):
        first_B1 = (centers_B2[:, axis, None] * extent).long() - size // 2
        places_1E = torch.arange(extent, device=x_BHWC.device)[None]
        inside.append((places_1E >= first_B1) & (places_1E < first_B1 + size))
    return x_BHWC.masked_fill((inside[0][:, :, None] & inside[1][:, None, :])[..., None], 0.0)
