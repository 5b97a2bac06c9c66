"""Trains five steps and evaluates, in as many processes as torchrun starts; the first writes what came out as JSON."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
from torch import Tensor, nn

from apot_fat.data import Augmentation, ImageBatches, ImageSet, Sharding
from apot_fat.models import create_model
from apot_fat.training import TrainConfig, evaluate, train_epoch
from apot_fat.training.distributed import launched, process_group, synchronize_batch_norm, wrap
from apot_fat.training.optim import make_optimizer, make_schedule

CPU = torch.device("cpu")
NORMALIZATION = (0.5, 0.5, 0.5), (0.25, 0.25, 0.25)


class InFloat64(nn.Module):
    """A network computing in float64 on float32 images."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model.double()

    def forward(self, x: Tensor) -> Tensor:
        """Logits, float64."""
        return self.model(x.double())


def images(count: int, seed: int) -> ImageSet:
    """Random images of three classes."""
    generator = torch.Generator().manual_seed(seed)
    pixels = torch.randint(0, 256, (count, 8, 8, 3), generator=generator, dtype=torch.uint8)
    return ImageSet(pixels, torch.arange(count) % 3)


def losses_and_count() -> tuple[list[float], int, int]:
    """The losses of five steps of 16 images, and (correct, total) of 37 test images."""
    torch.set_num_threads(1)
    processes = launched()
    sharding = Sharding(processes.rank, processes.world)
    config = TrainConfig(arch="resnet20", preset="apot-cifar", bit=4, batch_size=16, epochs=5, lr=0.02)
    with process_group(processes, CPU, 60):
        torch.manual_seed(0)
        model = create_model("resnet20", "apot-cifar", 4, num_classes=3)
        if processes.is_distributed:
            synchronize_batch_norm(model, CPU)
        model = InFloat64(model)
        optimizer = make_optimizer(model, config)
        schedule = make_schedule(optimizer, config, 1)
        trained = wrap(model, processes, CPU)
        batches = ImageBatches(
            images(16, 0), 16, CPU, *NORMALIZATION, augmentation=Augmentation(1), training=True, sharding=sharding
        )
        scaler = torch.amp.GradScaler("cpu", enabled=False)
        losses = []
        for epoch in range(5):
            batches.set_epoch(epoch)
            losses.append(train_epoch(trained, batches, optimizer, schedule, scaler).loss)
        result = evaluate(model, ImageBatches(images(37, 1), 5, CPU, *NORMALIZATION, sharding=sharding))
    return losses, result.correct, result.total


if __name__ == "__main__":
    outcome = losses_and_count()
    if launched().is_first:
        Path(sys.argv[1]).write_text(json.dumps(outcome))
