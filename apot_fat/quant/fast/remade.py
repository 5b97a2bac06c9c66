"""Convolution and linear layer of a quantized input that remember the input and its levels, not its quantized copy.

The input is another layer's output and mostly kept for that layer's backward anyway; its quantized copy is not. Made
again in backward from a byte an element (or from the input itself where the levels do not fit into bytes), it costs a
light pass over memory instead of a third more memory in a whole network. Under torch.compile the compiler decides what
to remember, and the layers compose the plain functions.

Legend: x_q the quantized input, w_q the quantized weight, g the upstream gradient.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from apot_fat.quant.fake_quant import activation_backward, activation_forward, scaled
from apot_fat.quant.fast.codes import (
    activation_backward_from_codes,
    activation_forward_with_codes,
    activation_from_codes,
    has_codes,
)
from apot_fat.quant.fast.kernels import pointwise
from apot_fat.quant.quantizer import UnsignedQuantizer


class ConvSettings(NamedTuple):
    """The constants of a convolution that pads with zeros."""

    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]
    groups: int


def conv_settings(layer: nn.Conv2d) -> ConvSettings | None:
    """A layer's, or None where it pads otherwise than with zeros on both sides."""
    if layer.padding_mode != "zeros" or isinstance(layer.padding, str):
        return None
    # a 1 x 1 convolution with a stride reads the values between never: they need no quantizing
    skips = layer.kernel_size == (1, 1) and layer.padding == (0, 0)
    return ConvSettings((1, 1) if skips else layer.stride, layer.padding, layer.dilation, layer.groups)


def quantized_product(
    x: Tensor,
    alpha: Tensor,
    w_q: Tensor,
    bias: Tensor | None,
    act: UnsignedQuantizer,
    grad_scale: float,
    conv: ConvSettings | None,
) -> Tensor:
    """Quantize an input and multiply it with a weight.

    Equation: y = conv(x_q, w_q) + bias, or x_q w_qᵀ + bias without ``conv``; x_q as in ``quantize_activation``.

    Args:
        x: (N, C_in, H, W), or (…, C_in) without ``conv``.
        alpha: activation threshold, 0-d.
        w_q: (C_out, C_in / groups, k_h, k_w), or (C_out, C_in).
        bias: (C_out,) or None.
        act: the quantizer.
        grad_scale: factor on the threshold's gradient.
        conv: the convolution, or None for a linear layer.

    Gradient: that of the plain composition, from x_q made again.
    """
    if torch.is_grad_enabled():
        return _QuantizedProduct.apply(x, alpha, w_q, bias, act, grad_scale, conv)
    (x_q,) = pointwise(activation_forward, (x,), (alpha,), act.levels, act.clip, into=x.dtype)
    return _product(x_q, w_q, bias, conv)


class _QuantizedProduct(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        alpha: Tensor,
        w_q: Tensor,
        bias: Tensor | None,
        act: UnsignedQuantizer,
        grad_scale: float,
        conv: ConvSettings | None,
    ) -> Tensor:
        settings = act.levels, act.clip
        if has_codes(*settings):
            x_q, codes = pointwise(activation_forward_with_codes, (x,), (alpha,), *settings, into=x.dtype)
        else:
            (x_q,), codes = pointwise(activation_forward, (x,), (alpha,), *settings, into=x.dtype), None
        y = _product(x_q, w_q, bias, conv)
        ctx.save_for_backward(x, codes, alpha, w_q)
        ctx.act, ctx.grad_scale, ctx.conv = act, grad_scale, conv
        ctx.bias_type = None if bias is None else bias.dtype
        ctx.product_type = y.dtype  # autocast may have lowered it
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, codes, alpha, w_q = ctx.saved_tensors
        act, conv = ctx.act, ctx.conv
        needs_x, needs_alpha, needs_w, needs_bias = ctx.needs_input_grad[:4]
        if codes is None:
            (x_q,) = pointwise(activation_forward, (x,), (alpha,), act.levels, act.clip, into=x.dtype)
        else:
            (x_q,) = pointwise(activation_from_codes, (codes,), (alpha,), act.levels, x.dtype, into=x.dtype)
        operands = grad, x_q.to(ctx.product_type), w_q.to(ctx.product_type)
        needs = [needs_x or needs_alpha, needs_w, needs_bias]
        grads = _linear_backward(*operands, needs) if conv is None else _conv_backward(*operands, conv, needs)
        grad_x_q, grad_w, grad_bias = grads
        grad_x = grad_alpha = None
        if grad_x_q is not None:
            grad_x_q = grad_x_q.to(x.dtype)  # held by nobody else, so that it can be overwritten
            gradient: tuple[Any, ...] = act.clip, act.alpha_gradient
            if codes is None:
                call = activation_backward, (grad_x_q, x_q, x), (alpha,), *gradient
            else:
                call = activation_backward_from_codes, (grad_x_q, codes, x), (alpha,), act.levels, *gradient
            grad_x, grad_alpha = pointwise(*call, into=grad_x_q)
            grad_alpha = scaled(grad_alpha, ctx.grad_scale)
        grad_w = None if grad_w is None else grad_w.to(w_q.dtype)
        grad_bias = None if grad_bias is None else grad_bias.to(ctx.bias_type)
        return grad_x, grad_alpha, grad_w, grad_bias, None, None, None


def _product(x_q: Tensor, w_q: Tensor, bias: Tensor | None, conv: ConvSettings | None) -> Tensor:
    return F.linear(x_q, w_q, bias) if conv is None else F.conv2d(x_q, w_q, bias, *conv)


def _conv_backward(
    grad: Tensor, x_q: Tensor, w_q: Tensor, conv: ConvSettings, needs: list[bool]
) -> tuple[Tensor | None, ...]:
    stride, padding, dilation, groups = conv
    sizes = [w_q.shape[0]] if needs[2] else None
    return torch.ops.aten.convolution_backward(
        grad, x_q, w_q, sizes, stride, padding, dilation, False, [0, 0], groups, needs
    )


def _linear_backward(grad: Tensor, x_q: Tensor, w_q: Tensor, needs: list[bool]) -> tuple[Tensor | None, ...]:
    rows = grad.flatten(0, -2) if grad.dim() > 1 else grad[None]
    return (
        grad @ w_q if needs[0] else None,
        rows.T @ x_q.reshape(-1, x_q.shape[-1]) if needs[1] else None,
        rows.sum(0) if needs[2] else None,
    )
