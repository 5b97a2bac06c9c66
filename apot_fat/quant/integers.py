"""Quantized operands as integers: w_q = α n / d and x_q = α n / d, n and d as in the level set.

What packing stores, integer inference multiplies and an ONNX file holds.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from apot_fat.quant.fake_quant import positive
from apot_fat.quant.layers import EightBitConv2d, EightBitLinear, QuantConv2d, QuantLinear

EIGHT_BIT_DENOMINATOR = 127
_MAX_DENOMINATOR = 1 << 31


class Integers(NamedTuple):
    """A tensor as integers.

    Equation: value = scale · numerators / denominator.

    ``numerators`` int64, the tensor's shape, range [−denominator, denominator] (an 8-bit weight's may lie below);
    ``scale`` 0-d, the value's unit.
    """

    numerators: Tensor
    denominator: int
    scale: Tensor


@torch.no_grad()
def integer_weight(layer: torch.nn.Module) -> Integers | None:
    """The quantized weight of a layer as integers; None where the weight is float.

    Args:
        layer: ``QuantConv2d``, ``QuantLinear``, ``EightBitConv2d`` or ``EightBitLinear``; any other has float weights.

    Raises:
        ValueError: powers of two whose denominator exceeds 2^31.
    """
    if isinstance(layer, EightBitConv2d | EightBitLinear):
        scale = layer.weight.max()
        if not scale > 0:
            return None  # such a weight is left as it is
        return _integers(layer.quantized_weight(), EIGHT_BIT_DENOMINATOR, scale)
    if not isinstance(layer, QuantConv2d | QuantLinear) or layer.weight_alpha is None:
        return None
    return _integers(layer.quantized_weight(), layer.spec.weight_set.denominator, positive(layer.weight_alpha))


@torch.no_grad()
def integer_input(layer: QuantConv2d | QuantLinear, x: Tensor) -> Integers | None:
    """The quantized input of a layer as integers; None where the layer takes its input as it is.

    Args:
        layer: the layer.
        x: its input.

    Raises:
        ValueError: powers of two whose denominator exceeds 2^31.
    """
    if layer.act_alpha is None:
        return None
    return _integers(layer.quantized_input(x), layer.spec.act_set.denominator, positive(layer.act_alpha))


def _integers(value: Tensor, denominator: int, scale: Tensor) -> Integers:
    if denominator > _MAX_DENOMINATOR:
        raise ValueError(f"levels over {denominator}: integers over at most 2^31 are supported; use fewer bits")
    numerators = (value.double() / scale.double() * denominator).round().to(torch.int64)
    return Integers(numerators, denominator, scale.detach().clone())
