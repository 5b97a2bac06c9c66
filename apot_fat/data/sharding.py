"""How a global batch is divided among processes and accumulation steps, and batches as the loop takes them."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from typing import NamedTuple, Protocol

import torch
from torch import Tensor


class Batch(NamedTuple):
    """What the training loop takes.

    Args:
        x: normalised images (B, 3, H, W), float32.
        labels: (B,), int64.
        share: images here over images of the whole optimiser step; the shares of all processes and accumulation steps
            add up to 1.
        ends_step: whether the optimiser steps after this one.
    """

    x: Tensor
    labels: Tensor
    share: float = 1.0
    ends_step: bool = True


Planned = tuple[slice, float, bool]
"""A batch to be made: its part of the epoch's order, its share of the step, and whether it ends one."""


class Batches(Protocol):
    """Batches of one epoch after another."""

    @property
    def num_images(self) -> int:
        """Images an epoch, over all processes."""
        ...

    @property
    def num_batches(self) -> int:
        """Batches an epoch that this process sees, accumulation steps counted one by one."""
        ...

    @property
    def sizes(self) -> Counter[int]:
        """How many of them an epoch have how many images."""
        ...

    @property
    def steps(self) -> int:
        """Optimiser steps an epoch; for evaluation batches over all processes."""
        ...

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch of the next iteration."""
        ...

    def __iter__(self) -> Iterator[Batch]: ...


@dataclass(frozen=True)
class Sharding:
    """Which part of the images this process takes.

    Args:
        rank: number of this process, from 0.
        world: processes.
        accumulate: batches whose gradients are added up before a step.
    """

    rank: int = 0
    world: int = 1
    accumulate: int = 1

    @property
    def parts(self) -> int:
        """Parts a global batch is divided into."""
        return self.world * self.accumulate

    def check(self, batch_size: int) -> None:
        """Raise ``ValueError`` unless the global batch divides evenly."""
        if batch_size % self.parts:
            raise ValueError(
                f"batch_size {batch_size}: does not divide among {self.world} processes × {self.accumulate} "
                f"accumulation steps; choose a multiple of {self.parts}"
            )

    def steps(self, count: int, batch_size: int) -> int:
        """Optimiser steps an epoch of ``count`` images; a last batch with fewer images than parts is left out."""
        return count // batch_size + (count % batch_size >= self.parts)

    def fewest(self, count: int, batch_size: int) -> int:
        """Images of the smallest of all the parts of an epoch of ``count`` images, which has a step."""
        last = count % batch_size
        return (last if last >= self.parts else batch_size) // self.parts

    def training_slices(self, count: int, batch_size: int) -> Iterator[Planned]:
        """This process's (slice of the epoch's order, share, whether it ends a step), in order."""
        for step in range(self.steps(count, batch_size)):
            start = step * batch_size
            size = min(batch_size, count - start)
            cuts = [start + size * part // self.parts for part in range(self.parts + 1)]
            for part in range(self.rank * self.accumulate, (self.rank + 1) * self.accumulate):
                part_slice = slice(cuts[part], cuts[part + 1])
                share = (cuts[part + 1] - cuts[part]) / size
                yield part_slice, share, part == (self.rank + 1) * self.accumulate - 1

    def evaluation_slices(self, count: int, batch_size: int) -> Iterator[Planned]:
        """Every ``world``-th batch: all processes together see each image exactly once."""
        for start in range(self.rank * batch_size, count, self.world * batch_size):
            yield slice(start, min(start + batch_size, count)), 1.0, True


@dataclass(frozen=True)
class EpochPlan:
    """Which images this process takes in an epoch, batch by batch; what batches in memory and from files share.

    Args:
        count: images, over all processes.
        batch_size: images an optimiser step over all processes; for evaluation images a batch.
        training: a new order every epoch, divided for training; else in order, each image once over all processes.
        sharding: this process's part.
    """

    count: int
    batch_size: int
    training: bool
    sharding: Sharding

    @property
    def steps(self) -> int:
        """Optimiser steps; for evaluation batches over all processes."""
        if self.training:
            return self.sharding.steps(self.count, self.batch_size)
        return -(-self.count // self.batch_size)

    @property
    def sizes(self) -> Counter[int]:
        """How many batches that this process sees have how many images."""
        return Counter(part.stop - part.start for part, _, _ in self.slices())

    def order(self, generator: torch.Generator) -> Tensor:
        """The indices of an epoch's images, in its order."""
        return torch.randperm(self.count, generator=generator) if self.training else torch.arange(self.count)

    def slices(self, start: int = 0) -> Iterator[Planned]:
        """(slice of the order, share, whether it ends a step) of each batch of this process, from one on."""
        divide = self.sharding.training_slices if self.training else self.sharding.evaluation_slices
        return islice(divide(self.count, self.batch_size), start, None)


class PlannedBatches(ABC):
    """What batches that follow an ``EpochPlan`` share."""

    plan: EpochPlan

    @property
    def steps(self) -> int:
        """Optimiser steps an epoch; for evaluation batches over all processes."""
        return self.plan.steps

    @property
    def num_batches(self) -> int:
        """Batches an epoch that this process sees."""
        return self.sizes.total()

    @property
    def sizes(self) -> Counter[int]:
        """How many of them have how many images."""
        return self.plan.sizes

    @property
    def num_images(self) -> int:
        """Images an epoch, over all processes."""
        return self.plan.count

    def __iter__(self) -> Iterator[Batch]:
        return self.since(0)

    @abstractmethod
    def since(self, start: int) -> Iterator[Batch]:
        """The epoch's batches from one on, the same as in the whole epoch; those before are not made."""


def batches_since(batches: Batches, start: int) -> Iterator[Batch]:
    """The epoch's batches from one on; those before are made and left out only if they follow no ``EpochPlan``."""
    return batches.since(start) if isinstance(batches, PlannedBatches) else islice(batches, start, None)


def epoch_generator(seed: int, epoch: int, index: int = 0) -> torch.Generator:
    """The random numbers of an epoch (or of one image in it): a function of these alone, the same on every device."""
    return torch.Generator().manual_seed(mix_seed(seed, epoch, index))


def mix_seed(seed: int, epoch: int, index: int = 0) -> int:
    """One seed from three numbers; neighbours share nothing (odd multipliers spread them over 63 bits)."""
    mixed = seed * 0x9E3779B97F4A7C15 + epoch * 0xBF58476D1CE4E5B9 + index * 0x94D049BB133111EB + 1
    return mixed % (1 << 63)
