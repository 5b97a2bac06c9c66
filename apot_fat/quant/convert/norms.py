"""Batch norms of a network whose layers were quantized: statistics of other values reach them than before."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from apot_fat.quant.convert.batches import run_batch
from apot_fat.quant.watching import evaluation_mode, watch_inputs

BatchNorm = nn.modules.batchnorm._BatchNorm
_FEWEST_VALUES = 16  # of a channel, for statistics


def batch_norms(model: nn.Module) -> list[BatchNorm]:
    """Those that use statistics in evaluation."""
    norms = [module for module in model.modules() if isinstance(module, BatchNorm)]
    return [norm for norm in norms if norm.running_mean is not None]


class Statistics(NamedTuple):
    """Of each channel of what reaches a batch norm; float32, (C,).

    Args:
        size: values of a channel.
    """

    size: int
    mean: Tensor
    variance: Tensor

    def pooled(self, other: Statistics) -> Statistics:
        """Those of both together."""
        size = self.size + other.size
        moved, share = other.mean - self.mean, other.size / size
        variance = self.variance + (other.variance - self.variance) * share + moved.square() * (share * (1 - share))
        return Statistics(size, self.mean + moved * share, variance)


def channel_statistics(x: Tensor) -> Statistics:
    """Those of each channel, dimension 1."""
    values_CN = x.detach().float().transpose(0, 1).flatten(1)
    return Statistics(values_CN.shape[1], values_CN.mean(1), values_CN.var(1, correction=0))


@torch.no_grad()
def move_batch_norms(model: nn.Module, before: Sequence[Mapping[nn.Module, Statistics]], batches: list[Any]) -> None:
    """Move the statistics of batch norms by as much as quantization moved what reaches them, in place.

    Equation: running_mean ← running_mean + m_q − m, running_var ← running_var · v_q / v of each channel over the
    batches. In one pass: each norm is moved as it is reached, by the batches so far, so that what follows sees it
    moved. A norm that sees too few values for statistics stays.

    Args:
        model: the converted network.
        before: m and v of the float network on each of the first batches.
        batches: the batches.
    """
    start: dict[nn.Module, tuple[Tensor, Tensor]] = {}
    seen: dict[nn.Module, tuple[Statistics, Statistics]] = {}  # in the float network, and here

    def move(norm: nn.Module, inputs: tuple[Any, ...]) -> None:
        if norm not in waiting:
            return
        assert isinstance(norm.running_mean, Tensor)
        assert isinstance(norm.running_var, Tensor)
        exact, quantized = waiting.pop(norm), channel_statistics(inputs[0])
        if norm in seen:
            exact, quantized = seen[norm][0].pooled(exact), seen[norm][1].pooled(quantized)
        seen[norm] = exact, quantized
        mean, variance = start.setdefault(norm, (norm.running_mean.clone(), norm.running_var.clone()))
        if exact.size >= _FEWEST_VALUES:
            v, v_q = exact.variance, quantized.variance
            norm.running_mean.copy_(mean + (quantized.mean - exact.mean))
            norm.running_var.copy_(variance * torch.where((v > 0) & (v_q > 0), v_q / v, 1))

    with evaluation_mode(model), watch_inputs({norm for norms in before for norm in norms}, move):
        for norms, batch in zip(before, batches, strict=False):
            waiting = dict(norms)
            run_batch(model, batch)


@torch.no_grad()
def align_batch_norms(model: nn.Module, reference: nn.Module, parts: list[Any]) -> list[BatchNorm]:
    """Give batch norms the calibration inputs' statistics, and γ and β the difference, in place.

    Equation: with m and v the mean and variance of what reaches the norm in the reference, μ and σ² the statistics that
    it has: γ ← γ √((v + ε) / (σ² + ε)), β ← β + γ (m − μ) / √(σ² + ε). A norm on (m, v) then gives what it gave on
    (μ, σ²).

    Returns:
        The norms: those with γ and β that see enough values for statistics in each of the parts. Others stay.
    """
    names = {name: module for name, module in reference.named_modules() if isinstance(module, BatchNorm)}
    sums: dict[nn.Module, Tensor] = {}
    fewest: dict[nn.Module, int] = {}

    def add(norm: nn.Module, inputs: tuple[Any, ...]) -> None:
        values_CN = inputs[0].transpose(0, 1).flatten(1).double()
        count = values_CN.new_full((len(values_CN),), values_CN.shape[1])
        sums[norm] = sums.get(norm, 0) + torch.stack([count, values_CN.sum(1), values_CN.square().sum(1)])
        fewest[norm] = min(fewest.get(norm, values_CN.shape[1]), values_CN.shape[1])

    with watch_inputs(names.values(), add):
        for part in parts:
            run_batch(reference, part)
    aligned = []
    for name, norm in names.items():
        own = model.get_submodule(name)
        assert isinstance(own, BatchNorm)
        if fewest.get(norm, 0) < _FEWEST_VALUES or norm.running_mean is None or norm.running_var is None:
            continue
        if not norm.affine or own.running_mean is None:
            continue
        count, total, squares = sums[norm]
        mean = total / count
        variance = (squares / count - mean.square()).clamp(min=0)
        deviation = (norm.running_var.double() + norm.eps).sqrt()
        own.bias.add_(norm.weight * ((mean - norm.running_mean) / deviation).to(own.bias.dtype))
        own.weight.mul_(((variance + norm.eps).sqrt() / deviation).to(own.weight.dtype))
        aligned.append(own)
    return aligned


@torch.no_grad()
def estimate_batch_norms(norms: list[BatchNorm], run: Callable[[int], Any], parts: int) -> None:
    """Give batch norms the mean statistics of what ``run`` does with each part; they end in evaluation mode."""
    before = [norm.momentum for norm in norms]
    for norm in norms:
        norm.reset_running_stats()
        norm.train()
    for place in range(parts):
        for norm in norms:  # None would mean the same, and every norm wait for the device to count
            norm.momentum = 1 / (place + 1)
        run(place)
    for norm, momentum in zip(norms, before, strict=True):
        norm.momentum = momentum
        norm.eval()
