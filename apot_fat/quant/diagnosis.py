"""Layers that a quantizer cannot help: what is defined for them, but is seldom meant."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from apot_fat.quant.all_layers import threshold_layers
from apot_fat.quant.layers import AnyQuantized
from apot_fat.quant.normalization import CONSTANT
from apot_fat.quant.units import ALPHA_FLOOR
from apot_fat.quant.watching import evaluation_mode, watch_inputs

_DEAD = 0.1
"""A filter is as good as dead if its largest weight is no more than this share of the layer's."""


@torch.no_grad()
def odd_layers(model: nn.Module, x: Tensor) -> list[str]:
    """One sentence for each quantized layer that computes something, but hardly what was meant.

    - A constant weight, its standard deviation 0 but for rounding: normalised (not NaN) and quantized it is 0.
    - An input without a value above 0 (signed quantizers: without any but 0) is quantized to 0 throughout: the output
      is the bias, and the activation threshold gets no gradient.
    - A threshold at or below ``ALPHA_FLOOR`` is used as the floor: all of the weight or input is clipped to about 0.
      Filters that had died before, whose weights are small beside the layer's, are in order.

    Args:
        model: any network; left as it is, its mode and statistics too.
        x: a batch that it takes.

    Returns:
        Sentences that begin with the layer's name; none for a network in order.
    """
    found: list[str] = []
    names = {module: name or type(module).__name__ for name, module in threshold_layers(model)}
    if not names:
        return found

    def look(layer: AnyQuantized, inputs: tuple[Tensor, ...]) -> None:
        found.extend(f"{names[layer]}: {reason}" for reason in _reasons(layer, inputs[0]))

    with evaluation_mode(model), watch_inputs(names, look), torch.compiler.set_stance("force_eager"):
        model(x)
    return found


def _reasons(layer: AnyQuantized, x: Tensor) -> list[str]:
    spec, reasons = layer.spec, []
    if layer.weight_alpha is not None:
        w = layer.weight
        if spec.weight_norm in ("standardize", "center") and w.numel() > 1 and w.std() <= CONSTANT * w.mean().abs():
            reasons.append("its weight is constant and quantized to 0")
        low = layer.weight_alpha <= ALPHA_FLOOR
        if low.any() and (u := layer.transformed_weight().abs())[low.expand(len(u))].max() > _DEAD * u.max():
            reasons.append("its weight threshold is at its floor: lower weight_alpha_lr")
    if layer.act_alpha is not None and layer.act_quantizer is not None:
        negatives = layer.act_quantizer.keeps_negatives
        if not (x != 0 if negatives else x > 0).any():
            reasons.append(f"its input is {'0' if negatives else 'nowhere above 0'} and quantized to 0")
        if (layer.act_alpha <= ALPHA_FLOOR).any():
            reasons.append("its activation threshold is at its floor: lower act_alpha_lr")
    return reasons
