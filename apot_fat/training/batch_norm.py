"""Batch norm in a run: values enough for its statistics, and statistics of the network as it ended."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn

from apot_fat.data import Batches, Sharding
from apot_fat.quant.convert.norms import batch_norms, estimate_batch_norms
from apot_fat.quant.watching import evaluation_mode, watch_inputs
from apot_fat.training.config import TrainConfig
from apot_fat.training.distributed import mean_over_processes


@torch.no_grad()
def check_batch_norm(model: nn.Module, config: TrainConfig, num_images: int, sharding: Sharding, image: Tensor) -> None:
    """Raise ``ValueError`` where a batch of a run would leave batch norm a single value a channel.

    Its statistics are undefined then: said before training begins, not at the end of the first epoch.

    Args:
        num_images: training images.
        image: one, as the network takes it, (1, 3, H, W).
    """
    size, parts = config.batch_size, sharding.parts
    if sharding.fewest(num_images, size) > 1:
        return
    norms = {m: name for name, m in model.named_modules() if isinstance(m, nn.BatchNorm1d | nn.BatchNorm2d)}
    single: list[str] = []

    def look(norm: nn.BatchNorm1d | nn.BatchNorm2d, inputs: tuple[Tensor, ...]) -> None:
        if inputs[0][0, 0].numel() == 1:
            single.append(norms[norm])

    with evaluation_mode(model), watch_inputs(norms, look), torch.compiler.set_stance("force_eager"):
        model(image)
    if single:
        others = (*range(size - parts, 0, -parts), *range(size + parts, num_images + parts, parts))
        fits = next((other for other in others if sharding.fewest(num_images, other) > 1), None)
        raise ValueError(
            f"batch_size {size}: one of {num_images} training images would be a batch of its own, where batch norm "
            f"({single[0]}) has a single value a channel; give {f'--batch-size {fits}' if fits else 'more images'}"
        )


@torch.no_grad()
def estimate_batch_norm(
    model: nn.Module, batches: Batches, count: int, *, epoch: int = 0, inputs: Callable[[Tensor], Tensor] | None = None
) -> None:
    """Replace the statistics of batch norms by their mean over training batches; weights and random numbers stay.

    Equation: μ ← mean over the batches of m, σ² ← mean of v, with m and v (unbiased) of each batch in the network as it
    is now. Training's own are a moving average over networks of before, which weighs its last batches most.

    Args:
        batches: each process takes its first ``count`` of this epoch and, where that has fewer, of those after it; all
            processes end with the mean.
        count: batches, ≥ 1.
        epoch: number of the epoch.
        inputs: what training makes of a batch's images before the network sees them; by default nothing.

    Paper: Wu, Johnson, "Rethinking 'Batch' in BatchNorm", 2021, section 3; of quantized networks Nagel et al.,
    "Overcoming Oscillations in Quantization-Aware Training", ICML 2022.
    """
    devices = [p.device for p in model.parameters() if p.device.type == "cuda"][:1]
    norms, images = batch_norms(model), _images_since(batches, epoch)
    was_training = model.training
    with torch.random.fork_rng(devices):
        model.train()
        estimate_batch_norms(norms, lambda _: model(next(images) if inputs is None else inputs(next(images))), count)
        model.train(was_training)
    for norm in norms:
        assert norm.running_mean is not None
        assert norm.running_var is not None
        for statistics in (norm.running_mean, norm.running_var):
            statistics.copy_(mean_over_processes(statistics))


def _images_since(batches: Batches, epoch: int) -> Iterator[Tensor]:
    while True:
        batches.set_epoch(epoch)
        for batch in batches:
            yield batch.x
        epoch += 1
