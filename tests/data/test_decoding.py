"""Images of every kind become the RGB of 8 bits that they look like, in memory and streamed alike."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.datasets.folder import default_loader

from apot_fat.data import FileBatches, FileSet, ImageSet, load_dataset
from apot_fat.data.decoding import UnreadableImageError, read_image

SIDE, CROP = 32, 28  # of the images; of what a stream makes of them, which it does not resize


def both_ways(folder: Path) -> torch.Tensor:
    """The one image of a folder in memory, (H, W, 3), which is found to be the same streamed."""
    memory = load_dataset(str(folder), test_source=str(folder), need_train=False).test
    files = load_dataset(str(folder), test_source=str(folder), need_train=False, stream=True).test
    assert isinstance(memory, ImageSet)
    assert isinstance(files, FileSet)
    grey, unit = (0.0, 0.0, 0.0), (1.0, 1.0, 1.0)
    batches = FileBatches(files, 1, torch.device("cpu"), grey, unit, image_size=CROP, workers=0)
    streamed = next(iter(batches)).x[0].permute(1, 2, 0)
    edge = (SIDE - CROP) // 2
    pixels = memory.images_NHWC[0]
    torch.testing.assert_close(streamed * 255, pixels[edge:-edge, edge:-edge].float())
    return pixels


def noise(*shape: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA", "CMYK"])
def test_every_mode_is_read_as_torchvision_reads_it(mode: str, tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    path = tmp_path / "a" / ("0.jpg" if mode == "CMYK" else "0.png")
    image = Image.fromarray(noise(SIDE, SIDE, 4), "RGBA")
    image = image.convert("RGB").quantize(16) if mode == "P" else image.convert(mode)
    image.save(path)
    with Image.open(path) as written:
        assert written.mode == mode
    assert np.array_equal(both_ways(tmp_path).numpy(), np.array(default_loader(str(path))))


def test_a_palette_with_transparency_keeps_its_colours(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    image = Image.fromarray(noise(SIDE, SIDE, 3)).quantize(16)
    image.save(tmp_path / "a/0.png", transparency=bytes(range(0, 256, 17)))
    assert np.array_equal(both_ways(tmp_path).numpy(), np.array(image.convert("RGB")))


def test_shades_of_16_bits_are_scaled_to_8_not_clipped(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    shades = noise(SIDE, SIDE).astype(np.uint16)
    for low in (0, 128, 255):  # the upper byte counts, as Pillow takes it of colours
        Image.fromarray(shades << 8 | low).save(tmp_path / "a/0.png")
        with Image.open(tmp_path / "a/0.png") as written:
            assert written.mode == "I;16"
        assert np.array_equal(both_ways(tmp_path).numpy(), np.repeat(shades[..., None], 3, 2))
    whole = np.arange(SIDE * SIDE, dtype=np.uint16).reshape(SIDE, SIDE) * (65_535 // SIDE**2)
    Image.fromarray(whole).save(tmp_path / "a/0.png")
    assert (both_ways(tmp_path) == 255).float().mean() < 0.01  # clipped, it was 99.6 %


def test_an_image_that_grows_beyond_memory_when_resized_is_refused(tmp_path: Path) -> None:
    thin = tmp_path / "thin.png"
    Image.new("1", (1_000_000, 1)).save(thin)
    assert read_image(thin).size == (1_000_000, 1)
    assert read_image(thin, 9).size == (1_000_000, 1)
    with pytest.raises(UnreadableImageError, match=r"thin.png: more than 89,478,485 pixels"):
        read_image(thin, 224)
