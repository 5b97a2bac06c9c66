"""Batches of image files decoded by worker processes: ImageNet, or any set too large for memory."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Sampler
from torch.utils.data import Dataset as TorchDataset

from apot_fat.data.decoding import UnreadableImageError, UnreadableImages, read_image
from apot_fat.data.images import FILE_SIZE, FileSet, normalize
from apot_fat.data.sharding import Batch, EpochPlan, PlannedBatches, Sharding, epoch_generator, mix_seed
from apot_fat.data.workers import begin_worker, start_fork_server
from apot_fat.text import one_line

CROPS = ("resize-crop", "random-resized-crop")
ON_DAMAGED = ("error", "skip")


class FileBatches(PlannedBatches):
    """Batches of image files: decoded, cropped and mirrored as uint8 by workers, normalised on the device.

    Args:
        files: the files and labels.
        batch_size: images an optimiser step over all processes; for evaluation images a batch.
        device: where batches end.
        mean, std: per channel, in units of 255.
        image_size: height and width of the crop, pixels.
        crop: ``resize-crop`` (shorter side to 256 / 224 of the size, random crop; APoT) or ``random-resized-crop``
            (FAT); evaluation takes the centre crop of the former.
        flip: mirror half of the training images.
        training: a new order every epoch and random crops and mirror images; else in order.
        seed: with the epoch's number it determines order and augmentation.
        channels_last: memory format of the batches.
        sharding: this process's part.
        workers: decoding processes; 0 decodes here.
        on_damaged: ``error`` stops at an unreadable image, ``skip`` leaves it out and counts it; a batch of such images
            alone is left out too, but ends training.
    """

    def __init__(
        self,
        files: FileSet,
        batch_size: int,
        device: torch.device,
        mean: tuple[float, ...],
        std: tuple[float, ...],
        *,
        image_size: int = FILE_SIZE,
        crop: str = "resize-crop",
        flip: bool = True,
        training: bool = False,
        seed: int = 0,
        channels_last: bool = True,
        sharding: Sharding = Sharding(),  # noqa: B008 (frozen)
        workers: int = 2,
        on_damaged: str = "error",
    ) -> None:
        self.plan = EpochPlan(len(files), batch_size, training, sharding)
        self.device = device
        self.mean = torch.tensor(mean, device=device)
        self.std = torch.tensor(std, device=device)
        self.channels_last = channels_last
        self.unreadable = UnreadableImages(on_damaged)
        self.sampler = _EpochSampler(self.plan, seed)
        decode = _DecodedFiles(files, image_transform(image_size, crop if training else None, flip), image_size, seed)
        self.loader = DataLoader(
            decode,
            batch_sampler=self.sampler,
            num_workers=workers,
            collate_fn=_collate,
            generator=torch.Generator(),  # its own: starting workers must not advance the run's random numbers
            pin_memory=device.type == "cuda",
            persistent_workers=workers > 0,
            multiprocessing_context="forkserver" if workers else None,  # forking a process with threads can hang
            worker_init_fn=begin_worker() if workers else None,
        )

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch whose order and augmentation the next iteration has."""
        self.sampler.epoch = epoch

    def since(self, start: int) -> Iterator[Batch]:
        """The epoch's batches from one on, the same as in the whole epoch; images before are not decoded."""
        loaded, slices = self._load(start), self.plan.slices(start)
        for (images_BCHW, labels, problems), (_, share, ends_step) in zip(loaded, slices, strict=True):
            for problem in problems:
                self.unreadable.add(problem)
            if not len(labels):
                self._check_left_out(problems)
                continue
            images_BHWC = images_BCHW.to(self.device, non_blocking=True).permute(0, 2, 3, 1)
            x = normalize(images_BHWC, self.mean, self.std)
            labels = labels.to(self.device, non_blocking=True)
            memory_format = torch.channels_last if self.channels_last else torch.contiguous_format
            x = x.permute(0, 3, 1, 2).contiguous(memory_format=memory_format)
            yield Batch(x, labels, share, ends_step)

    def _check_left_out(self, problems: list[str]) -> None:
        if self.plan.training:  # every process takes every step
            raise ValueError(
                f"{problems[-1]}, like all {len(problems)} images of this process in a step: mend or remove them, or "
                "give a larger --batch-size"
            )
        if len(self.unreadable.found) == self.plan.count:
            raise ValueError(f"{problems[-1]}; none of {self.plan.count} images can be read: mend them")

    def _load(self, start: int) -> Iterator[tuple[Tensor, Tensor, list[str]]]:
        if self.loader.num_workers:
            start_fork_server()
        self.sampler.start = start
        try:
            loaded = iter(self.loader)
            self.sampler.start = 0
            yield from loaded
        except (RuntimeError, EOFError, OSError) as error:
            if not self.loader.num_workers or str(error).startswith("Caught "):  # by a worker that lives
                raise
            raise OSError(
                f"a decoding process is lost ({one_line(error)}); if memory ran out, give fewer --workers, "
                "and go on with --resume auto"
            ) from error


