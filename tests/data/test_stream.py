from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torchvision.transforms.v2 import functional as vision

from apot_fat.data import FileBatches, FileSet, Sharding, load_dataset
from apot_fat.data.decoding import read_image
from apot_fat.data.stream import CROPS
from apot_fat.training import TrainConfig
from apot_fat.training.build import make_batches, sample_images

CPU = torch.device("cpu")
GREY, UNIT = (0.0, 0.0, 0.0), (1.0, 1.0, 1.0)


@pytest.fixture
def files(tmp_path: Path) -> FileSet:
    for i in range(9):
        folder = tmp_path / f"class{i % 3}"
        folder.mkdir(exist_ok=True)
        pixels = torch.randint(0, 256, (40 + i, 50, 3), dtype=torch.uint8)
        Image.fromarray(pixels.numpy()).save(folder / f"{i}.png")
    dataset = load_dataset(str(tmp_path), test_source=str(tmp_path), stream=True)
    assert isinstance(dataset.train, FileSet)
    return dataset.train


def same(a: Any, b: Any) -> bool:
    return torch.equal(a, b) if isinstance(a, torch.Tensor) else bool(a == b)


def epoch(files: FileSet, number: int = 0, **options: object) -> tuple[torch.Tensor, torch.Tensor]:
    settings = {"workers": 0, "image_size": 24, **options}
    batches = FileBatches(files, 4, CPU, GREY, UNIT, **settings)  # type: ignore[arg-type]
    batches.set_epoch(number)
    parts = list(batches)
    assert len(parts) == batches.num_batches
    return torch.cat([part.x for part in parts]), torch.cat([part.labels for part in parts])


def test_evaluation_resizes_and_crops_the_centre(files: FileSet) -> None:
    x, labels = epoch(files)
    assert x.shape == (9, 3, 24, 24)
    assert labels.tolist() == [0, 0, 0, 1, 1, 1, 2, 2, 2]
    with Image.open(files.path(4)) as image:
        expected = vision.center_crop(vision.resize(image, [27]), [24])
    torch.testing.assert_close(x[4], vision.pil_to_tensor(expected) / 255)


@pytest.mark.parametrize("crop", [pytest.param("resize-crop", marks=pytest.mark.slow), "random-resized-crop"])
def test_an_epoch_depends_on_seed_and_epoch_alone(files: FileSet, crop: str) -> None:
    options = {"training": True, "crop": crop}
    first, labels = epoch(files, 3, **options)
    before = torch.get_rng_state()
    again, _ = epoch(files, 3, workers=2, **options)
    assert torch.equal(first, again)  # whichever worker decodes an image
    assert torch.equal(before, torch.get_rng_state())
    assert sorted(labels.tolist()) == [0, 0, 0, 1, 1, 1, 2, 2, 2]
    assert not torch.equal(first, epoch(files, 4, **options)[0])
    assert not torch.equal(first, epoch(files, 3, seed=1, **options)[0])


@pytest.mark.parametrize("crop", CROPS)
def test_images_are_mirrored_only_if_asked(files: FileSet, crop: str) -> None:
    plain, flipped = (
        torch.cat([batch.x for batch in make_batches(config, files, CPU, training=True)])
        for config in (
            TrainConfig(flip=flip, augment=crop, image_size=24, workers=0, mean=GREY, std=UNIT, batch_size=4)
            for flip in (False, True)
        )
    )
    same = (flipped == plain).flatten(1).all(1)
    assert 0 < same.sum() < 9
    assert torch.equal(torch.where(same[:, None, None, None], plain, plain.flip(3)), flipped)


@pytest.mark.parametrize("workers", [0, 2])
def test_an_epoch_goes_on_at_a_batch_with_the_same_bits(files: FileSet, workers: int) -> None:
    options: dict[str, Any] = {"image_size": 24, "training": True}
    batches = FileBatches(files, 2, CPU, GREY, UNIT, workers=workers, **options)
    for number in (3, 4):
        batches.set_epoch(number)
        whole = list(batches)
        for start in (0, 2, 5):
            rest = list(batches.since(start))
            assert len(rest) == len(whole) - start
            for one, other in zip(rest, whole[start:], strict=True):
                assert all(map(same, one, other))


