"""All quantized layers of a network at once: listed, shown, and set to other bits."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields, replace

import torch
from torch import nn

from apot_fat.quant.layers import AnyQuantized
from apot_fat.quant.spec import FLOAT_BITS, QuantSpec, check_bits
from apot_fat.quant.units import ALPHA_FLOOR
from apot_fat.text import aligned, bar, html_table


@dataclass(frozen=True)
class LayerClipping:
    """One row of ``clipping_table``: a layer's thresholds as used, its bits and, with FAT, its mask's range.

    Of thresholds of one a channel ``weight_alpha`` is the mean.
    """

    name: str
    weight_bits: int
    act_bits: int
    weight_alpha: float | None
    act_alpha: float | None
    mask_max: float | None = None
    mask_min: float | None = None


ThresholdRow = tuple[str, float | None, float | None]
"""Layer, weight threshold and activation threshold; None where a side is float."""


class ClippingTable(list[LayerClipping]):
    """The rows of ``clipping_table``. Printed, ``threshold_table``; in a notebook a table without its empty columns."""

    def __str__(self) -> str:
        return threshold_table([(row.name, row.weight_alpha, row.act_alpha) for row in self])

    def _repr_html_(self) -> str:
        names = [field.name for field in fields(LayerClipping)]
        head = [name for name in names if any(getattr(row, name) is not None for row in self)]
        rows = [[_shown(getattr(row, name)) for name in head] for row in self]
        return html_table(head, rows, left=["name"])


def threshold_layers(model: nn.Module) -> Iterator[tuple[str, AnyQuantized]]:
    """Name and module of every quantized layer but those of ``EIGHT_BIT``, in the order of definition.

    They have thresholds, or at 32 bits would have them at fewer.
    """
    for name, module in model.named_modules():
        if isinstance(module, AnyQuantized) and module.spec.weight_scale == "threshold":
            yield name, module


def clipping_table(model: nn.Module) -> ClippingTable:
    """The clipping thresholds of every quantized layer, in the order of definition.

    Returns:
        One ``LayerClipping`` a layer; thresholds in their own units, None where a side is float.
    """
    rows = ClippingTable()
    for name, layer in threshold_layers(model):
        mask = layer.mask_range() or (None, None)
        alphas = layer.clipping_thresholds()
        rows.append(LayerClipping(name, layer.spec.weight_bits, layer.spec.act_bits, *alphas, *mask))
    return rows


def threshold_table(rows: Sequence[ThresholdRow]) -> str:
    """Thresholds in columns, each with a bar on a scale of its own."""
    head, columns = ["layer"], [[row[0] for row in rows]]
    for side, name in ((1, "weight α"), (2, "activation α")):
        values = [row[side] for row in rows]
        numbers = [value for value in values if isinstance(value, float)]
        largest = max(numbers, default=0.0)
        columns.append([f"{value:.3f}" if isinstance(value, float) else "–" for value in values])
        columns.append([bar(value, largest) if isinstance(value, float) else "" for value in values])
        head += [name, f"0 … {largest:.3f}"]
    return aligned(head, list(zip(*columns, strict=True)), left=(head[0], head[2], head[4]))


def show_params(model: nn.Module) -> None:
    """Print the published threshold line of every quantized layer; of one threshold a channel the mean."""
    for _, layer in threshold_layers(model):
        layer.show_params()


def set_bits(model: nn.Module, bits: int) -> nn.Module:
    """Set weight and activation bits of every quantized layer in place, keeping weights and thresholds.

    Layers whose bits were given to ``quantize`` by name keep them, and a side that is float where the layer's other is
    not (``weight_bits=32`` or ``act_bits=32`` of ``quantize``) stays float; of a layer at 32 bits both sides are set.

    From 32 bits thresholds are new: the constants of the ``QuantSpec``. Where weights are not normalised, as after
    ``quantize``, those of weights are fitted instead, and those of inputs are what they were before 32 bits; a network
    that was never at fewer needs them fitted: ``initialize_thresholds(model, batch)``.

    Args:
        model: any network that holds ``QuantConv2d`` or ``QuantLinear``; those of ``EIGHT_BIT`` stay as they are.
        bits: 2 to 8, or 32. Make the optimiser afterwards: from 32 bits the thresholds are new parameters.

    Returns:
        The model.

    Raises:
        ValueError: other bits, or a model without quantized layers.
    """
    check_bits(bits)
    layers = [layer for _, layer in threshold_layers(model)]
    if not layers:
        raise ValueError(
            f"{type(model).__name__} holds no QuantConv2d or QuantLinear whose bits can be set: build it from them, or "
            "quantize it"
        )
    for layer in layers:
        if layer.fixed_bits:
            continue
        spec, was_float = _with_bits_of_quantized_sides(layer.spec, bits), layer.weight_alpha is None
        constants_fit = spec.weight_norm != "none" or spec.weight_alpha is None  # a constant is of normalised weights
        act_alpha = layer.clipping_thresholds()[1]
        if not constants_fit and spec.act_bits == FLOAT_BITS and act_alpha is not None:
            spec = replace(spec, act_alpha=act_alpha)
        layer.spec = spec
        if not constants_fit and was_float:
            layer.fit_weight_alpha()
    return model


def _with_bits_of_quantized_sides(spec: QuantSpec, bits: int) -> QuantSpec:
    if spec.weight_bits == FLOAT_BITS != spec.act_bits:
        return replace(spec, act_bits=bits)
    if spec.act_bits == FLOAT_BITS != spec.weight_bits:
        return replace(spec, weight_bits=bits)
    return spec.with_bits(bits)


@torch.no_grad()
def keep_thresholds_positive(model: nn.Module) -> int:
    """Set every threshold at or below zero to ``ALPHA_FLOOR`` in place; return how many there were.

    The layers read such a threshold as the floor anyway; this brings the parameter back, so that training can raise it.
    """
    raised = 0
    for _, layer in threshold_layers(model):
        for alpha in (layer.weight_alpha, layer.act_alpha):
            if alpha is not None and (too_low := int((alpha <= 0).sum())):
                alpha.masked_fill_(alpha <= 0, ALPHA_FLOOR)
                raised += too_low
    return raised


def _shown(value: str | float | None) -> str:
    if value is None:
        return "–"
    return f"{value:.3f}" if isinstance(value, float) else str(value)
