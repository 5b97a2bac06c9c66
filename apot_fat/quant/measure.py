"""The numbers of a network's layers: where weights and inputs lie, on which levels they land, and what that costs.

Everything is counted and summed in float64, from the layer's own operands. Shape suffixes: ``_OK`` (C_out, K) with
K = C_in · k_h · k_w, ``_OF`` (C_out, K // 2 + 1).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from apot_fat.quant.frequency import frequency_transform
from apot_fat.quant.integers import integer_weight
from apot_fat.quant.layers import AnyQuantized
from apot_fat.quant.quantizer import Quantizer
from apot_fat.quant.units import along_rows, threshold_in_use
from apot_fat.quant.watching import evaluation_mode, watch_inputs

BINS = 80
MOST_BANDS = 96
MOST_IMAGES = 16
"""Images that inputs are measured on: with what is counted of them those of MobileNetV2's largest layer take 66 MB an
image."""


@dataclass(frozen=True)
class Histogram:
    """Counts in equal bins: the i-th holds low + i · step ≤ v < low + (i + 1) · step, in the values' unit."""

    low: float
    step: float
    counts: tuple[int, ...]


@dataclass(frozen=True)
class Distribution:
    """Values before a quantizer, and what it makes of them.

    Args:
        count: how many values.
        zeros: share of values that are 0 before the quantizer, 0 to 1.
        histogram: of the values before the quantizer that are not 0.
        clipped: share of values beyond the clipping threshold, 0 to 1; None where there is none.
        sqnr: signal-to-quantization-noise ratio, dB (``signal_to_noise``).
        levels: the values the quantizer can give, rising, in the values' unit; empty where the values stay float.
        shares: of each level, the share of values that land on it, 0 to 1.
    """

    count: int
    zeros: float
    histogram: Histogram
    clipped: float | None
    sqnr: float | None
    levels: tuple[float, ...]
    shares: tuple[float, ...]


@dataclass(frozen=True)
class Spectrum:
    """FAT's view of a weight: the mean over output channels of |F| before and after the mask, and the mask.

    Args:
        frequency: middle of each band, cycles a weight, 0 to 0.5. Neighbouring frequencies share a band where there are
            more than ``MOST_BANDS``.
        before, after: mean magnitude of the normalised weight's spectrum, before and after the mask.
        mask_mean, mask_min, mask_max: of the mask over channels and the frequencies of the band, 0 to 1.
    """

    frequency: tuple[float, ...]
    before: tuple[float, ...]
    after: tuple[float, ...]
    mask_mean: tuple[float, ...]
    mask_min: tuple[float, ...]
    mask_max: tuple[float, ...]


@dataclass(frozen=True)
class LayerMeasure:
    """A convolution or linear layer.

    Args:
        name: as in ``named_modules``.
        weight_alpha, act_alpha: clipping thresholds as used, of one a channel the mean; None where a side has none.
        weight: the weight just before projection (normalised, with FAT transformed), and its levels.
        input: the input, after the ReLU the layer does itself; None without images.
        spectrum: with FAT, else None.
    """

    name: str
    weight_alpha: float | None
    act_alpha: float | None
    weight: Distribution
    input: Distribution | None = None
    spectrum: Spectrum | None = None


def weight_layers(model: nn.Module) -> Iterator[tuple[str, nn.Conv2d | nn.Linear]]:
    """Name and module of every convolution and linear layer, quantized or not, in the order of definition."""
    for name, module in model.named_modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            yield name, module


@torch.no_grad()
def measure_layers(
    model: nn.Module, images: Tensor | None = None, progress: Callable[[str], None] = lambda name: None
) -> list[LayerMeasure]:
    """Measure every convolution and linear layer.

    Args:
        model: any network; left in evaluation mode.
        images: a normalised batch (N, C, H, W), on the model's device, of which the first ``MOST_IMAGES`` count; or
            None: then inputs are not measured. Of a layer that runs more than once the first input counts.
        progress: told of each layer as it is done.
    """
    model.eval()
    inputs = {} if images is None else measure_inputs(model, images)
    measures = []
    for name, layer in weight_layers(model):
        alphas = (_number(getattr(layer, "weight_alpha", None)), _number(getattr(layer, "act_alpha", None)))
        measures.append(LayerMeasure(name, *alphas, measure_weight(layer), inputs.get(name), measure_spectrum(layer)))
        progress(name)
    return measures


@torch.no_grad()
def measure_weight(layer: nn.Conv2d | nn.Linear) -> Distribution:
    """The weight of a layer before projection and the levels it lands on; with a threshold a channel in its unit."""
    if isinstance(layer, AnyQuantized) and layer.weight_alpha is not None and layer.weight_quantizer is not None:
        w, q = layer.transformed_weight(), layer.quantized_weight()
        return _in_levels(layer.weight_quantizer, w, q, layer.weight_alpha)
    integers = integer_weight(layer)
    if integers is None:
        return distribution(layer.weight, layer.weight)
    low, high = int(integers.numerators.min()), int(integers.numerators.max())
    step = float(integers.unit(0))
    return distribution(layer.weight, layer.quantized_weight(), [n * step for n in range(low, high + 1)])  # type: ignore[operator]


