"""A run's curves for TensorBoard."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from apot_fat.optional import needed_for
from apot_fat.quant.all_layers import threshold_layers
from apot_fat.quant.measure import measure_inputs, measure_weight
from apot_fat.training.config import TrainConfig

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_METRICS = ("test_acc", "loss/test")


class Board:
    """The TensorBoard events of a run folder.

    Every epoch: ``train_acc``, ``test_acc`` (as published) and ``val_acc`` in %, ``loss/PART``, ``lr/GROUP``, and
    under ``weight_alpha``, ``act_alpha``, ``mask_max`` and ``mask_min`` one curve a layer. Every ``histogram_every``
    epochs and at the last: the weights' histograms (``weight/LAYER``), ``weight_sqnr_db``, ``weight_clipped`` and, of
    a few images, ``act_sqnr_db`` and ``act_clipped`` of each layer, and the picture ``levels``. The
    run's values stand under HPARAMS.

    Args:
        folder: the run folder.
        config: the run.
        epochs_done: epochs before; what was written of later ones is left out.

    Raises:
        MissingPackageError: tensorboard or matplotlib.
    """

    def __init__(self, folder: Path, config: TrainConfig, epochs_done: int) -> None:
        with needed_for("the board of curves"):
            import matplotlib.figure  # noqa: F401 (missing, it would be so only at the first picture)
            from torch.utils.tensorboard import SummaryWriter
            from torch.utils.tensorboard.summary import hparams
        self.config = config
        self.writer = SummaryWriter(str(folder), purge_step=epochs_done)
        values = {
            name: v if isinstance(v, bool | int | float | str) else str(v) for name, v in config.to_dict().items()
        }
        for summary in hparams(values, dict.fromkeys(_METRICS, 0.0)):
            self.writer._get_file_writer().add_summary(summary)

    def close(self) -> None:
        """Write what is left."""
        self.writer.close()

    def write(self, row: dict[str, Any], model: nn.Module, images: Tensor, epoch: int) -> None:
        """Add an epoch.

        Args:
            row: its line of ``metrics.jsonl``.
            model: the tested network.
            images: a few, as the network takes them.
            epoch: its number, from 0.
        """
        for part in ("train", "test", "val"):
            if f"{part}_loss" in row:
                self.writer.add_scalar(f"loss/{part}", row[f"{part}_loss"], epoch)
                self.writer.add_scalar(f"{part}_acc", row[f"{part}_top1"], epoch)
        for name, value in row["lr"].items():
            self.writer.add_scalar(f"lr/{name}", value, epoch)
        for name, layer in row["layers"].items():
            for quantity in ("weight_alpha", "act_alpha", "mask_max", "mask_min"):
                if layer[quantity] is not None:
                    self.writer.add_scalar(f"{quantity}/{name}", layer[quantity], epoch)
        every = self.config.histogram_every
        if every and (epoch % every == 0 or epoch + 1 == self.config.epochs):
            self._write_layers(model, images, epoch)

    def _write_layers(self, model: nn.Module, images: Tensor, epoch: int) -> None:
        layers = dict(threshold_layers(model))
        if not layers:
            return
        inputs = measure_inputs(model, images)
        for name, layer in layers.items():
            self.writer.add_histogram(f"weight/{name}", layer.transformed_weight().detach(), epoch)
            for side, found in (("weight", measure_weight(layer)), ("act", inputs.get(name))):
                if found is not None and found.sqnr is not None:
                    self.writer.add_scalar(f"{side}_sqnr_db/{name}", found.sqnr, epoch)
                if found is not None and found.clipped is not None:
                    self.writer.add_scalar(f"{side}_clipped/{name}", found.clipped, epoch)
        self.writer.add_figure("levels", draw_levels(model), epoch)


@torch.no_grad()
def draw_levels(model: nn.Module) -> Figure:
    """The weights of the first, a middle and the last quantized layer, and the levels under them."""
    from matplotlib.figure import Figure

    layers = list(threshold_layers(model))
    chosen = [layers[i] for i in sorted({0, len(layers) // 2, len(layers) - 1})]
    figure = Figure(figsize=(4 * len(chosen), 3), layout="constrained")
    for axes, (name, layer) in zip(figure.subplots(1, len(chosen), squeeze=False)[0], chosen, strict=True):
        found = measure_weight(layer)
        axes.stairs(
            found.histogram.counts,
            [found.histogram.low + i * found.histogram.step for i in range(len(found.histogram.counts) + 1)],
            fill=True,
            color="tab:blue",
            alpha=0.5,
        )
        for level in found.levels:
            axes.axvline(level, color="tab:red", linewidth=0.8)
        axes.set(title=name, xlabel="weight before projection", ylabel="weights", yticks=[])
    return figure
