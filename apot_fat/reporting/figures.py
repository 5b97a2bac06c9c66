"""Figures of training runs."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from apot_fat.checkpoint import atomic_write, read_checkpoint
from apot_fat.optional import needed_for
from apot_fat.quant.all_layers import threshold_layers
from apot_fat.training.folder import LAST, RunSummary, best_or_last
from apot_fat.training.network import open_network

METHOD_COLORS = {"fp32": "#4d4d4d", "apot": "#0072b2", "fat": "#d55e00", "uniform": "#009e73"}
METHOD_COLORS |= {"lsq": "#cc79a7", "pact": "#e69f00"}  # Okabe–Ito
_BIT_STYLES = {32: "-", 5: (0, (1, 1)), 4: "-", 3: "--", 2: ":"}


def draw_runs(runs: Sequence[RunSummary], path: Path) -> Path:
    """Draw test accuracy over the epochs of all stages, accuracy against bits, thresholds, and weights with levels.

    Args:
        runs: finished runs of one output folder.
        path: the PNG to write.

    Returns:
        The path.
    """
    with needed_for("drawing runs"):
        from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 8), dpi=110, layout="constrained")
    (curves, bits), (thresholds, weights) = figure.subplots(2, 2)
    _draw_curves(curves, runs)
    _draw_bits(bits, runs)
    _draw_thresholds(thresholds, runs)
    _draw_weights(weights, runs)
    for axes in figure.axes:
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(alpha=0.25)
    with atomic_write(path) as temporary:
        figure.savefig(temporary, format="png")
    return path


def _label(run: RunSummary) -> str:
    return "fp32" if run.bits == 32 else f"{_family(run).upper().replace('APOT', 'APoT')} {run.bits} bits"


def _family(run: RunSummary) -> str:
    return run.method.split("-")[0]


def _style(run: RunSummary) -> dict[str, Any]:
    return {"color": METHOD_COLORS.get(_family(run), "#cc79a7"), "linestyle": _BIT_STYLES.get(run.bits, "-.")}


def _history(run: RunSummary) -> list[dict[str, Any]]:
    return read_checkpoint(run.folder / LAST)["history"]


def _draw_curves(axes: Any, runs: Sequence[RunSummary]) -> None:
    for run in runs:
        history = _history(run)
        axes.plot(
            [r["epoch"] for r in history], [100 - r["test_top1"] for r in history], label=_label(run), **_style(run)
        )
    axes.set(title="Test error over the epochs of each stage", xlabel="epoch of the stage", ylabel="test error, %")
    axes.set_yscale("symlog", linthresh=1)
    axes.set_yticks([0, 1, 2, 5, 10, 20, 50], labels=["0", "1", "2", "5", "10", "20", "50"])
    axes.set_ylim(0, 95)
    axes.legend(frameon=False, fontsize=9, ncols=2)


def _draw_bits(axes: Any, runs: Sequence[RunSummary]) -> None:
    quantized = [run for run in runs if run.bits != 32]
    for family in dict.fromkeys(_family(run) for run in quantized):
        of_family = sorted((run for run in quantized if _family(run) == family), key=lambda run: run.bits)
        color = METHOD_COLORS.get(family, "#cc79a7")
        axes.plot(
            [r.bits for r in of_family],
            [r.best for r in of_family],
            "o-",
            color=color,
            label=f"{_label(of_family[0]).split()[0]}, best epoch",
        )
        axes.plot([r.bits for r in of_family], [r.last for r in of_family], "x", color=color, label="last epoch")
    for run in (run for run in runs if run.bits == 32):
        axes.axhline(run.best, color=METHOD_COLORS["fp32"], label="fp32, best epoch")
    axes.set(title="Accuracy against bits", xlabel="bits of weights and activations", ylabel="test top-1, %")
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.legend(frameon=False, fontsize=9)


def _draw_thresholds(axes: Any, runs: Sequence[RunSummary]) -> None:
    quantized = [run for run in runs if run.bits != 32]
    if not quantized:
        axes.set_axis_off()
        return
    for run in quantized:
        layers = _history(run)[-1]["layers"].values()
        values = [layer["act_alpha"] for layer in layers]
        axes.plot(range(1, len(values) + 1), values, marker="o", markersize=3, label=_label(run), **_style(run))
    axes.set(title="Activation clipping thresholds after training", xlabel="quantized layer", ylabel="threshold α")
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.set_ylim(bottom=0)
    axes.legend(frameon=False, fontsize=9, ncols=2)


def _draw_weights(axes: Any, runs: Sequence[RunSummary]) -> None:
    quantized = [run for run in runs if run.bits != 32]
    apot = [run for run in quantized if _family(run) == "apot"] or quantized
    if not apot:
        axes.set_axis_off()
        return
    run = max(apot, key=lambda run: run.bits)
    model = open_network(best_or_last(run.folder)).model
    name, layer = list(threshold_layers(model))[len(list(threshold_layers(model))) // 2]
    assert layer.weight_alpha is not None
    with torch.no_grad():
        values = layer.transformed_weight().flatten().numpy()
        alpha = layer.weight_alpha.mean().item()
    levels = layer.spec.weight_set.signed_tensor().numpy() * alpha
    color = METHOD_COLORS.get(_family(run), "#cc79a7")
    axes.hist(values, bins=120, color=color, alpha=0.35, density=True)
    for level in levels:
        axes.axvline(level, color=color, linewidth=0.9)
    axes.axvspan(levels[0], alpha, color=color, alpha=0.04)
    axes.set(
        title=f"Weights of {name} and their levels ({_label(run)})",
        xlabel="normalised weight; shaded: inside the clipping threshold",
        ylabel="density",
    )
