"""From a network of quantized layers to its integer program.

The network is traced, and each of its tensors followed as an affine function of an integer tensor (``Value``). Batch
norm, ReLU and max pooling thus compute nothing until somebody reads the result: a quantizer, as thresholds; an
addition, a pooling of means or a layer of float inputs, as multiples of a step.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import replace
from numbers import Integral
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from apot_fat.integer import tracing
from apot_fat.integer.checking import LOGITS, check_program
from apot_fat.integer.pixels import to_pixels
from apot_fat.integer.program import BATCH, PIXELS, Convolution, Flatten, IntegerProgram, count_windows
from apot_fat.integer.values import Array, Builder, Value, grid_step
from apot_fat.quant.integers import integer_input, integer_weight, shift_terms
from apot_fat.quant.layers import AnyQuantized
from apot_fat.quant.quantizer import Quantizer
from apot_fat.quant.tracing import trace
from apot_fat.quant.units import threshold_in_use

FEWEST_GRID_BITS, MOST_GRID_BITS = 8, 26
FINE_LOGIT_BITS = 15
FEWEST_ACCUMULATOR_BITS, MOST_ACCUMULATOR_BITS = 16, 31


def integer_program(
    model: nn.Module,
    calibration: Tensor,
    *,
    mean: Sequence[float],
    std: Sequence[float],
    grid_bits: int = 24,
    accumulator_bits: int = 31,
) -> IntegerProgram:
    """A network as integer operations, from 8-bit pixels to logits.

    Convolutions and linear layers are sums of products of the levels' numerators; what follows one, up to the next
    layer's quantizer, is an exact table of thresholds a channel. What is added lies on one grid, whose step is a power
    of two and whose ends hold twice what the calibration reached; what is beyond is held to them. The first layer reads
    a table of what pixels stand for. It, other layers of float inputs (8-bit weights) and poolings read as many bits as
    the grid has or their sums leave. Before it is returned, the program is compared with the network on eight of the
    calibration's images at most (``check_program``).

    Args:
        model: network of quantized layers that ``torch.fx`` can trace; left as it is.
        calibration: normalised images (N, C, H, W), such as the network is given; for ranges and the comparison.
        mean, std: what they were normalised with, a number a channel in units of 255: (pixel / 255 − mean) / std.
        grid_bits: bits of the grid beside the sign, 8 to 26. With 24 the rounding is about float32's; 15 halve the
            memory of skip connections, and turn more codes that lie near a threshold.
        accumulator_bits: bits of sums and logits beside the sign, 16 to 31: 31 for int32, 24 for what carries integers
            as float32. Layers of float inputs and poolings read fewer bits where they are fewer.

    Returns:
        The program; its ``reached`` are those of the calibration.

    Raises:
        ValueError: an operation or a layer that has no integer form here, naming it; sums that may leave the
            accumulator; calibration images that mean and std do not turn into pixels or that the network refuses;
            logits that are off by more than roundings explain, a fault of this package.

    Paper: APoT, "Additive Powers-of-Two Quantization" (multiplication as shifts and adds).
    """
    _check_bits("grid_bits", grid_bits, FEWEST_GRID_BITS, MOST_GRID_BITS)
    _check_bits("accumulator_bits", accumulator_bits, FEWEST_ACCUMULATOR_BITS, MOST_ACCUMULATOR_BITS)
    if not isinstance(model, nn.Module) or not isinstance(calibration, Tensor):
        kinds = f"{type(model).__name__}, {type(calibration).__name__}"
        raise ValueError(f"integer_program({kinds}): expected a network, and images as one tensor (N, C, H, W)")
    network = copy.deepcopy(model).cpu().float().eval().requires_grad_(False)
    images = calibration.detach().to("cpu", torch.float32, copy=True)  # a first operation may work in place
    if images.dim() != 4 or not images.numel():
        raise ValueError(f"calibration {tuple(images.shape)}: expected at least one image, (N, C, H, W)")
    pixels = to_pixels(images, mean, std)
    means, stds = np.asarray(mean, np.float64), np.asarray(std, np.float64)
    normalization = 1 / (255 * stds), -means / stds
    with torch.no_grad():
        traced = trace(network)
        seen = tracing.look_at(traced, images)
        builder = Builder(tuple(pixels.shape[1:]), grid_bits, accumulator_bits)
        lowering = _Lowering(traced, seen, builder, normalization)
        operations, scale = lowering.run()
        program = IntegerProgram(operations, tuple(pixels.shape[1:]), scale)
        as_pixels = torch.from_numpy(pixels * normalization[0][:, None, None] + normalization[1][:, None, None]).float()
        check_program(program, traced, builder.steps, as_pixels, pixels)
    return replace(program, reached=_reached(program, pixels))


def _check_bits(name: str, bits: int, fewest: int, most: int) -> None:
    if not isinstance(bits, Integral) or not fewest <= bits <= most:
        raise ValueError(f"{name} {bits!r}: choose {fewest} to {most}, a whole number")


def _reached(program: IntegerProgram, pixels: Array) -> tuple[tuple[int, int], ...]:
    found = [
        [(int(result.min()), int(result.max())) for result in program.results(pixels[start : start + BATCH])]
        for start in range(0, len(pixels), BATCH)
    ]
    return tuple((min(low for low, _ in one), max(high for _, high in one)) for one in zip(*found, strict=True))


class _Lowering:
    def __init__(
        self,
        traced: fx.GraphModule,
        seen: dict[fx.Node, tracing.Seen],
        builder: Builder,
        normalization: tuple[Array, Array],
    ) -> None:
        self.traced, self.seen = traced, seen
        self.builder = builder
        self.pixels = Value(PIXELS, builder.input_shape, *normalization)
        added = [node for node in traced.graph.nodes if tracing.is_addition(node)]
        read = [node for node in (*added, *(arg for node in added for arg in node.args)) if node in seen]
        largest = max((max(-seen[node].smallest, seen[node].largest) for node in read), default=0.0)
        self.sum_step = grid_step(2 * largest, builder.grid_bits)
        self.values: dict[fx.Node, Value] = {}

    def run(self) -> tuple[tuple[Any, ...], float]:
        """The operations, and the scale of the logits."""
        for node in self.traced.graph.nodes:
            if node.op == "placeholder":
                if self.values:
                    raise ValueError(f"input {node.target}: a network of one input, images, is supported")
                value = self.pixels
            elif node.op == "output":
                return self._output(node)
            elif node.op == "get_attr":
                continue  # whoever reads it is told
            else:
                value = self._lower(node)
            smallest, largest, shape = self.seen[node]
            if (*shape[1:], 1, 1)[:3] != value.shape or len(shape) not in (2, 4):
                raise ValueError(
                    f"layer {tracing.layer_name(node)}: gives {shape}; integer programs keep to (N, C, H, W) or (N, C)"
                )
            self.values[node] = replace(value, smallest=smallest, largest=largest)
        raise AssertionError("a traced network has an output")

    def _output(self, node: fx.Node) -> tuple[tuple[Any, ...], float]:
        (read,) = node.args
        if not isinstance(read, fx.Node) or read not in self.values:
            raise ValueError("the network gives more than one tensor: integer programs give logits alone")
        value = self.values[read]
        if value.shape[1:] != (1, 1):
            raise ValueError(f"the network gives {value.shape}: integer programs give logits, (N, classes)")
        bits = self.builder.accumulator_bits - 1
        logits = self.builder.on_grid(LOGITS, value, _logit_step(value, bits), bits)
        if logits.source != len(self.builder.operations) - 1:
            raise ValueError("the network gives a tensor that it computes with further: end it with its logits")
        return tuple(self.builder.operations), float(logits.gain)

    def _lower(self, node: fx.Node) -> Value:
        name, called = tracing.layer_name(node), self._called(node)
        if tracing.is_in_place(node, called) and any(len(read.users) > 1 for read in node.all_input_nodes[:1]):
            raise ValueError(f"layer {name}: changes in place what others read; use the form that gives a new tensor")
        if tracing.is_addition(node):
            return self._add(name, node)
        value = self._read(name, node)
        if isinstance(called, AnyQuantized):
            return self._layer(name, called, value)
        if isinstance(called, nn.BatchNorm1d | nn.BatchNorm2d):
            return self._batch_norm(name, called, value)
        if (
            isinstance(called, nn.Identity | nn.Dropout | nn.Dropout2d)
            or called == "contiguous"
            or tracing.drops_nothing(node)
        ):
            return value
        if tracing.is_relu(called):
            return self._clip(value, 0.0, np.inf)
        if isinstance(called, nn.ReLU6) or called is F.relu6:
            return self._clip(value, 0.0, 6.0)
        if isinstance(called, nn.MaxPool2d):
            return self._max_pool(name, called, value)
        if isinstance(called, nn.AdaptiveAvgPool2d | nn.AvgPool2d):
            return self._average(name, _average_window(name, called, value.shape), value)
        if called in (F.adaptive_avg_pool2d,) and node.args[1:] in ((1,), ((1, 1),)):
            return self._average(name, (value.shape[1:], value.shape[1:]), value)
        if called in ("mean", torch.mean) and tracing.averages_all(node):
            return self._average(name, (value.shape[1:], value.shape[1:]), value)
        if isinstance(called, nn.Flatten) or called in ("flatten", torch.flatten):
            return self._flatten(name, value)
        said = f"{type(called).__name__}" if isinstance(called, nn.Module) else getattr(called, "__name__", called)
        if isinstance(called, nn.Conv2d | nn.Linear):
            raise ValueError(f"layer {name}: {said} is float; quantize it: quantize(model) without excluding it")
        raise ValueError(
            f"layer {name}: {said} has no integer form here; supported between quantized layers: BatchNorm, ReLU, "
            "ReLU6, max and average pooling, additions, Flatten, Dropout"
        )

    def _read(self, name: str, node: fx.Node) -> Value:
        first = node.args[0] if node.args else None
        others = [read for read in node.all_input_nodes if read is not first]
        if not isinstance(first, fx.Node) or first not in self.values or others:
            raise ValueError(f"layer {name}: integer programs support one input tensor for all but additions")
        return self.values[first]

    def _add(self, name: str, node: fx.Node) -> Value:
        first, second = node.args[:2]
        if not (isinstance(first, fx.Node) and isinstance(second, fx.Node)) or node.kwargs:
            raise ValueError(f"layer {name}: integer programs add two tensors of the network, not a constant")
        values = self.values[first], self.values[second]
        sizes = {value.shape for value in values}
        if len(sizes) > 1:
            raise ValueError(f"layer {name}: adds {' and '.join(map(str, sizes))}; integer programs add equal shapes")
        return self.builder.add(
            name, values, self.sum_step, all(tracing.is_relu(self._called(reader)) for reader in node.users)
        )

    def _called(self, node: fx.Node) -> Any:
        # a module, a function, or the name of a method
        return self.traced.get_submodule(str(node.target)) if node.op == "call_module" else node.target

    def _layer(self, name: str, layer: AnyQuantized, value: Value) -> Value:
        weight = integer_weight(layer)
        if weight is None:
            raise ValueError(f"layer {name}: its weight is float; give it 2 to 8 bits")
        numerators = np.asarray(weight.numerators)
        options = _convolution_options(name, layer)
        weight_OIHW = numerators if numerators.ndim == 4 else numerators[:, :, None, None]
        if isinstance(layer, nn.Linear) and value.shape[1:] != (1, 1):
            raise ValueError(f"layer {name}: a linear layer on images {value.shape}; flatten them before it")
        terms = shift_terms(torch.from_numpy(weight_OIHW))
        row = int((terms.added + terms.subtracted).flatten(1).sum(1).max())
        if layer.act_quantizer is not None:
            source, unit = self._quantized_input(name, layer, layer.act_quantizer, value)
        else:
            value = self._float_input(name, layer, value, row)
            source, unit = value.source, float(value.gain)
        low, high = self.builder.bounds(source)
        largest = max(abs(low), abs(high))
        largest_sum = row * largest
        held = self.builder.accumulator_bits
        if largest_sum >= (1 << held) - 1:
            raise ValueError(
                f"layer {name}: accumulator up to {largest_sum}, {held + 1} bits hold less than 2^{held}; use "
                "fewer bits or levels of a smaller denominator"
            )
        low, high = _sum_bounds(weight_OIHW, min(low, 0), max(high, 0))
        shape = _convolved(self.builder.shape(source), weight_OIHW, options)
        sums = Convolution(name, (source,), shape, low, high, weight_OIHW, **options, largest_sum=largest_sum)
        number = self.builder.append(sums)
        bias = layer.bias
        offset = np.array(0.0) if bias is None else np.asarray(bias, np.float64)
        return Value(number, shape, np.asarray(weight.unit(0)) * unit, offset)

    def _quantized_input(self, name: str, layer: AnyQuantized, act: Quantizer, value: Value) -> tuple[int, float]:
        if layer.spec.act_per_channel:
            raise ValueError(f"layer {name}: act_per_channel True; integer programs have one threshold a layer's input")
        assert layer.act_alpha is not None
        unit = float(threshold_in_use(layer.act_alpha).double()) / act.levels.denominator
        # uniform levels that go on below 0: to twice what the calibration reached
        lowest = -(1 << int(np.ceil(2 * max(-value.smallest, 0) / unit)).bit_length())

        def quantizer(x: Array) -> Array:
            codes = integer_input(layer, torch.from_numpy(np.ascontiguousarray(x)))
            assert codes is not None
            numerators = np.asarray(codes.numerators)
            return np.maximum(numerators, lowest) if act.goes_on_below else numerators

        def levels(first: int) -> list[int]:
            return [*range(first if act.goes_on_below else 0, 0), *act.numerators]

        return self.builder.quantize(name, value, quantizer, levels), unit

    def _float_input(self, name: str, layer: AnyQuantized, value: Value, row: int) -> Value:
        # as many bits as the sums leave
        bits = min(self.builder.accumulator_bits - row.bit_length(), self.builder.grid_bits)
        if bits < 2:
            raise ValueError(
                f"layer {name}: accumulators of {self.builder.accumulator_bits} bits leave its float inputs {bits}; "
                "give more accumulator_bits"
            )
        if layer.relu:
            value = self._clip(value, 0.0, np.inf)
        if value.source == PIXELS and value.low == -np.inf and not value.pools:
            return self.builder.look_up(name, value, bits)
        return self.builder.on_grid(name, value, bits=bits)

    def _batch_norm(self, name: str, norm: nn.BatchNorm1d | nn.BatchNorm2d, value: Value) -> Value:
        if norm.running_mean is None or norm.running_var is None:
            raise ValueError(f"layer {name}: batch norm without running statistics; integer programs need them")
        value = self._unclipped(name, value)
        mean, var = (np.asarray(part, np.float64) for part in (norm.running_mean, norm.running_var))
        gain = 1 / np.sqrt(var + norm.eps)
        if norm.weight is not None:
            gain = gain * np.asarray(norm.weight, np.float64)
        offset = -mean * gain if norm.bias is None else np.asarray(norm.bias, np.float64) - mean * gain
        return value.affine(gain, offset)

    def _clip(self, value: Value, low: float, high: float) -> Value:
        # a ReLU may overtake a max pooling
        low, high = np.clip((low, high), value.low, value.high)
        return replace(value, low=float(low), high=float(high))

    def _max_pool(self, name: str, pool: nn.MaxPool2d, value: Value) -> Value:
        if pool.ceil_mode or pool.return_indices or _pair(pool.dilation) != (1, 1):
            raise ValueError(f"layer {name}: max pooling with ceil_mode, dilation or indices is not supported")
        window = {"kernel": _pair(pool.kernel_size), "stride": _pair(pool.stride), "padding": _pair(pool.padding)}
        channels, *size = value.shape
        height, wide = count_windows(size, *window.values())
        return replace(value, pools=(*value.pools, window), shape=(channels, height, wide))

    def _average(self, name: str, window: tuple[Any, Any], value: Value) -> Value:
        kernel, stride = map(tuple, window)
        bits = min(self.builder.accumulator_bits - int(np.prod(kernel)).bit_length(), self.builder.grid_bits)
        value = self.builder.on_grid(name, value, bits=bits)
        number = self.builder.pool(name, value.source, "sum", kernel=kernel, stride=stride)
        gain = value.gain / np.prod(kernel)
        return Value(number, self.builder.shape(number), gain, np.array(0.0))

    def _flatten(self, name: str, value: Value) -> Value:
        if value.shape[1:] == (1, 1):
            return value
        if value.pools:
            value = self.builder.on_grid(name, value)
        channels, *size = value.shape
        count = int(np.prod(size))
        shape = (channels * count, 1, 1)
        number = self.builder.append(Flatten(name, (value.source,), shape, *self.builder.bounds(value.source)))
        gain, offset = (np.repeat(part, count) if part.ndim else part for part in (value.gain, value.offset))
        return replace(value, source=number, shape=shape, gain=gain, offset=offset)

    def _unclipped(self, name: str, value: Value) -> Value:
        is_clipped = np.isfinite(value.low) or np.isfinite(value.high)
        return self.builder.on_grid(name, value) if is_clipped or value.pools else value


def _logit_step(value: Value, bits: int) -> float | None:
    # the unit of the sums, if it holds twice what the calibration reached and is fine enough for the bias
    if value.gain.ndim:
        return None
    units = 2 * max(-value.smallest, value.largest) / float(value.gain)
    is_fine = not value.offset.any() or units >= 1 << FINE_LOGIT_BITS
    return float(value.gain) if is_fine and units < 1 << bits else None


def _sum_bounds(weight_OIHW: Array, low: int, high: int) -> tuple[int, int]:
    # smallest and largest Σ w x of any channel
    positive, negative = np.maximum(weight_OIHW, 0), np.minimum(weight_OIHW, 0)
    axes = (1, 2, 3)
    least = (positive * low + negative * high).sum(axes).min()
    return int(least), int((positive * high + negative * low).sum(axes).max())


def _convolved(shape: tuple[int, int, int], weight_OIHW: Array, options: dict[str, Any]) -> tuple[int, int, int]:
    outputs, _, *kernel = weight_OIHW.shape
    spans = [d * (k - 1) + 1 for d, k in zip(options["dilation"], kernel, strict=True)]
    height, wide = count_windows(shape[1:], spans, options["stride"], options["padding"])
    return outputs, height, wide


def _convolution_options(name: str, layer: AnyQuantized) -> dict[str, Any]:
    if isinstance(layer, nn.Linear):
        return {"stride": (1, 1), "padding": (0, 0), "dilation": (1, 1), "groups": 1}
    padding = layer.padding
    if layer.padding_mode != "zeros":
        raise ValueError(f"layer {name}: padding_mode {layer.padding_mode!r}; integer programs pad zeros")
    if isinstance(padding, str):
        spans = [d * (k - 1) for d, k in zip(layer.dilation, layer.kernel_size, strict=True)]
        if padding == "same" and any(span % 2 for span in spans):
            raise ValueError(f"layer {name}: padding 'same' of an even kernel; give the padding as a number")
        padding = tuple(span // 2 for span in spans) if padding == "same" else (0, 0)
    return {
        "stride": tuple(layer.stride),
        "padding": tuple(padding),
        "dilation": tuple(layer.dilation),
        "groups": layer.groups,
    }


def _average_window(name: str, pool: nn.Module, shape: tuple[int, int, int]) -> tuple[Any, Any]:
    if isinstance(pool, nn.AdaptiveAvgPool2d):
        size = [shape[1 + i] if given is None else given for i, given in enumerate(_pair(pool.output_size))]
        if any(n % into for n, into in zip(shape[1:], size, strict=True)):
            raise ValueError(f"layer {name}: {shape[1:]} averaged into {size}; sizes must divide evenly")
        kernel = tuple(n // into for n, into in zip(shape[1:], size, strict=True))
        return kernel, kernel
    assert isinstance(pool, nn.AvgPool2d)
    if pool.ceil_mode or _pair(pool.padding) != (0, 0) or pool.divisor_override:
        raise ValueError(f"layer {name}: average pooling with padding, ceil_mode or a divisor is not supported")
    return _pair(pool.kernel_size), _pair(pool.stride)


def _pair(size: Any) -> tuple[Any, Any]:
    return tuple(size) if isinstance(size, tuple | list) else (size, size)
