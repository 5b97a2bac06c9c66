"""The output of a quantized layer: from bytes in evaluation, and in training with its input remembered."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from apot_fat.quant.fast.byte_product import byte_product
from apot_fat.quant.fast.kept import byte_weight
from apot_fat.quant.fast.remade import conv_settings, quantized_product
from apot_fat.quant.layers import AnyQuantized, QuantConv2d
from apot_fat.quant.quantizer import UnsignedQuantizer

REMEMBER_ELEMENTS = 1 << 18
"""Inputs of at least this many elements are remembered instead of their quantized copies."""


def layer_output(layer: AnyQuantized, x: Tensor) -> Tensor | None:
    """``layer(x)``, or None where the plain forward does as well.

    So it does for ``EIGHT_BIT``, an input that is float, signed or has thresholds of its channels, one so small that
    keeping its quantized copy for backward costs less than making it again, or under a compiler that decides itself.
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
    act, alpha = layer.act_quantizer, layer.act_alpha
    if isinstance(act, UnsignedQuantizer) and alpha is not None and not alpha.dim():
        weight = byte_weight(layer) if x.dtype == torch.float32 and x.device.type == "cpu" else None
        if weight is not None:
            return byte_product(x, alpha, weight, layer.bias, act, conv)
        if not (torch.compiler.is_compiling() or (torch.is_grad_enabled() and x.numel() < REMEMBER_ELEMENTS)):
            scale = layer.grad_scale(act.levels, alpha, features)
            return quantized_product(x, alpha, layer.quantized_weight(), layer.bias, act, scale, conv)
    if conv is None or not skips:
        return None
    return F.conv2d(layer.quantized_input(x, features), layer.quantized_weight(), layer.bias, *conv)
