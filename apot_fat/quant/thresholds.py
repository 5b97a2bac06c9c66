"""Initial clipping thresholds from data: of one tensor, or of a whole network on a batch."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from apot_fat.quant.all_layers import keep_thresholds_positive, threshold_layers
from apot_fat.quant.fake_quant import quantize_weight
from apot_fat.quant.layers import AnyQuantized, initial_step_threshold
from apot_fat.quant.levels import LevelSet
from apot_fat.quant.sampling import sample, sample_columns
from apot_fat.quant.watching import evaluation_mode, watch_inputs
from apot_fat.text import one_line

ThresholdRule = Literal["mse", "lsq"]

FIT_SAMPLES = 1 << 16
"""Values that a threshold is fitted to."""
_FIT_CHANNEL_SAMPLES = 1 << 10
_FIT_RANGE, _FIT_STEPS, _FINE_STEPS = (0.01, 4.0), 100, 21


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
            fit_weight_threshold(layer)
        elif layer.weight_alpha is not None and layer.spec.weight_alpha_learned:
            layer.set_weight_alpha_from_step()

    def fit_input(layer: nn.Module, inputs: tuple[Any, ...]) -> None:
        if waiting.pop(id(layer), None) is None:  # called again
            return
        assert isinstance(layer, AnyQuantized)
        if layer.act_alpha is not None and isinstance(inputs[0], Tensor) and inputs[0].numel():
            x = F.relu(inputs[0]) if layer.relu else inputs[0]
            if rule == "mse":
                layer.act_alpha.fill_(fit_threshold(x, layer.spec.act_set, signed=layer.spec.act_signed))
            else:
                layer.act_alpha.copy_(initial_step_threshold(x.abs().mean(), layer.spec.act_set))
                keep_thresholds_positive(layer)

    try:
        with _batch_statistics(model), watch_inputs(list(waiting.values()), fit_input):
            model(batch)
    except (RuntimeError, TypeError, ValueError, IndexError) as error:
        raise ValueError(f"batch of shape {tuple(batch.shape)}: the network refuses it ({one_line(error)})") from error
    return model


def fit_threshold(values: Tensor, levels: LevelSet, *, signed: bool) -> float:
    """The clipping threshold of least squared error.

    Equation: argmin over α of Σ (v − v_q(α))², α / max |v| on a geometric grid of 100 from 1/100 to 4 (levels of powers
    of two lie densest near 0, so that it may pay to leave the upper ones unused), then on 21 around the best of them;
    about 65,000 values taken at random stand for more.

    Args:
        values: any shape, not empty.
        levels: the level set.
        signed: whether levels stand for magnitudes; otherwise a negative value goes to 0.

    Returns:
        α, same unit as the values; 1 where no value is positive (or, signed, not zero).
    """
    values = sample(values, FIT_SAMPLES).float()
    return _fit_rows((values if signed else values.clamp(min=0))[None], levels).item()


@torch.no_grad()
def fit_weight_threshold(layer: AnyQuantized) -> None:
    """Set a layer's weight thresholds, of the layer or of each channel, to those of least squared error, in place.

    A layer without one, or whose threshold is not learned, is left as it is. About 1,000 values taken at random stand
    for a channel's.
    """
    if layer.weight_alpha is None or not layer.spec.weight_alpha_learned:
        return
    w, levels = layer.transformed_weight(), layer.spec.weight_set
    if not layer.weight_alpha.dim():
        layer.weight_alpha.fill_(fit_threshold(w, levels, signed=True))
        return
    layer.weight_alpha.copy_(_fit_rows(sample_columns(w.flatten(1), _FIT_CHANNEL_SAMPLES).float(), levels))


def _fit_rows(values_CK: Tensor, levels: LevelSet) -> Tensor:
    # the threshold of each row, (C,)
    largest_C = values_CK.abs().amax(1)
    coarse_S = torch.logspace(math.log10(_FIT_RANGE[0]), math.log10(_FIT_RANGE[1]), _FIT_STEPS, device=values_CK.device)
    best_C = _best_of(values_CK, coarse_S[:, None] * largest_C, levels)
    step = math.log10(_FIT_RANGE[1] / _FIT_RANGE[0]) / (_FIT_STEPS - 1)
    best_C = _best_of(
        values_CK, torch.logspace(-step, step, _FINE_STEPS, device=values_CK.device)[:, None] * best_C, levels
    )
    return torch.where((largest_C > 0) & largest_C.isfinite(), best_C, 1.0)


def _best_of(values_CK: Tensor, candidates_SC: Tensor, levels: LevelSet) -> Tensor:
    errors = [
        (quantize_weight(values_CK, alpha_C, levels, clip_gradient=True) - values_CK).square().sum(1)
        for alpha_C in candidates_SC
    ]
    return candidates_SC.gather(0, torch.stack(errors).argmin(0, keepdim=True))[0]


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
