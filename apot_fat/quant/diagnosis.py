"""Layers that a quantizer cannot help: what is defined for them, but is seldom meant."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from apot_fat.quant.fake_quant import ALPHA_FLOOR
from apot_fat.quant.layers import CONSTANT, QuantConv2d, QuantLinear, quant_layers


@torch.no_grad()
def odd_layers(model: nn.Module, x: Tensor) -> list[str]:
    """One sentence for each quantized layer that computes something, but hardly what was meant.

    - A constant weight, its standard deviation 0 but for rounding: normalised (not NaN) and quantized it is 0.
    - An input without a value above 0 (signed quantizers: without any but 0) is quantized to 0 throughout: the output
      is the bias, and the activation threshold gets no gradient.
    - A threshold at or below ``ALPHA_FLOOR`` is used as the floor: all of the weight or input is clipped to about 0.

    Args:
        model: any network; left as it is, its mode and statistics too.
        x: a batch that it takes.

    Returns:
        Sentences that begin with the layer's name; none for a network in order.
    """
    found: list[str] = []
    names = {module: name or type(module).__name__ for name, module in quant_layers(model)}

    def look(module: nn.Module, args: tuple[Tensor, ...]) -> None:
        assert isinstance(module, QuantConv2d | QuantLinear)
        found.extend(f"{names[module]}: {reason}" for reason in _reasons(module, args[0]))

    handles = [module.register_forward_pre_hook(look) for module in names]
    was_training = model.training
    try:
        with torch.compiler.set_stance("force_eager"):
            model.eval()(x)
    finally:
        model.train(was_training)
        for handle in handles:
            handle.remove()
    return found


def _reasons(layer: QuantConv2d | QuantLinear, x: Tensor) -> list[str]:
    spec, reasons = layer.spec, []
    if layer.weight_alpha is not None:
        w = layer.weight
        if spec.weight_norm in ("standardize", "center") and w.numel() > 1 and w.std() <= CONSTANT * w.mean().abs():
            reasons.append("its weight is constant and quantized to 0")
        if (layer.weight_alpha <= ALPHA_FLOOR).any():
            reasons.append("its weight threshold is at its floor: lower weight_alpha_lr")
    if layer.act_alpha is not None:
        keeps_negatives = not layer.relu and (spec.act_signed or (spec.act_set.is_uniform and spec.act_clip == "above"))
        if not (x != 0 if keeps_negatives else x > 0).any():
            reasons.append(f"its input is {'0' if keeps_negatives else 'nowhere above 0'} and quantized to 0")
        if (layer.act_alpha <= ALPHA_FLOOR).any():
            reasons.append("its activation threshold is at its floor: lower act_alpha_lr")
    return reasons