def _shorter_side(image_size: int) -> int:
    return round(image_size * 256 / 224)


def image_transform(image_size: int, crop: str | None, flip: bool) -> Callable[[Any], Tensor]:
    """PIL image → uint8 (3, S, S): the published ImageNet augmentations, or with None the centre crop of evaluation."""
    from torchvision.transforms import v2

    resize = v2.Resize(_shorter_side(image_size), antialias=True)
    if crop is None:
        steps = [resize, v2.CenterCrop(image_size)]
    elif crop == "resize-crop":
        steps = [resize, v2.RandomCrop(image_size)]
    else:
        steps = [v2.RandomResizedCrop(image_size, antialias=True)]
    if crop is not None and flip:
        steps.append(v2.RandomHorizontalFlip())
    return v2.Compose([*steps, v2.PILToTensor()])


class _EpochSampler(Sampler[list[tuple[int, int]]]):
    """Lists of (epoch, index), one a batch of this process; an iteration has the epoch and start of its beginning."""

    def __init__(self, plan: EpochPlan, seed: int) -> None:
        self.plan, self.seed = plan, seed
        self.epoch = self.start = 0

    def __len__(self) -> int:
        return self.plan.sizes.total()

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        epoch, order = self.epoch, self.plan.order(epoch_generator(self.seed, self.epoch))
        slices = self.plan.slices(self.start)
        return ([(epoch, index) for index in order[part].tolist()] for part, _, _ in slices)


class _DecodedFiles(TorchDataset[tuple[Tensor | None, int, str]]):
    """Decodes one file; what is random about it depends on seed, epoch and index alone, whichever worker it is.

    An item is (image, label, ""), or (None, label, what is wrong with the file).
    """

    def __init__(self, files: FileSet, transform: Callable[[Any], Tensor], image_size: int, seed: int) -> None:
        self.files, self.transform, self.seed = files, transform, seed
        self.shorter_side = _shorter_side(image_size)

    def __getitem__(self, key: tuple[int, int]) -> tuple[Tensor | None, int, str]:
        epoch, index = key
        path, label = self.files.path(index), int(self.files.labels_N[index])
        try:
            rgb = read_image(path, self.shorter_side)
        except UnreadableImageError as error:
            return None, label, str(error)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(mix_seed(self.seed, epoch, index + 1))
            return self.transform(rgb), label, ""


def _collate(samples: Sequence[tuple[Tensor | None, int, str]]) -> tuple[Tensor, Tensor, list[str]]:
    whole = [(image, label) for image, label, _ in samples if image is not None]
    images = torch.stack([image for image, _ in whole]) if whole else torch.empty(0, 3, 1, 1, dtype=torch.uint8)
    labels = torch.tensor([label for _, label in whole], dtype=torch.int64)
    return images, labels, [problem for image, _, problem in samples if image is None]
