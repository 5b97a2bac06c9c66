"""Image files, decoded without trusting them."""

from __future__ import annotations

import logging
import warnings
from pathlib import Path

import numpy as np
from PIL import Image

IMAGE_SUFFIXES = frozenset({".jpg", ".jpeg", ".png", ".webp"})

# Pillow warns of images of more than 89 million pixels and refuses those of twice as many; here both are refused. Set
# once, since decoding threads share the list of filters.
warnings.simplefilter("error", Image.DecompressionBombWarning)

log = logging.getLogger("apot_fat")


class UnreadableImageError(ValueError):
    """A file that holds no image, a damaged one, or too large a one."""


def read_image(path: Path, shorter_side: int | None = None) -> Image.Image:
    """The image of a JPEG, PNG or WebP file, as RGB of 8 bits.

    Of 16 bits the upper 8 are taken, in shades of grey as in colours; what is transparent keeps its colour.

    Args:
        path: the file.
        shorter_side: what the caller resizes its shorter side to, pixels.

    Raises:
        UnreadableImageError: no such file, no image, a damaged one, or more than ``Image.MAX_IMAGE_PIXELS`` (89
            million) pixels, as it is or resized.
    """
    try:
        if not path.is_file():
            raise OSError("no file")
        with Image.open(path, formats=("JPEG", "PNG", "WEBP")) as image:
            _check_resized(image, shorter_side)
            return _to_rgb(image)
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise UnreadableImageError(f"{path}: more than {Image.MAX_IMAGE_PIXELS:,} pixels") from error
    except Exception as error:  # damaged bytes make Pillow's readers stumble in many ways
        raise UnreadableImageError(f"{path}: not a readable image (JPEG, PNG or WebP)") from error


class UnreadableImages:
    """What becomes of unreadable images: the first ends the reading, or each is left out with a warning that counts.

    Args:
        on_damaged: ``error`` or ``skip``.
    """

    def __init__(self, on_damaged: str) -> None:
        self.on_damaged = on_damaged
        self.found: set[str] = set()

    def add(self, problem: str) -> None:
        """Take note of one.

        Args:
            problem: its file and what is wrong with it; the same again is not counted.

        Raises:
            ValueError: with ``error``; says how to leave it out.
        """
        if self.on_damaged == "error":
            raise ValueError(f"{problem}; mend it, or leave such images out with --on-damaged skip")
        if problem not in self.found:
            self.found.add(problem)
            log.warning("%s, left out (%d so far)", problem, len(self.found))


def _check_resized(image: Image.Image, shorter_side: int | None) -> None:
    if shorter_side is not None and Image.MAX_IMAGE_PIXELS is not None:
        shorter, longer = sorted(image.size)
        if shorter_side**2 * longer > Image.MAX_IMAGE_PIXELS * shorter:  # a thin one grows with its longer side
            raise Image.DecompressionBombError


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I"):  # 16 bits of grey, which Pillow clips to 8
        return Image.fromarray((np.asarray(image) >> 8).astype(np.uint8)).convert("RGB")
    if image.mode == "P" and "transparency" in image.info:
        image = image.convert("RGBA")  # the same colours; directly, Pillow warns of each
    return image.convert("RGB")
