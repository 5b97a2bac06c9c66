"""Image files, decoded without trusting them."""

from __future__ import annotations

import warnings
from pathlib import Path

from PIL import Image

IMAGE_SUFFIXES = frozenset({".jpg", ".jpeg", ".png", ".webp"})

# Pillow warns of images of more than 89 million pixels and refuses those of twice as many; here both are refused. Set
# once, since decoding threads share the list of filters.
warnings.simplefilter("error", Image.DecompressionBombWarning)


def read_image(path: Path) -> Image.Image:
    """The image of a JPEG, PNG or WebP file, RGB.

    Raises:
        ValueError: no such file, no image, a damaged one, or more than ``Image.MAX_IMAGE_PIXELS`` (89 million) pixels.
    """
    try:
        if not path.is_file():
            raise OSError("no file")
        with Image.open(path, formats=("JPEG", "PNG", "WEBP")) as image:
            return image.convert("RGB")
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise ValueError(f"{path}: more than {Image.MAX_IMAGE_PIXELS:,} pixels; resize it, or remove it") from error
    except (OSError, ValueError, SyntaxError) as error:
        raise ValueError(f"{path}: not a readable image (JPEG, PNG or WebP)") from error
