"""Image sets kept in memory, and batches of them made on the training device.

Shape suffixes: ``_NHWC`` images, ``_N`` one entry an image, ``_B`` one entry an image of the batch.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from apot_fat.data.sharding import Batch, EpochPlan, Planned, PlannedBatches, Sharding, epoch_generator

AT_ONCE = 1 << 24
"""Pixel values that are cropped, mirrored and normalised in one go: a GPU is told once for many batches."""
FILE_SIZE = 224
"""Height and width that image files on disk are brought to unless told, pixels."""


@dataclass(frozen=True)
class ImageSet:
    """Images and labels.

    Args:
        images_NHWC: uint8, three channels.
        labels_N: int64, range [0, number of classes).

    Raises:
        ValueError: shapes or types other than these.
    """

    images_NHWC: Tensor
    labels_N: Tensor

    def __post_init__(self) -> None:
        images, labels = self.images_NHWC, self.labels_N
        if images.dtype != torch.uint8 or images.dim() != 4 or images.shape[3] != 3:
            raise ValueError(f"images {images.dtype} {tuple(images.shape)}: expected uint8 (N, H, W, 3)")
        if labels.dtype != torch.int64 or labels.shape != images.shape[:1]:
            raise ValueError(f"labels {labels.dtype} {tuple(labels.shape)}: expected int64 ({images.shape[0]},)")
        if not len(labels):
            raise ValueError("a set of no images: at least one is needed")
        if not images.numel():
            raise ValueError(f"images of {images.shape[1]} × {images.shape[2]} pixels: expected at least one")

    def __len__(self) -> int:
        return len(self.labels_N)

    @property
    def size(self) -> tuple[int, int]:
        """Height and width."""
        return self.images_NHWC.shape[1], self.images_NHWC.shape[2]

    def update(self, digest: Any) -> None:
        """Take the images and labels into a checksum."""
        digest.update(f"{tuple(self.images_NHWC.shape)}".encode())
        digest.update(self.images_NHWC.contiguous().numpy())
        digest.update(self.labels_N.contiguous().numpy())

    def subset(self, indices: Tensor) -> ImageSet:
        """The images at the given indices."""
        return ImageSet(self.images_NHWC[indices], self.labels_N[indices])


@dataclass(frozen=True)
class FileSet:
    """Image files and labels, decoded as they are needed.

    Args:
        paths_N: encoded paths, a NumPy array of bytes: every worker process gets a copy, and ImageNet has 1.3 million.
        labels_N: int64, range [0, number of classes).
    """

    paths_N: np.ndarray
    labels_N: Tensor

    def __len__(self) -> int:
        return len(self.paths_N)

    def path(self, index: int) -> Path:
        """The file of an image."""
        return Path(os.fsdecode(bytes(self.paths_N[index])))

    def update(self, digest: Any) -> None:
        """Take the files' names within their class folders, and the labels, into a checksum; no file is read."""
        for path in self.paths_N.tolist():
            digest.update(os.path.basename(path) + b"\n")
        digest.update(self.labels_N.contiguous().numpy())

    def subset(self, indices: Tensor) -> FileSet:
        """The files at the given indices."""
        return FileSet(self.paths_N[indices.numpy()], self.labels_N[indices])


@dataclass(frozen=True)
class Dataset:
    """Training and test images of one task.

    Args:
        name: what logs call it, e.g. ``digits`` or a path.
        classes: class names; a label is an index into them.
        train: None where only a test set was named.
        test: the images results are reported on.
        val: training images held out to choose the epoch on, or None.

    Each set is in memory (``ImageSet``) or on disk (``FileSet``).
    """

    name: str
    classes: tuple[str, ...]
    train: ImageSet | FileSet | None
    test: ImageSet | FileSet
    val: ImageSet | FileSet | None = None

    @cached_property
    def checksum(self) -> str:
        """SHA-256 of classes, images and labels, wherever they lie; of images on disk their names stand for them."""
        digest = hashlib.sha256("\n".join(self.classes).encode())
        for part in (self.train, self.test, self.val):
            digest.update(b"\n")
            if part is not None:
                part.update(digest)
        return digest.hexdigest()

    def with_val_split(self, fraction: float, seed: int) -> Dataset:
        """Hold out a random fraction of the training images.

        Raises:
            ValueError: a fraction outside [0, 1), or one that leaves either part empty.
        """
        if not 0 <= fraction < 1:
            raise ValueError(f"val_split {fraction}: choose a fraction from 0 up to, not including, 1")
        if fraction == 0 or self.train is None:
            return self
        held_out = round(len(self.train) * fraction)
        if not 0 < held_out < len(self.train):
            raise ValueError(f"val_split {fraction} of {len(self.train)} training images leaves one part empty")
        order = torch.randperm(len(self.train), generator=torch.Generator().manual_seed(seed))
        train, val = self.train.subset(order[held_out:]), self.train.subset(order[:held_out])
        return replace(self, train=train, val=val)


