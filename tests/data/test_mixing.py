from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from apot_fat.data import Augmentation, FileBatches, FileSet, ImageBatches, ImageSet, Mixing, Sharding
from apot_fat.data.mixing import cut_out, mixup

CPU = torch.device("cpu")
PLAIN = (0.0, 0.0, 0.0), (1.0, 1.0, 1.0)


def numbered(count: int, **options: Any) -> ImageBatches:
    """Images whose every pixel is their label."""
    labels = torch.arange(count)
    pixels = labels.to(torch.uint8)[:, None, None, None].expand(count, 8, 8, 3)
    options = {"training": True, "seed": 3, **options}
    return ImageBatches(ImageSet(pixels, labels), options.pop("batch_size", 4), CPU, *PLAIN, **options)


def test_every_image_is_mixed_with_the_next_of_its_step() -> None:
    plain = [batch.labels for batch in numbered(10)]
    for batch, labels in zip(numbered(10, mixing=Mixing(mixup=0.4)), plain, strict=True):
        assert batch.other_labels is not None
        assert batch.own_share is not None
        assert torch.equal(batch.labels, labels)
        assert torch.equal(batch.other_labels, labels.roll(-1))
        expected = batch.own_share * batch.labels + (1 - batch.own_share) * batch.other_labels
        torch.testing.assert_close(batch.x[:, 0, 0, 0] * 255, expected)
    assert all(batch.other_labels is None for batch in numbered(10, mixing=Mixing(mixup=0.4)).unmixed())


@pytest.mark.parametrize("options", [{"mixup": 0.4}, {"cutout": 3}, {"mixup": 0.4, "cutout": 3}])
def test_processes_and_accumulation_make_the_same_images(options: dict[str, Any]) -> None:
    def made(sharding: Sharding) -> torch.Tensor:
        mixing, augmentation = Mixing(**options), Augmentation(2)
        return torch.cat([b.x for b in numbered(12, mixing=mixing, sharding=sharding, augmentation=augmentation)])

    whole = made(Sharding())
    assert torch.equal(made(Sharding(accumulate=2)), whole)
    parts = [made(Sharding(rank, 2)).split(2) for rank in (0, 1)]
    assert torch.equal(torch.cat([part for pair in zip(*parts, strict=True) for part in pair]), whole)


def test_the_shares_of_mixup_have_its_beta_distribution() -> None:
    shares = Mixing(mixup=0.5).draw(20_000, torch.Generator().manual_seed(0)).shares_N
    assert shares is not None
    assert shares.mean().item() == pytest.approx(0.5, abs=0.01)
    assert shares.var().item() == pytest.approx(1 / (4 * (2 * 0.5 + 1)), abs=0.005)
    again = Mixing(mixup=0.5).draw(20_000, torch.Generator().manual_seed(1)).shares_N
    assert not torch.equal(shares, again)  # type: ignore[arg-type]
    one, two = torch.rand(3, 2, 2, 3), torch.rand(3, 2, 2, 3)
    torch.testing.assert_close(mixup(one, two, torch.tensor([1.0, 0.0, 0.3]))[2], 0.3 * one[2] + 0.7 * two[2])


def test_cutout_zeroes_a_square_cut_off_at_the_border() -> None:
    x = torch.ones(3, 6, 8, 3)
    y = cut_out(x, 4, torch.tensor([[0.5, 0.5], [0.0, 0.0], [0.99, 0.99]]))
    expected = x.clone()
    expected[0, 1:5, 2:6] = 0
    expected[1, :2, :2] = 0
    expected[2, 3:, 5:] = 0
    assert torch.equal(y, expected)
    assert x.min() == 1
    with pytest.raises(ValueError, match="cutout 9: larger than the images"):
        numbered(4, mixing=Mixing(cutout=9))


def test_streamed_images_are_mixed_and_cut_alike(tmp_path: Path) -> None:
    paths = []
    for label in range(5):
        paths.append(str(tmp_path / f"{label}.png").encode())
        Image.fromarray(np.full((16, 16, 3), 40 * (label + 1), np.uint8)).save(paths[-1].decode())
    files = FileSet(np.array(paths), torch.arange(5))
    mixing = Mixing(mixup=1.0, cutout=2)
    options: dict[str, Any] = {"image_size": 16, "training": True, "workers": 0, "mixing": mixing}
    batches = FileBatches(files, 3, CPU, *PLAIN, **options)
    for batch in batches:
        assert batch.other_labels is not None
        assert batch.own_share is not None
        assert torch.equal(batch.other_labels, batch.labels.roll(-1))
        expected = batch.own_share * (batch.labels + 1) + (1 - batch.own_share) * (batch.other_labels + 1)
        torch.testing.assert_close(batch.x.amax((1, 2, 3)) * 255 / 40, expected)
    first, second = next(iter(batches)), next(iter(batches))
    assert torch.equal(first.x, second.x)
    batches.set_epoch(1)
    assert not torch.equal(first.own_share, next(iter(batches)).own_share)  # type: ignore[arg-type]
