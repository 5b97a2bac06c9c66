"""Convolution and linear layer of quantized operands as products of 8-bit integers, for evaluation on a CPU.

A quantized input is α_a a / d_a with a from 0 to 255, a quantized weight α_w n / d_w with n from −128 to 127, so that a
layer's sums are integers times one factor a channel. Processors with instructions for bytes form them faster than
floats and without rounding: they do not depend on the order of adding, on threads or on the batch, and are those of
integer inference. The products are PyTorch's own oneDNN operators.

Older processors (AVX2, AVX-512 without VNNI) add two products in 16 bits, saturating: they are given the levels alone
whose products stay below half of that, such as 10 · 48 of 4-bit APoT. ``largest_product`` tries it out.

Legend: Σ the sum of products, s the factor of a channel.
"""

from __future__ import annotations

import logging
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from apot_fat.quant.fast.codes import activation_codes, has_codes
from apot_fat.quant.fast.kernels import pointwise
from apot_fat.quant.fast.remade import ConvSettings
from apot_fat.quant.integers import numerators_of
from apot_fat.quant.levels import LevelSet
from apot_fat.quant.quantizer import UnsignedQuantizer
from apot_fat.quant.units import threshold_in_use
from apot_fat.text import one_line

_BYTES = (255, 127), (129, 127)  # the largest input and weight there are; and whose product is below 2^14
_MAX_SUM = (1 << 31) - 1  # what the products are added up in

log = logging.getLogger("apot_fat")


class ByteWeight(NamedTuple):
    """A quantized weight as oneDNN reads it.

    ``packed`` its numerators in a layout of the processor's, ``scale`` s = α_w α_a / (d_w d_a) of each output channel,
    (C_out,), ``zero_point`` zeros, (C_out,); ``channels_last`` whether the weight's channels lie innermost.
    """

    packed: Tensor
    scale: Tensor
    zero_point: Tensor
    channels_last: bool


def multiplies_bytes(weights: LevelSet, act: UnsignedQuantizer) -> bool:
    """Whether the levels of a weight and of an input have numerators of 8 bits, which this processor adds."""
    if not has_codes(act.levels, act.clip) or weights.numerators[0] < -128 or weights.numerators[-1] > 127:
        return False
    return max(-weights.numerators[0], weights.numerators[-1]) * act.numerators[-1] <= largest_product()


def pack_weight(
    w_q: Tensor, weight_alpha: Tensor, weights: LevelSet, act_alpha: Tensor, act: LevelSet, conv: ConvSettings | None
) -> ByteWeight | None:
    """A quantized weight and the factor of its sums; None where 32 bits might not hold a sum.

    Args:
        w_q: (C_out, C_in / groups, k_h, k_w), or (C_out, C_in) without ``conv``.
        weight_alpha: threshold, 0-d or (C_out,).
        weights: its levels, see ``multiplies_bytes``.
        act_alpha: the input's threshold, 0-d.
        act: the input's levels.
        conv: the convolution, or None for a linear layer.
    """
    exact = numerators_of(w_q, threshold_in_use(weight_alpha), weights.denominator)
    if exact.numel() and int(exact.abs().flatten(1).sum(1).max()) * act.numerators[-1] > _MAX_SUM:
        return None
    codes = exact.to(torch.int8).contiguous()
    alphas = threshold_in_use(weight_alpha).double() * threshold_in_use(act_alpha).double()
    scales = (alphas / (weights.denominator * act.denominator)).expand(len(w_q)).to(torch.float32).contiguous()
    if conv is None:
        packed = torch.ops.onednn.qlinear_prepack(codes, None)
    else:
        stride, padding, dilation, groups = conv
        packed = torch.ops.onednn.qconv_prepack(codes, scales, 1.0, 0, stride, padding, dilation, groups, None)
    return ByteWeight(
        packed, scales, torch.zeros(len(w_q), dtype=torch.int32), _is_channels_last(w_q) and not w_q.is_contiguous()
    )


