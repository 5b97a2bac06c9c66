"""The 8-bit pixels of normalised images."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from torch import Tensor

Array = np.ndarray


def to_pixels(images: Tensor, mean: Sequence[float], std: Sequence[float]) -> Array:
    """The pixels of normalised images, uint8, as ``IntegerProgram.run`` takes them; arguments of ``integer_program``.

    Raises:
        ValueError: images that mean and std do not turn into pixels.
    """
    values = np.asarray(images.detach().cpu(), np.float64)
    means, stds = np.asarray(mean, np.float64), np.asarray(std, np.float64)
    given = f"mean {means.tolist()} and std {stds.tolist()}"
    if means.shape != (values.shape[1],) or stds.shape != means.shape or not ((stds > 0) & (stds < np.inf)).all():
        raise ValueError(
            f"{given}: give a number, std above 0, for each of the calibration's {values.shape[1]} channels"
        )
    pixels = (values * stds[:, None, None] + means[:, None, None]) * 255
    rounded = np.clip(np.round(pixels), 0, 255)
    if not np.abs(pixels - rounded).max() < 0.5:  # NaN too
        raise ValueError(
            f"calibration images are pixels from {pixels.min():.0f} to {pixels.max():.0f} by {given}, not 0 to 255: "
            "give those that the images were normalised with"
        )
    return rounded.astype(np.uint8)
