"""The output of a quantized layer: from bytes in evaluation, and in training with its input remembered."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from apot_fat.quant.fast.byte_product import byte_product
from apot_fat.quant.fast.kept import byte_weight
from apot_fat.quant.fast.remade import ActSettings, conv_settings, quantized_product
from apot_fat.quant.layers import AnyQuantized, QuantConv2d

REMEMBER_ELEMENTS = 1 << 18
"""Inputs of at least this many elements are remembered instead of their quantized copies."""


def layer_output(layer: AnyQuantized, x: Tensor) -> Tensor | None:
    """``layer(x)``, or None where the plain forward does as well.

    So it does for ``EIGHT_BIT``, a float or signed input, one so small that keeping its quantized copy for backward
    costs less than making it again, or under a compiler that decides itself.
    """
    if layer.spec.weight_scale == "max":
        return None
    conv = None
    features = layer.count_features(x)  # the layer's, read or not
    skips = False
    if isinstance(layer, QuantConv2d):
        conv = conv_settings(layer)
        if x.dim() != 4 or conv is None:
            return None
        skips = conv.stride != layer.stride
        if skips:
            x = x[:, :, :: layer.stride[0], :: layer.stride[1]]
    if layer.act_alpha is not None and layer.act_set is not None and not layer.spec.act_signed:
        scale = layer.grad_scale(layer.act_set, features)
        act = ActSettings(layer.act_set, layer.input_clip, layer.spec.act_alpha_gradient, scale)
        weight = byte_weight(layer) if x.dtype == torch.float32 and x.device.type == "cpu" else None
        if weight is not None:
            return byte_product(x, layer.act_alpha, weight, layer.bias, act, conv)
        if not (torch.compiler.is_compiling() or (torch.is_grad_enabled() and x.numel() < REMEMBER_ELEMENTS)):
            return quantized_product(x, layer.act_alpha, layer.quantized_weight(), layer.bias, act, conv)
    if conv is None or not skips:
        return None
    return F.conv2d(layer.quantized_input(x, features), layer.quantized_weight(), layer.bias, *conv)
