"""What a config names: images and their batches, the network, the loss."""

from __future__ import annotations

import os
import random
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from apot_fat.data import (
    FILE_SIZE,
    NAMED,
    Augmentation,
    Batches,
    Dataset,
    FileBatches,
    FileSet,
    ImageBatches,
    ImageSet,
    Sharding,
    load_dataset,
)
from apot_fat.quant.measure import MOST_IMAGES
from apot_fat.training.config import TrainConfig
from apot_fat.training.distributed import in_turns, launched
from apot_fat.training.objective import Objective
from apot_fat.training.teacher import load_teacher

_IMAGES_FIELDS = ("data", "test_data", "data_root", "image_size", "streams", "on_damaged")
MORE_VIEWS = 3
"""How often ``unlabelled_images`` come as in training, after once as in evaluation."""


def load_config_dataset(config: TrainConfig, *, need_train: bool = True) -> Dataset:
    """The data set a config names; what may be downloaded, by one process while the others wait."""

    def load() -> Dataset:
        return load_dataset(
            config.data,
            test_source=config.test_data,
            root=config.data_root,
            image_size=config.image_size,
            val_split=config.val_split,
            seed=config.seed,
            need_train=need_train,
            stream=config.streams,
            on_damaged=config.on_damaged,
        )

    return in_turns(launched(), load) if config.data in NAMED else load()


def images_key(config: TrainConfig) -> tuple[object, ...]:
    """What the images of a config's data set depend on, before some are held out: equal for equal images."""
    return tuple(getattr(config, name) for name in _IMAGES_FIELDS)


def keep_last_dataset() -> Callable[[TrainConfig], Dataset]:
    """``load_config_dataset`` that keeps what it loaded last, since many runs in a row have the same images."""
    last: list[tuple[object, Dataset]] = []

    def load(config: TrainConfig) -> Dataset:
        # the seed chooses the held-out images
        key = *images_key(config), config.val_split, config.val_split and config.seed
        if not last or last[0][0] != key:
            last.clear()
            last.append((key, load_config_dataset(config)))
        return last[0][1]

    return load


def check_classes(dataset: Dataset, outputs: int | None, where: str) -> None:
    """Make sure that a network knows the labels of the test images.

    Args:
        dataset: the images. Labels of an ``.npz`` are numbers, and there may be fewer than outputs; where classes have
            names, each output must be one of them.
        outputs: the network's; None where they are not known.
        where: what holds the network, as errors call it.

    Raises:
        ValueError: a label without an output, or more or fewer names than outputs.
    """
    if outputs is None:
        return
    names = dataset.classes
    if int(dataset.test.labels_N.max()) >= outputs:
        raise ValueError(f"{where}: has {outputs} outputs, {dataset.name} has {len(names)} classes")
    if len(names) != outputs and names != tuple(str(label) for label in range(len(names))):
        raise ValueError(
            f"{where}: has {outputs} outputs, {dataset.name} names {len(names)} classes, and which output is which "
            "cannot be known; give --data the folder that holds the train/ and test/ of its training"
        )


def image_shape(config: TrainConfig, images: ImageSet | FileSet) -> tuple[int, int, int]:
    """(C, H, W) of an image as the network takes it."""
    if isinstance(images, ImageSet):
        return 3, *images.size
    size = config.image_size or FILE_SIZE
    return 3, size, size


def make_batches(
    config: TrainConfig,
    images: ImageSet | FileSet,
    device: torch.device,
    sharding: Sharding = Sharding(),  # noqa: B008 (frozen)
    *,
    training: bool = False,
) -> Batches:
    """Batches of images: shuffled and augmented for training, in order for evaluation."""
    mean, std = config.normalization()
    batch_size = config.batch_size if training else config.test_batch_size
    options: dict[str, Any] = {
        "training": training,
        "seed": config.seed,
        "channels_last": config.channels_last,
        "sharding": sharding,
    }
    if isinstance(images, ImageSet):
        augmentation = Augmentation(config.crop_padding, config.flip) if training else None
        return ImageBatches(images, batch_size, device, mean, std, augmentation=augmentation, **options)
    workers = default_workers() if config.workers is None else config.workers
    options |= {"crop": config.crop, "flip": config.flip, "workers": workers, "on_damaged": config.on_damaged}
    return FileBatches(images, batch_size, device, mean, std, image_size=image_shape(config, images)[1], **options)


def sample_images(config: TrainConfig, images: ImageSet | FileSet, device: torch.device) -> Tensor:
    """A few images as the network takes them, the first of a set: what layers are looked at with.

    Raises:
        ValueError: none of the set's images can be read.
    """
    # of files so many are decoded as it takes until some can be read
    few = images.subset(torch.arange(min(len(images), MOST_IMAGES))) if isinstance(images, ImageSet) else images
    return next(iter(make_batches(replace(config, workers=0, test_batch_size=MOST_IMAGES), few, device))).x


def unlabelled_images(
    config: TrainConfig, images: ImageSet | FileSet, count: int, device: torch.device, *, augmented: bool = True
) -> list[Tensor]:
    """Batches of so many images (all where there are fewer), chosen at random by the seed.

    First as in evaluation; then, if ``augmented``, ``MORE_VIEWS`` times as in training, cropped and mirrored at random.
    """
    chosen = images.subset(torch.randperm(len(images), generator=torch.Generator().manual_seed(config.seed))[:count])
    found = [batch.x for batch in make_batches(config, chosen, device)]
    if augmented:
        whole = replace(config, batch_size=min(config.batch_size, len(chosen)))
        batches = make_batches(whole, chosen, device, training=True)
        for epoch in range(MORE_VIEWS):
            batches.set_epoch(epoch)
            found += [batch.x for batch in batches]
    return found


def default_workers() -> int:
    """Decoding processes of a training process: its share of the cores that this machine lets it use, at least 1."""
    return max(1, len(os.sched_getaffinity(0)) // launched().local_world)


def make_objective(config: TrainConfig, num_classes: int, device: torch.device) -> Objective:
    """The loss a config asks for.

    Raises:
        ValueError: a teacher that is not there or does not fit.
    """
    teacher = None
    if config.distill_weight:
        source = config.weights_path(config.teacher)
        assert source is not None
        teacher = load_teacher(config, source, num_classes, device)
    return Objective(
        label_smoothing=config.label_smoothing,
        teacher=teacher,
        distill_weight=config.distill_weight,
        distill_temperature=config.distill_temperature,
        distill_mixup=config.distill_mixup,
    )


def seed_everything(seed: int) -> None:
    """Seed torch (every device), NumPy and Python."""
    torch.manual_seed(seed)
    np.random.seed(seed % (1 << 32))  # noqa: NPY002 (libraries that use the global state)
    random.seed(seed)