@dataclass(frozen=True)
class Augmentation:
    """The published CIFAR augmentation: zero padding, a random crop of the original size, a random mirror image.

    Args:
        padding: pixels on each side, ≥ 0.
        flip: mirror half of the images.
    """

    padding: int = 4
    flip: bool = True


class ImageBatches(PlannedBatches):
    """Batches of an image set, cropped, mirrored and normalised on its device, with no worker processes.

    Equation: (pixel / 255 − mean) / std, per channel.

    Args:
        images: the set; moved to ``device`` whole.
        batch_size: images an optimiser step over all processes; for evaluation images a batch.
        device: where batches are made.
        mean, std: per channel, in units of 255.
        augmentation: None for evaluation.
        training: a new order every epoch, divided by ``sharding``; else in order, each image once over all processes.
        seed: with the epoch's number it determines order and augmentation, whatever happened before.
        channels_last: memory format of the batches.
        sharding: this process's part.
    """

    def __init__(
        self,
        images: ImageSet,
        batch_size: int,
        device: torch.device,
        mean: tuple[float, ...],
        std: tuple[float, ...],
        *,
        augmentation: Augmentation | None = None,
        training: bool = False,
        seed: int = 0,
        channels_last: bool = True,
        sharding: Sharding = Sharding(),  # noqa: B008 (frozen)
    ) -> None:
        self.images_NHWC = images.images_NHWC.to(device)
        self.labels_N = images.labels_N.to(device)
        self.plan = EpochPlan(len(images), batch_size, training, sharding)
        self.mean = torch.tensor(mean, device=device)
        self.std = torch.tensor(std, device=device)
        self.augmentation = augmentation
        self.seed = seed
        self.channels_last = channels_last
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch whose order and augmentation the next iteration has."""
        self.epoch = epoch

    def since(self, start: int) -> Iterator[Batch]:
        """The epoch's batches from one on, the same as in the whole epoch; those before are not made."""
        count, device = self.num_images, self.labels_N.device
        generator = epoch_generator(self.seed, self.epoch)
        order_N = self.plan.order(generator)
        offsets_N2 = flips_N = None
        if self.augmentation is not None:
            offsets_N2 = torch.randint(0, 2 * self.augmentation.padding + 1, (count, 2), generator=generator).to(device)
            flips_N = torch.rand(count, generator=generator).to(device) < (0.5 if self.augmentation.flip else 0.0)
        order_N = order_N.to(device)
        for parts in _together(self.plan.slices(start), AT_ONCE // self.images_NHWC[0].numel()):
            indices = torch.cat([order_N[part] for part, _, _ in parts])
            images_BHWC, labels = self.images_NHWC[indices], self.labels_N[indices]
            if self.augmentation is not None and offsets_N2 is not None and flips_N is not None:
                offsets, flips = (torch.cat([values[part] for part, _, _ in parts]) for values in (offsets_N2, flips_N))
                images_BHWC = crop_and_flip(images_BHWC, self.augmentation.padding, offsets, flips)
            x = normalize(images_BHWC, self.mean, self.std).permute(0, 3, 1, 2)
            x = x if self.channels_last else x.contiguous()
            sizes = [part.stop - part.start for part, _, _ in parts]
            for own, own_labels, (_, share, ends_step) in zip(x.split(sizes), labels.split(sizes), parts, strict=True):
                yield Batch(own, own_labels, share, ends_step)


def _together(slices: Iterator[Planned], images: int) -> Iterator[list[Planned]]:
    # as many neighbours at a time as have so many images, at least one
    for first in slices:
        parts, left = [first], images - (first[0].stop - first[0].start)
        while left > 0 and (another := next(slices, None)) is not None:
            parts.append(another)
            left -= another[0].stop - another[0].start
        yield parts


def normalize(images_BHWC: Tensor, mean_C: Tensor, std_C: Tensor) -> Tensor:
    """(pixel / 255 − mean) / std of uint8 images, channels last, as float32."""
    return images_BHWC.to(torch.float32).div_(255).sub_(mean_C).div_(std_C)


def crop_and_flip(images_BHWC: Tensor, padding: int, offsets_B2: Tensor, flips_B: Tensor) -> Tensor:
    """Zero-pad, crop at an offset of its own per image, mirror where asked; one gather.

    Args:
        images_BHWC: any type.
        padding: pixels on each side.
        offsets_B2: row and column of each crop, range [0, 2 · padding].
        flips_B: bool.

    Returns:
        Images of the same shape.
    """
    batch, height, width, _ = images_BHWC.shape
    device = images_BHWC.device
    padded = F.pad(images_BHWC, (0, 0, padding, padding, padding, padding)) if padding else images_BHWC
    columns_W = torch.arange(width, device=device)
    columns_BW = torch.where(flips_B[:, None], width - 1 - columns_W, columns_W) + offsets_B2[:, 1, None]
    rows_BH = torch.arange(height, device=device) + offsets_B2[:, 0, None]
    batch_B = torch.arange(batch, device=device)
    return padded[batch_B[:, None, None], rows_BH[:, :, None], columns_BW[:, None, :]]
