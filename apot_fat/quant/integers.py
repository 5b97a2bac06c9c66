"""Quantized operands as integers: w_q = α n / d and x_q = α n / d, n and d as in the level set.

What packing stores, integer inference multiplies and an ONNX file holds.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from apot_fat.quant.layers import AnyQuantized
from apot_fat.quant.quantizer import Quantizer
from apot_fat.quant.units import along_rows

_MAX_DENOMINATOR = 1 << 31


class Integers(NamedTuple):
    """A tensor as integers.

    Equation: value = scale · numerators / denominator.

    ``numerators`` int64, the tensor's shape, range [−denominator, denominator] (weights in two's complement or 8 bits
    also below it); ``scale`` 0-d, the value's unit, or (C_out,), that of each channel of a weight.
    """

    numerators: Tensor
    denominator: int
    scale: Tensor

    def unit(self, dim: int) -> Tensor:
        """What a numerator of 1 stands for, float64: 0-d, or (C_out, 1, …) for a tensor of ``dim`` dimensions."""
        return along_rows(self.scale.double() / self.denominator, dim)


@torch.no_grad()
def integer_weight(layer: torch.nn.Module) -> Integers | None:
    """The quantized weight of a layer as integers; None where the weight is float.

    Args:
        layer: ``QuantConv2d`` or ``QuantLinear``; any other has float weights.

    Raises:
        ValueError: powers of two whose denominator exceeds 2^31.
    """
    if not isinstance(layer, AnyQuantized) or layer.weight_quantizer is None:
        return None
    return _integers(layer.weight_quantizer, layer.quantized_weight(), layer.weight_scale())


@torch.no_grad()
def integer_input(layer: AnyQuantized, x: Tensor) -> Integers | None:
    """The quantized input of a layer as integers; None where the layer takes its input as it is.

    Args:
        layer: the layer.
        x: its input.

    Raises:
        ValueError: powers of two whose denominator exceeds 2^31, or thresholds of one a channel.
    """
    quantizer = layer.act_quantizer
    if quantizer is None:
        return None
    if layer.spec.act_per_channel:
        raise ValueError("act_per_channel True: no sum of integers has a scale for each input channel; choose False")
    return _integers(quantizer, layer.quantized_input(x), quantizer.scale(x, layer.act_alpha))


def numerators_of(value: Tensor, scale: Tensor, denominator: int) -> Tensor:
    """The integers n of quantized values s n / d, int64; s 0-d or one a row."""
    return (value.double() / along_rows(scale.double(), value.dim()) * denominator).round().to(torch.int64)


class ShiftTerms(NamedTuple):
    """Integers as signed sums of powers of two, each sum a set of bits.

    Equation: n = Σ over bits k of added 2^k − Σ over bits k of subtracted 2^k = added − subtracted.

    ``added``, ``subtracted`` int64, ≥ 0, the shape of the numbers; no bit is in both.
    """

    added: Tensor
    subtracted: Tensor

    @property
    def powers(self) -> int:
        """Number of powers that occur: every bit is below it."""
        return _bit_length(self.added | self.subtracted)

    @property
    def counts(self) -> Tensor:
        """How many powers of two each number takes, int64: the shifts and adds of one multiplication by it."""
        return _ones(self.added | self.subtracted)


def shift_terms(numerators: Tensor) -> ShiftTerms:
    """The powers of two of each integer, as few as possible.

    The binary digits of |n|, which for an APoT level are the members of the base sets it is the sum of; where the
    non-adjacent form has fewer terms, that: 7 = 8 − 1. A negative n swaps what is added and what is subtracted.

    Args:
        numerators: int64, any shape, |n| below 2^61.

    Paper: APoT, "Additive Powers-of-Two Quantization" (a multiplication as shifts and adds).

    >>> shift_terms(torch.tensor([10, 7, -6])).counts
    tensor([2, 2, 2])
    """
    magnitude = numerators.abs()
    half = magnitude >> 1
    one_and_half = magnitude + half
    changed = half ^ one_and_half  # the digits of the non-adjacent form that are not 0
    plus, minus = one_and_half & changed, half & changed
    fewer = _ones(changed) < _ones(magnitude)
    plus, minus = torch.where(fewer, plus, magnitude), torch.where(fewer, minus, 0)
    negative = numerators < 0
    return ShiftTerms(torch.where(negative, minus, plus), torch.where(negative, plus, minus))


def _ones(numbers: Tensor) -> Tensor:
    ones = torch.zeros_like(numbers)
    for k in range(_bit_length(numbers)):
        ones += (numbers >> k) & 1
    return ones


def _bit_length(numbers: Tensor) -> int:
    return int(numbers.max()).bit_length() if numbers.numel() else 0


def _integers(quantizer: Quantizer, value: Tensor, scale: Tensor | None) -> Integers | None:
    denominator = quantizer.levels.denominator
    if scale is None:
        return None
    if denominator > _MAX_DENOMINATOR:
        raise ValueError(f"levels over {denominator}: integers over at most 2^31 are supported; use fewer bits")
    return Integers(numerators_of(value, scale, denominator), denominator, scale.detach().clone())