def test_nothing_before_the_position_is_decoded(files: FileSet, monkeypatch: pytest.MonkeyPatch) -> None:
    decoded: list[Path] = []

    def counting(path: Path, shorter_side: int) -> Image.Image:
        decoded.append(path)
        return read_image(path, shorter_side)

    monkeypatch.setattr("apot_fat.data.stream.read_image", counting)
    batches = FileBatches(files, 2, CPU, GREY, UNIT, image_size=24, training=True, workers=0)
    list(batches)
    order = decoded.copy()
    assert len(set(order)) == 9
    decoded.clear()
    list(batches.since(3))
    assert decoded == order[6:]


def test_processes_share_the_images(files: FileSet) -> None:
    parts = [epoch(files, 1, training=True, sharding=Sharding(rank, 2)) for rank in range(2)]
    assert len(parts[0][1]) + len(parts[1][1]) == 8  # of 9: the last batch has fewer images than processes
    whole = [epoch(files, sharding=Sharding(rank, 2))[1] for rank in range(2)]
    assert sorted(torch.cat(whole).tolist()) == [0, 0, 0, 1, 1, 1, 2, 2, 2]


def test_a_damaged_image_is_named_or_left_out(files: FileSet, caplog: pytest.LogCaptureFixture) -> None:
    broken = files.path(4)
    broken.write_bytes(broken.read_bytes()[:100])
    with pytest.raises(ValueError, match=rf"{broken.name}: not a readable image .*; mend it, or .*--on-damaged skip"):
        epoch(files)
    with caplog.at_level(logging.WARNING, logger="apot_fat"):
        x, labels = epoch(files, on_damaged="skip")
    assert len(x) == len(labels) == 8
    assert f"{broken}: not a readable image (JPEG, PNG or WebP), left out (1 so far)" in caplog.text


def test_a_batch_of_unreadable_images_is_left_out_of_a_test_and_ends_training(
    files: FileSet, caplog: pytest.LogCaptureFixture
) -> None:
    whole, _ = epoch(files)
    options: dict[str, Any] = {"workers": 0, "image_size": 24, "on_damaged": "skip"}
    for unreadable, kept in (([8], slice(0, 8)), ([0, 1, 2, 3], slice(4, 8))):
        for index in unreadable:
            files.path(index).write_bytes(b"")
        batches = FileBatches(files, 4, CPU, GREY, UNIT, **options)
        with caplog.at_level(logging.WARNING, logger="apot_fat"):
            assert torch.equal(torch.cat([batch.x for batch in batches]), whole[kept])
    assert "left out (5 so far)" in caplog.text
    seen = list(FileBatches(files, 4, CPU, GREY, UNIT, sharding=Sharding(1, 3), **options))
    assert len(seen) == 1  # of three processes; the others have nothing left
    assert not list(FileBatches(files, 4, CPU, GREY, UNIT, sharding=Sharding(2, 3), **options))
    config = TrainConfig(on_damaged="skip", image_size=24, workers=0, mean=GREY, std=UNIT)
    assert torch.equal(sample_images(config, files, CPU), whole[4:8])
    training = FileBatches(files, 1, CPU, GREY, UNIT, training=True, **options)
    with pytest.raises(
        ValueError, match=r"^[^\n]*not a readable image .*all 1 images .* mend or remove .*--batch-size"
    ):
        list(training)
    for index in range(9):
        files.path(index).write_bytes(b"")
    for looked_at in (lambda: sample_images(config, files, CPU), lambda: epoch(files, **options)):
        with pytest.raises(ValueError, match=r"^[^\n]*not a readable image .* none of 9 images can be read[^\n]*$"):
            looked_at()
