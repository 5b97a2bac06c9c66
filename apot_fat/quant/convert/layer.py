"""One layer, or all of a network, turned into quantized ones in place, and back into plain ones."""

from __future__ import annotations

import copy

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from apot_fat.quant.layers import AnyQuantized, QuantConv2d, QuantLinear
from apot_fat.quant.quantizer import PARAMETERS
from apot_fat.quant.spec import QuantSpec


def convert_layer(module: nn.Module, spec: QuantSpec) -> AnyQuantized:
    """Turn one layer into a quantized one, in place: the same module and parameters, another class.

    Args:
        module: a ``Conv2d`` or ``Linear``, or a quantized layer already.
        spec: what it is to do.

    Returns:
        The layer.
    """
    if isinstance(module, AnyQuantized):
        module.spec = spec
        return module
    module.__class__ = QuantConv2d if isinstance(module, nn.Conv2d) else QuantLinear
    assert isinstance(module, AnyQuantized)
    module.add_quantizers(spec, relu=False)
    return module


def leave_fast_paths(model: nn.Module) -> None:
    """Make PyTorch's encoder layers call the quantized layers that they hold, in place.

    They have a path for evaluation without gradients that reads the weights of its linear layers and calls none.
    """
    for encoder in (module for module in model.modules() if isinstance(module, nn.TransformerEncoderLayer)):
        if any(isinstance(part, AnyQuantized) for part in encoder.modules()):
            encoder.activation_relu_or_gelu = 0


def dequantize(model: nn.Module) -> nn.Module:
    """A copy of a network with plain layers that hold the quantized weights; inputs are no longer quantized.

    Args:
        model: any network that holds quantized layers; unchanged.

    Returns:
        The copy, without thresholds and transforms. A layer that takes the ReLU of its input goes on doing so.
    """
    model = copy.deepcopy(model)
    for module in model.modules():
        if isinstance(module, AnyQuantized):
            plain = (_ReluConv2d, _ReluLinear) if module.relu else (nn.Conv2d, nn.Linear)
            fold_weight(module, plain[0] if isinstance(module, nn.Conv2d) else plain[1])
    return model


def fold_weight(module: nn.Module, plain: type[nn.Module]) -> None:
    """Turn one quantized layer into a plain one with the quantized weight as its weight, in place.

    Args:
        module: a ``QuantConv2d`` or ``QuantLinear``.
        plain: ``nn.Conv2d``, ``nn.Linear``, or a class derived from it; the module's class from now on.
    """
    assert isinstance(module, AnyQuantized)
    with torch.no_grad():
        weight = nn.Parameter(module.quantized_weight().detach().clone(), requires_grad=module.weight.requires_grad)
    for name in PARAMETERS:
        module._parameters.pop(name, None)
    for name in ("_relu", "fixed_bits", "_spec", "weight_quantizer", "act_quantizer", "_kept"):
        module.__dict__.pop(name, None)
    module.weight = weight
    module.__class__ = plain  # type: ignore[assignment]


class _ReluConv2d(nn.Conv2d):
    """A convolution of its input's ReLU."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(F.relu(x))


class _ReluLinear(nn.Linear):
    """A linear layer of its input's ReLU."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(F.relu(x))