def _in_levels(quantizer: Quantizer, value: Tensor, quantized: Tensor, alpha: Tensor) -> Distribution:
    """What a quantizer makes of values; of one threshold a channel in its units."""
    unit, alphas = 1.0, threshold_in_use(alpha).double()
    v, q = value, quantized
    if alphas.dim():
        v, q = (quantizer.rows(x).double() / along_rows(alphas, x.dim()) for x in (value, quantized))
    else:
        unit = float(alphas)
    denominator, numerators = quantizer.levels.denominator, quantizer.numerators
    if quantizer.goes_on_below:
        numerators = (*range(round(min(float(q.min()), 0.0) / unit * denominator), 0), *numerators)
    levels = [n / denominator * unit for n in numerators]
    found = distribution(v, q, levels, (levels[0] if quantizer.is_signed else -math.inf, unit))
    return replace(found, sqnr=signal_to_noise(value, quantized)) if alphas.dim() else found


@torch.no_grad()
def measure_input(layer: nn.Conv2d | nn.Linear, x: Tensor) -> Distribution:
    """The input of a layer, after the ReLU it does itself, and the levels it lands on."""
    if not isinstance(layer, AnyQuantized) or layer.act_alpha is None or layer.act_quantizer is None:
        value = F.relu(x) if getattr(layer, "relu", False) else x
        return distribution(value, value)
    return _in_levels(layer.act_quantizer, layer.act_quantizer.taken(x), layer.quantized_input(x), layer.act_alpha)


def distribution(
    value: Tensor, quantized: Tensor, levels: list[float] | None = None, bounds: tuple[float, float] | None = None
) -> Distribution:
    """What a quantizer makes of values.

    Args:
        value, quantized: before and after, one shape.
        levels: what it can give, rising; None where the values stay float.
        bounds: values outside are clipped; None where nothing is.
    """
    v, q = value.detach().double().flatten(), quantized.detach().double().flatten()
    shares: tuple[float, ...] = ()
    if levels:
        midpoints = q.new_tensor([(a + b) / 2 for a, b in pairwise(levels)])
        counts = torch.bucketize(q, midpoints).bincount(minlength=len(levels))
        shares = tuple((counts.double() / max(len(q), 1)).tolist())
    outside = None if bounds is None else (v < bounds[0]) | (v > bounds[1])
    return Distribution(
        count=len(v),
        zeros=float((v == 0).double().mean()),
        histogram=_histogram(v[v != 0], [bound for bound in bounds or () if math.isfinite(bound)]),
        clipped=None if outside is None else float(outside.double().mean()),
        sqnr=signal_to_noise(v, q),
        levels=tuple(levels or ()),
        shares=shares,
    )


def signal_to_noise(value: Tensor, quantized: Tensor) -> float | None:
    """10 log10(Σ v² / Σ (v − q)²), dB; None without noise or signal."""
    v, q = value.detach().double(), quantized.detach().double()
    noise, signal = float((v - q).square().sum()), float(v.square().sum())
    return 10 * math.log10(signal / noise) if noise and signal else None


@torch.no_grad()
def measure_spectrum(layer: nn.Module) -> Spectrum | None:
    """The spectrum of a layer's weight before and after FAT's mask, and the mask; None without a transform."""
    if not isinstance(layer, AnyQuantized) or layer.transform is None:
        return None
    w = layer.weight_to_transform()
    mask_OF = frequency_transform(w, layer.transform)[1].double().cpu()  # hundreds of numbers are read of it
    w_OK = w.reshape(w.shape[0], -1).double().cpu()
    magnitude_OF = torch.fft.rfft(w_OK).abs()
    frequencies = torch.arange(mask_OF.shape[1], dtype=torch.float64) / w_OK.shape[1]
    bands = [band for band in torch.arange(mask_OF.shape[1]).tensor_split(MOST_BANDS) if len(band)]

    def by_band(of: Callable[[Tensor], Any]) -> tuple[float, ...]:
        return tuple(float(of(band)) for band in bands)

    return Spectrum(
        frequency=by_band(lambda band: frequencies[band].mean()),
        before=by_band(lambda band: magnitude_OF[:, band].mean()),
        after=by_band(lambda band: (magnitude_OF * mask_OF)[:, band].mean()),
        mask_mean=by_band(lambda band: mask_OF[:, band].mean()),
        mask_min=by_band(lambda band: mask_OF[:, band].min()),
        mask_max=by_band(lambda band: mask_OF[:, band].max()),
    )


@torch.no_grad()
def measure_inputs(model: nn.Module, images: Tensor) -> dict[str, Distribution]:
    """The input of every convolution and linear layer by name; of one that runs more than once the first.

    Args:
        model: any network; measured in evaluation mode, and left in its own.
        images: a normalised batch (N, C, H, W), on the model's device; the first ``MOST_IMAGES`` are measured.
    """
    measured: dict[str, Distribution] = {}
    names = {layer: name for name, layer in weight_layers(model)}

    def measure(layer: nn.Conv2d | nn.Linear, inputs: tuple[Tensor, ...]) -> None:
        if names[layer] not in measured:
            measured[names[layer]] = measure_input(layer, inputs[0])

    with evaluation_mode(model), watch_inputs(names, measure):
        model(images[:MOST_IMAGES])
    return measured


def _histogram(v: Tensor, reach: list[float]) -> Histogram:
    ends = torch.cat([v, v.new_tensor(reach)])
    if not len(ends):
        return Histogram(0.0, 1.0, ())
    low, high = (float(end) for end in ends.aminmax())
    if high <= low:
        low, high = low - 0.5, high + 0.5
    step = float(f"{(high - low) / BINS:.3g}")  # round edges: a page names them
    first = math.floor(low / step)
    bins = torch.floor(v / step).long() - first
    counts = bins.bincount(minlength=math.floor(high / step) - first + 1)
    return Histogram(first * step, step, tuple(counts.tolist()))


def _number(alpha: Any) -> float | None:
    return None if alpha is None else float(threshold_in_use(alpha.detach()).mean())