def byte_product(
    x: Tensor, alpha: Tensor, weight: ByteWeight, bias: Tensor | None, act: UnsignedQuantizer, conv: ConvSettings | None
) -> Tensor:
    """Quantize an input and multiply its numerators with a weight's.

    Equation: y = s Σ + bias, Σ = conv(a, n) or a nᵀ.

    Args:
        x: float32, (N, C_in, H, W), or (…, C_in) without ``conv``.
        alpha: activation threshold, 0-d.
        weight: from ``pack_weight``.
        bias: (C_out,) or None.
        act: the quantizer.
        conv: the convolution, or None for a linear layer.

    Returns:
        y, float32; of a convolution in the memory format of ``F.conv2d``. Of an image with a NaN, or with a linear
        layer of such a row, all are NaN.

    Gradient: none.
    """
    (codes,) = pointwise(activation_codes, (x,), (alpha,), act.levels, act.clip, into=torch.uint8)
    y = _product(codes, weight, bias, conv)
    # bytes have no NaN; a sum of its own takes a fifth of the time that one takes in the pass before
    if torch.compiler.is_compiling() or x.sum().isnan():
        y = y + _nan_of_each(x, conv)
    return y if conv is None or weight.channels_last or _is_channels_last(x) else y.contiguous()


def _nan_of_each(x: Tensor, conv: ConvSettings | None) -> Tensor:
    # 0, or NaN where there is one, of each image, or each row of a linear layer's input
    return torch.where(x != x, x, 0).sum((-1,) if conv is None else (1, 2, 3), keepdim=True)


def _product(codes: Tensor, weight: ByteWeight, bias: Tensor | None, conv: ConvSettings | None) -> Tensor:
    operands = codes, 1.0, 0, weight.packed, weight.scale, weight.zero_point, bias
    nothing_after: tuple[Any, ...] = 1.0, 0, torch.float32, "none", [], ""
    if conv is None:
        return torch.ops.onednn.qlinear_pointwise(*operands, *nothing_after)
    stride, padding, dilation, groups = conv
    return torch.ops.onednn.qconv2d_pointwise(*operands, stride, padding, dilation, groups, *nothing_after)


def _is_channels_last(x: Tensor) -> bool:
    return x.dim() == 4 and x.shape[1] > 1 and x.stride(1) == 1


@cache
def largest_product() -> int:
    """The largest product of two bytes that this processor sums exactly, however many; 0 if none. Tried, and logged."""
    capabilities: dict[str, Any] = getattr(torch.cpu, "get_capabilities", dict)()
    if not capabilities.get("avx2"):  # a product in plain C++ is slower than one of floats
        return 0
    try:
        found = next((a * n for a, n in _BYTES if _sums_are_exact(a, n)), 0)
    except Exception as error:
        log.info("quantized layers multiply floats in evaluation: no 8-bit products (%s)", one_line(error)[:200])
        return 0
    if found:
        log.info("quantized layers multiply 8-bit integers in evaluation on cpu, up to products of %d", found)
    return found


def _sums_are_exact(largest_input: int, largest_weight: int) -> bool:
    # more of these products than 16 bits hold
    ones, levels = torch.ones(()), LevelSet((0, largest_input), largest_input)
    act = UnsignedQuantizer(levels, -1, "both", "full")
    with torch.no_grad():
        for conv in (None, ConvSettings((1, 1), (0, 0), (1, 1), 1)):
            shape = (3, 64) if conv is None else (3, 64, 1, 1)
            w_q, x = torch.full(shape, -1.0), torch.ones(2, *shape[1:])
            packed = pack_weight(w_q, ones, LevelSet((0, largest_weight), largest_weight), ones, levels, conv)
            if packed is None or (byte_product(x, ones, packed, None, act, conv) + 64).abs().max() > 1e-4:
                return False
    return True
