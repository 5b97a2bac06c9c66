from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torchvision.transforms.v2 import functional as vision

from apot_fat.data import Augmentation, Dataset, ImageBatches, ImageSet, Sharding
from apot_fat.data.images import crop_and_flip

CPU = torch.device("cpu")


def image_set(count: int = 10, size: int = 6) -> ImageSet:
    return ImageSet(torch.randint(0, 256, (count, size, size, 3), dtype=torch.uint8), torch.arange(count) % 3)


def same(a: Any, b: Any) -> bool:
    return torch.equal(a, b) if isinstance(a, torch.Tensor) else bool(a == b)


def test_evaluation_batches_are_in_order_and_normalised() -> None:
    images = image_set()
    batches = ImageBatches(images, 4, CPU, (0.5, 0.4, 0.3), (0.2, 0.3, 0.4))
    assert batches.steps == 3
    x = torch.cat([batch.x for batch in batches])
    expected = vision.normalize(images.images_NHWC.permute(0, 3, 1, 2).float() / 255, [0.5, 0.4, 0.3], [0.2, 0.3, 0.4])
    torch.testing.assert_close(x, expected)
    assert torch.cat([batch.labels for batch in batches]).tolist() == images.labels_N.tolist()
    assert next(iter(batches)).x.is_contiguous(memory_format=torch.channels_last)


def test_crop_and_flip_equals_padding_cropping_and_mirroring_each_image() -> None:
    images = image_set(20).images_NHWC
    offsets = torch.randint(0, 5, (20, 2))
    flips = torch.rand(20) < 0.5
    ours = crop_and_flip(images, 2, offsets, flips)
    for image, (top, left), flip, cropped in zip(images, offsets.tolist(), flips, ours, strict=True):
        expected = vision.crop(vision.pad(image.permute(2, 0, 1), [2]), top, left, 6, 6)
        expected = vision.horizontal_flip(expected) if flip else expected
        assert torch.equal(cropped.permute(2, 0, 1), expected)


def test_augmentation_is_uniform_over_offsets_and_mirrors_half() -> None:
    # one bright pixel in the middle: where it lands tells offset and mirror image apart
    images = torch.zeros(6000, 7, 7, 3, dtype=torch.uint8)
    images[:, 3, 3] = 255
    images[:, 3, 4] = 128
    batches = ImageBatches(
        ImageSet(images, torch.zeros(6000, dtype=torch.int64)),
        6000,
        CPU,
        (0,) * 3,
        (1,) * 3,
        augmentation=Augmentation(padding=1),
        training=True,
    )
    x = next(iter(batches)).x[:, 0]
    position = (x == 1).flatten(1).float().argmax(1)
    counts = torch.bincount(position, minlength=49).reshape(7, 7)[2:5, 2:5]
    assert counts.sum() == 6000
    assert ((counts - 6000 / 9).abs() < 5 * (6000 * 8 / 81) ** 0.5).all()
    mirrored = (x.flatten(1).gather(1, (position - 1)[:, None]) > 0.1).float().mean()
    assert abs(mirrored - 0.5) < 5 * 0.5 / 6000**0.5


def test_an_epoch_depends_on_seed_and_epoch_alone() -> None:
    images = image_set(50)

    def epoch(seed: int, number: int) -> torch.Tensor:
        batches = ImageBatches(
            images, 8, CPU, (0,) * 3, (1,) * 3, augmentation=Augmentation(2), training=True, seed=seed
        )
        batches.set_epoch(number)
        return torch.cat([batch.x for batch in batches])

    first = epoch(1, 5)
    torch.rand(3)
    assert torch.equal(first, epoch(1, 5))
    assert not torch.equal(first, epoch(1, 6))
    assert not torch.equal(first, epoch(2, 5))


def test_an_epoch_goes_on_at_a_batch_with_the_same_bits() -> None:
    options: dict[str, Any] = {"augmentation": Augmentation(2), "training": True}
    batches = ImageBatches(image_set(11), 4, CPU, (0,) * 3, (1,) * 3, sharding=Sharding(1, 2), **options)
    whole, rest = list(batches), list(batches.since(1))
    assert len(rest) == len(whole) - 1 == 2
    for one, other in zip(rest, whole[1:], strict=True):
        assert all(map(same, one, other))


def test_batches_made_together_are_those_made_one_by_one(monkeypatch: pytest.MonkeyPatch) -> None:
    images = image_set(23)
    options: dict[str, Any] = {"augmentation": Augmentation(1), "training": True, "channels_last": True}
    for sharding in (Sharding(), Sharding(1, 2, 2)):
        batches = ImageBatches(images, 8, CPU, (0.5,) * 3, (0.2,) * 3, sharding=sharding, **options)
        together = list(batches)
        pixels = images.images_NHWC[0].numel()
        for at_once in (1, 5 * pixels):
            monkeypatch.setattr("apot_fat.data.images.AT_ONCE", at_once)
            for start in (0, 1):
                found = list(batches.since(start))
                assert len(found) == len(together) - start
                for one, other in zip(found, together[start:], strict=True):
                    assert all(map(same, one, other))
                    assert one.x.is_contiguous(memory_format=torch.channels_last)
        monkeypatch.undo()


def test_val_split_parts_are_disjoint_and_complete() -> None:
    train = ImageSet(torch.zeros(30, 4, 4, 3, dtype=torch.uint8), torch.arange(30))
    dataset = Dataset("x", ("a",), train, image_set()).with_val_split(0.2, seed=3)
    assert dataset.train is not None
    assert dataset.val is not None
    assert len(dataset.val) == 6
    assert sorted([*dataset.train.labels_N.tolist(), *dataset.val.labels_N.tolist()]) == list(range(30))
    with pytest.raises(ValueError, match="leaves one part empty"):
        Dataset("x", ("a",), train, train).with_val_split(0.001, seed=0)


def test_wrong_images_are_refused() -> None:
    with pytest.raises(ValueError, match="expected uint8"):
        ImageSet(torch.zeros(2, 4, 4, 3), torch.zeros(2, dtype=torch.int64))
    with pytest.raises(ValueError, match="expected int64"):
        ImageSet(torch.zeros(2, 4, 4, 3, dtype=torch.uint8), torch.zeros(3, dtype=torch.int64))
    with pytest.raises(ValueError, match="no images"):
        ImageSet(torch.zeros(0, 4, 4, 3, dtype=torch.uint8), torch.zeros(0, dtype=torch.int64))


def test_the_fewest_images_of_a_part() -> None:
    for world, accumulate, times, count in itertools.product((1, 2, 3), (1, 2), (1, 2, 5), range(1, 40)):
        shards = [Sharding(rank, world, accumulate) for rank in range(world)]
        batch_size = shards[0].parts * times
        parts = [part for shard in shards for part, _, _ in shard.training_slices(count, batch_size)]
        if parts:
            assert shards[0].fewest(count, batch_size) == min(part.stop - part.start for part in parts)
