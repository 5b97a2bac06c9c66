"""Initial clipping thresholds from data: of one tensor, or of a whole network on a batch."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from apot_fat.quant.fake_quant import quantize_weight
from apot_fat.quant.layers import QuantConv2d, QuantLinear, quant_layers
from apot_fat.quant.levels import LevelSet
from apot_fat.text import one_line

ThresholdRule = Literal["mse"]

FIT_SAMPLES = 1 << 16
"""Values that a threshold is fitted to."""
_FIT_STEPS = 100


@torch.no_grad()
def initialize_thresholds(model: nn.Module, batch: Tensor, rule: str = "mse") -> nn.Module:
    """Set the thresholds of every quantized layer from its weight and from what reaches it on a batch, in place.

    ``mse``: the threshold of least squared error (``fit_threshold``), of the normalised (with FAT also transformed)
    weight and of the layer's input. One forward pass: each layer's thresholds are set as it is reached, so that the
    layers after it see its quantized output. Batch norms take the batch's statistics, as in training, and keep their
    own; dropout is off. Parameters keep their identity: call it before or after the optimiser is made, but before the
    first step. With several processes, call it on one and broadcast, or on each with the same batch.

    Args:
        model: any network that holds ``QuantConv2d`` or ``QuantLinear``; its mode and all else stay as they are.
        batch: inputs, as the network takes them, on its device.
        rule: ``mse``.

    Returns:
        The model. A layer that the batch does not reach keeps its input's threshold.

    Raises:
        ValueError: an unknown rule, no quantized layer, or a batch that the network refuses; only in the last case may
            some thresholds have been set.
    """
    if rule not in get_args(ThresholdRule):
        raise ValueError(f"threshold rule {rule!r}: choose one of {', '.join(get_args(ThresholdRule))}")
    waiting = {id(layer): layer for _, layer in quant_layers(model)}
    if not waiting:
        raise ValueError(f"{type(model).__name__} holds no quantized layer: there is no threshold to set")
    for layer in waiting.values():
        if layer.weight_alpha is not None:
            layer.weight_alpha.fill_(fit_threshold(layer.transformed_weight(), layer.spec.weight_set, signed=True))

    def fit_input(layer: nn.Module, inputs: tuple[Any, ...]) -> None:
        if waiting.pop(id(layer), None) is None:  # called again
            return
        assert isinstance(layer, QuantConv2d | QuantLinear)
        if layer.act_alpha is not None and isinstance(inputs[0], Tensor) and inputs[0].numel():
            x = F.relu(inputs[0]) if layer.relu else inputs[0]
            layer.act_alpha.fill_(fit_threshold(x, layer.spec.act_set, signed=layer.spec.act_signed))

    handles = [layer.register_forward_pre_hook(fit_input) for layer in waiting.values()]
    try:
        with _batch_statistics(model):
            model(batch)
    except (RuntimeError, TypeError, ValueError, IndexError) as error:
        raise ValueError(f"batch of shape {tuple(batch.shape)}: the network refuses it ({one_line(error)})") from error
    finally:
        for handle in handles:
            handle.remove()
    return model


def fit_threshold(values: Tensor, levels: LevelSet, *, signed: bool) -> float:
    """The clipping threshold of least squared error.

    Equation: argmin over α of Σ (v − v_q(α))², α on a grid of 100 steps up to max |v|; about 65,000 evenly taken values
    stand for more.

    Args:
        values: any shape, not empty.
        levels: the level set.
        signed: whether levels stand for magnitudes; otherwise a negative value goes to 0.

    Returns:
        α, same unit as the values; 1 where no value is positive (or, signed, not zero).
    """
    values = values.detach().flatten()
    values = values[:: max(1, values.numel() // FIT_SAMPLES)].float()
    if not signed:
        values = values.clamp(min=0)
    largest = values.abs().max()
    if not largest > 0 or not torch.isfinite(largest):
        return 1.0
    candidates = largest * torch.linspace(1 / _FIT_STEPS, 1, _FIT_STEPS, device=values.device)
    errors = [(quantize_weight(values, a, levels, clip_gradient=True) - values).square().sum() for a in candidates]
    return candidates[int(torch.stack(errors).argmin())].item()


@contextmanager
def _batch_statistics(model: nn.Module) -> Iterator[None]:
    # batch norms as in training, all else as in evaluation; modes and buffers come back as they were
    modes = {module: module.training for module in model.modules()}
    buffers = [(buffer, buffer.clone()) for buffer in model.buffers()]
    model.eval()
    for module in modes:
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.train()
    try:
        yield
    finally:
        for module, training in modes.items():
            module.training = training
        for buffer, before in buffers:
            buffer.copy_(before)
