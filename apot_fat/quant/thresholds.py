"""Initial clipping thresholds of a network, from its weights and a batch."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from apot_fat.quant.all_layers import keep_thresholds_positive, threshold_layers
from apot_fat.quant.layers import AnyQuantized
from apot_fat.quant.watching import evaluation_mode, watch_inputs
from apot_fat.text import one_line

ThresholdRule = Literal["mse", "lsq"]


@torch.no_grad()
def initialize_thresholds(model: nn.Module, batch: Tensor, rule: str = "mse") -> nn.Module:
    """Set the thresholds of every quantized layer from its weight and from what reaches it on a batch, in place.

    ``mse``: the threshold of least squared error (``fit_threshold``); ``lsq``: 2 mean |v| √Q_P, which is the step
    2 mean |v| / √Q_P times the number Q_P of levels above 0. v is the normalised (with FAT also transformed) weight, or
    the layer's input. One forward pass: each layer's thresholds are set as it is reached, so that the layers after it
    see its quantized output. Batch norms take the batch's statistics, as in training, and keep their own; dropout is
    off. Parameters keep their identity: call it before or after the optimiser is made, but before the first step. With
    several processes, call it on one and broadcast, or on each with the same batch.

    Args:
        model: any network that holds ``QuantConv2d`` or ``QuantLinear``; its mode and all else stay as they are.
        batch: inputs, as the network takes them, on its device.
        rule: ``mse`` or ``lsq``.

    Returns:
        The model. A layer that the batch does not reach keeps its input's threshold; one whose weight threshold is not
        learned (PACT) keeps that.

    Raises:
        ValueError: an unknown rule, no quantized layer, or a batch that the network refuses; only in the last case may
            some thresholds have been set.

    Paper: LSQ, "Learned Step Size Quantization", section 2.1.
    """
    if rule not in get_args(ThresholdRule):
        raise ValueError(f"threshold rule {rule!r}: choose one of {', '.join(get_args(ThresholdRule))}")
    waiting = {id(layer): layer for _, layer in threshold_layers(model)}
    if not waiting:
        raise ValueError(f"{type(model).__name__} holds no quantized layer: there is no threshold to set")
    for layer in waiting.values():
        if rule == "mse":
            layer.fit_weight_alpha()
        elif layer.weight_alpha is not None and layer.spec.weight_alpha_learned:
            layer.set_weight_alpha_from_step()

    def fit_input(layer: nn.Module, inputs: tuple[Any, ...]) -> None:
        if waiting.pop(id(layer), None) is None:  # called again
            return
        assert isinstance(layer, AnyQuantized)
        quantizer, alpha, x = layer.act_quantizer, layer.act_alpha, inputs[0]
        if quantizer is not None and alpha is not None and isinstance(x, Tensor) and x.numel():
            if rule == "mse":
                alpha.copy_(quantizer.fit(x, per_channel=alpha.dim() > 0))
            else:
                alpha.copy_(quantizer.initial_step(x, per_channel=alpha.dim() > 0))
                keep_thresholds_positive(layer)

    try:
        with _batch_statistics(model), watch_inputs(list(waiting.values()), fit_input):
            model(batch)
    except (RuntimeError, TypeError, ValueError, IndexError) as error:
        raise ValueError(f"batch of shape {tuple(batch.shape)}: the network refuses it ({one_line(error)})") from error
    return model


@contextmanager
def _batch_statistics(model: nn.Module) -> Iterator[None]:
    # batch norms as in training, all else as in evaluation; modes and buffers come back as they were
    buffers = [(buffer, buffer.clone()) for buffer in model.buffers()]
    with evaluation_mode(model):
        for module in model.modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm):
                module.train()
        try:
            yield
        finally:
            for buffer, before in buffers:
                buffer.copy_(before)
