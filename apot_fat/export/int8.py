"""Convolutions of quantized operands as integer convolutions of an ONNX graph.

The input of such a convolution is the byte n of x_q = α n / d, its weight a signed byte times a scale per output
channel, into which batch normalisation has been folded before. Its output is a byte on a linear grid:

- where one quantizer alone takes it, the cells floor(u · 2d) of that quantizer (uniform levels: the numerators
  themselves), so that the decisions are those of the float network up to the rounding of its bias;
- elsewhere, as at a residual sum, 256 steps of the range seen on the calibration images. Sums of such values are bytes
  too (dequantize, add, quantize: onnxruntime makes one integer operator of them).

Everything else stays float.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from apot_fat.export.graph import (
    BYTE_MAX,
    PROJECT,
    GraphBuilder,
    Projection,
    emit_cells,
    emit_projection,
    emit_table,
    mark_index,
)

if TYPE_CHECKING:
    import onnx

_WEIGHT_MAX = 127
_PAIR_MAX = (1 << 15) - 1  # processors without VNNI add two products in 16 bits, saturating
_BIAS_MAX = 1 << 30
_FOLD_TOLERANCE = 1e-4


@dataclass(frozen=True)
class Bytes:
    """A float tensor as bytes: value = scale · (byte − zero + offset), at most ``high``.

    ``offset`` is 1/2 where a byte is a cell [c, c + 1) instead of a rounded value; such a tensor has one reader, the
    quantizer whose cells they are.
    """

    name: str
    scale: float
    zero: int = 0
    offset: float = 0.0
    high: float = np.inf

    def values(self) -> np.ndarray:
        """The value of each byte; float64 (256,)."""
        return np.minimum((np.arange(BYTE_MAX + 1) - self.zero + self.offset) * self.scale, self.high)


def write_integers(
    model: onnx.ModelProto,
    projections: list[Projection],
    weights: list[np.ndarray | None],
    ranges: dict[str, tuple[float, float]],
) -> tuple[onnx.ModelProto, int]:
    """The model with integer convolutions wherever they are possible, and their number.

    Args:
        model: float, with ``Project`` nodes.
        projections: what those stand for.
        weights: the numerators of each one's layer, int64; None where the weight is float.
        ranges: smallest and largest value of each float tensor that may become bytes.
    """
    lowering = _Lowering(model, projections, weights, ranges)
    return lowering.builder.finish(), lowering.count


class _Lowering:
    def __init__(
        self,
        model: onnx.ModelProto,
        projections: list[Projection],
        weights: list[np.ndarray | None],
        ranges: dict[str, tuple[float, float]],
    ) -> None:
        self.builder = GraphBuilder(model)
        self.projections, self.weights, self.ranges = projections, weights, ranges
        self.producer = {name: node for node in model.graph.node for name in node.output}
        self.bytes: dict[str, Bytes] = {}  # float tensors that exist as bytes
        self.floats: set[str] = set()  # those of them that exist as floats too
        self.codes: dict[tuple[str, int, str], str] = {}
        self.count = 0
        for node in model.graph.node:
            self.lower(node)
        for name in self.builder.outputs:
            self.as_float(name)

    def lower(self, node: onnx.NodeProto) -> None:
        index = mark_index(node, PROJECT)
        scales = self.integer_weight_scales(node)
        if index is not None:
            users = self.builder.consumers.get(node.output[0], [])
            if not all(self.integer_weight_scales(user) is not None for user in users):
                emit_projection(self.builder, self.as_float(node.input[0]), self.projections[index], node.output[0])
        elif scales is not None:
            self.convolve(node, scales)
        elif node.op_type == "Add" and any(name in self.bytes for name in node.input) and self.is_sum(node):
            self.join(node)
        elif node.op_type in ("Relu", "Clip", "MaxPool") and self.passes_bytes(node):
            self.forward_bytes(node)
        else:
            for name in node.input:
                self.as_float(name)
            self.builder.nodes.append(node)

    def as_float(self, name: str) -> str:
        """The tensor as floats, converted from bytes if it exists only as such."""
        if name in self.bytes and name not in self.floats:
            self.floats.add(name)
            self.dequantize(self.bytes[name], name)
        return name

    def dequantize(self, value: Bytes, output: str | None = None) -> str:
        scale, zero = self.builder.constant(value.scale), self.builder.constant(value.zero, np.uint8)
        return self.builder.add("DequantizeLinear", value.name, scale, zero, output=output)

    def quantize(self, x: str, low: float, high: float) -> Bytes:
        scale, zero = linear_grid(low, high)
        constants = self.builder.constant(scale), self.builder.constant(zero, np.uint8)
        return Bytes(self.builder.add("QuantizeLinear", x, *constants), scale, zero)

    def integer_weight_scales(self, node: onnx.NodeProto) -> np.ndarray | None:
        """The factor on each output channel's numerators, where the node can be an integer convolution."""
        if node.op_type != "Conv" or node.input[0] not in self.producer or node.output[0] not in self.ranges:
            return None
        project = self.producer[node.input[0]]
        index = mark_index(project, PROJECT)
        weight = self.builder.array(node.input[1])
        if index is None or weight is None or weight.ndim != 4:
            return None
        projection, numerators = self.projections[index], self.weights[index]
        if numerators is None or numerators.shape != weight.shape or not projection.levels.fits_byte:
            return None
        quantizer = projection.quantizer
        if quantizer.is_signed or (quantizer.keeps_negatives and not self.is_nonnegative(project.input[0])):
            return None
        largest = int(np.abs(numerators).max(initial=0))
        if largest > _WEIGHT_MAX or 2 * projection.levels.denominator * largest > _PAIR_MAX:
            return None
        rows, weights = numerators.reshape(len(weight), -1).astype(float), weight.reshape(len(weight), -1)
        scales = (rows * weights).sum(1) / np.maximum((rows * rows).sum(1), 1)
        misfit = np.abs(weights - scales[:, None] * rows).max(initial=0)
        return scales if misfit <= _FOLD_TOLERANCE * np.abs(weights).max(initial=0) else None

    def is_nonnegative(self, name: str) -> bool:
        node = self.producer.get(name)
        if node is None:
            return False
        if node.op_type == "MaxPool":
            return self.is_nonnegative(node.input[0])
        return self.clip_bounds(node) is not None

    def clip_bounds(self, node: onnx.NodeProto) -> tuple[float, float] | None:
        """(0, upper bound) of a ReLU or a clip at 0; None for anything else."""
        if node.op_type == "Relu":
            return 0.0, np.inf
        if node.op_type != "Clip" or len(node.input) < 2:
            return None
        bounds = [self.builder.array(name) if name else None for name in node.input[1:]]
        if bounds[0] is None or float(bounds[0]) != 0 or (len(bounds) > 1 and node.input[2] and bounds[1] is None):
            return None
        return 0.0, float(bounds[1]) if len(bounds) > 1 and bounds[1] is not None else np.inf

    def passes_bytes(self, node: onnx.NodeProto) -> bool:
        value = self.bytes.get(node.input[0])
        if value is None or len(node.output) > 1:
            return False
        return node.op_type == "MaxPool" or (value.zero == 0 and self.clip_bounds(node) is not None)

    def forward_bytes(self, node: onnx.NodeProto) -> None:
        value = self.bytes[node.input[0]]
        name, high = value.name, value.high
        if node.op_type == "MaxPool":
            name = f"{node.output[0]}.bytes"
            pool = self.copy(node, [value.name], name)
            self.builder.nodes.append(pool)
        else:
            bounds = self.clip_bounds(node)
            assert bounds is not None
            if value.offset:
                high = min(high, bounds[1])
            elif bounds[1] < value.scale * BYTE_MAX:
                largest = self.builder.constant(round(bounds[1] / value.scale), np.uint8)
                name = self.builder.add("Clip", name, "", largest)
        self.bytes[node.output[0]] = Bytes(name, value.scale, value.zero, value.offset, high)

    @staticmethod
    def copy(node: onnx.NodeProto, inputs: list[str], output: str, op: str | None = None) -> onnx.NodeProto:
        from onnx import helper

        new = helper.make_node(op or node.op_type, inputs, [output])
        new.attribute.extend(node.attribute)
        return new

    def next_projection(self, name: str) -> Projection | None:
        """The quantizer that alone takes the tensor, perhaps after ReLU and maximum, for integer convolutions."""
        node = self.builder.only_consumer(name)
        while node is not None and (node.op_type == "MaxPool" or self.clip_bounds(node) is not None):
            node = self.builder.only_consumer(node.output[0])
        index = None if node is None else mark_index(node, PROJECT)
        if node is None or index is None:
            return None
        users = self.builder.consumers.get(node.output[0], [])
        integer = users and all(self.integer_weight_scales(user) is not None for user in users)
        return self.projections[index] if integer else None

    def range_of(self, name: str) -> tuple[float, float]:
        """Smallest and largest value worth representing: a ReLU that alone takes the tensor makes it non-negative."""
        user = self.builder.only_consumer(name)
        low, high = self.ranges[name]
        if user is None or self.clip_bounds(user) is None:
            return low, high
        return self.ranges.get(user.output[0], (0.0, high))

    def convolve(self, node: onnx.NodeProto, scales: np.ndarray) -> None:
        builder, output = self.builder, node.output[0]
        project = self.producer[node.input[0]]
        index = mark_index(project, PROJECT)
        assert index is not None
        projection, numerators = self.projections[index], self.weights[index]
        assert numerators is not None
        following = self.next_projection(output)
        y, steps = f"{output}.bytes", 0 if following is None else following.levels.denominator
        if following is not None and following.levels.is_uniform and steps <= BYTE_MAX:
            value = Bytes(y, following.alpha / steps)
        elif following is not None and 2 * steps <= BYTE_MAX:
            value = Bytes(y, following.alpha / (2 * steps), offset=0.5)
        else:
            value = Bytes(y, *linear_grid(*self.range_of(output)))
        x_scale = projection.alpha / projection.levels.denominator
        bias = self.builder.array(node.input[2]) if len(node.input) > 2 else None
        bias = np.zeros(len(scales)) if bias is None else bias.astype(float)
        bias = bias - value.offset * value.scale  # rounding then takes the floor
        largest = max(int(np.abs(numerators).max(initial=0)), 1)
        # larger integers for the same weight, for a finer unit of the bias
        factor = min(_WEIGHT_MAX // largest, _PAIR_MAX // (2 * projection.levels.denominator * largest))
        w_scale = np.maximum(np.abs(scales) / factor, np.abs(bias) / (_BIAS_MAX * x_scale))
        w_scale = np.maximum(w_scale, np.finfo(np.float32).tiny)
        w = np.round(numerators * (scales / w_scale)[:, None, None, None])
        strides = self.strides_of_samples(node)
        inputs = [
            self.bytes_for(project.input[0], index, strides),
            builder.constant(x_scale),
            builder.constant(0, np.uint8),
            builder.constant(w, np.int8),
            builder.constant(w_scale),
            builder.constant(np.zeros(len(scales)), np.int8),
            builder.constant(value.scale),
            builder.constant(value.zero, np.uint8),
            builder.constant(np.round(bias / (x_scale * w_scale)), np.int32),
        ]
        convolution = self.copy(node, inputs, y, "QLinearConv")
        for attribute in convolution.attribute:
            if strides is not None and attribute.name == "strides":
                attribute.ints[:] = [1, 1]
        builder.nodes.append(convolution)
        self.bytes[output] = value
        self.count += 1

    def bytes_for(self, x: str, index: int, strides: list[int] | None) -> str:
        """The numerators of the quantized tensor, at every so many rows and columns."""
        key = x, index, str(strides)
        if key not in self.codes:
            self.codes[key] = self.project(x, self.projections[index], strides)
        return self.codes[key]

    @staticmethod
    def strides_of_samples(node: onnx.NodeProto) -> list[int] | None:
        """The strides of a convolution that reads single values, and not those between; None for any other."""
        found = {attribute.name: list(attribute.ints) for attribute in node.attribute}
        strides = found.get("strides", [1, 1])
        auto_pad = any(a.name == "auto_pad" and a.s != b"NOTSET" for a in node.attribute)
        samples = found.get("kernel_shape") == [1, 1] and not any(found.get("pads", [])) and not auto_pad
        return strides if samples and strides != [1, 1] else None

    def project(self, x: str, projection: Projection, strides: list[int] | None) -> str:
        builder, levels = self.builder, projection.levels
        if x not in self.bytes and any(
            user.op_type == "Add" and self.is_sum(user) for user in self.builder.consumers[x]
        ):
            # a sum needs the bytes too
            self.bytes[x] = self.quantize(x, *self.ranges[x])
            self.floats.add(x)
        if x in self.bytes:
            value = self.bytes[x]
            name = value.name if strides is None else self.sample(value.name, strides)
            return emit_table(builder, name, projection.project(value.values()), threaded=True)
        if strides is not None:
            x = self.sample(x, strides)
        if levels.is_uniform:
            scale = builder.constant(projection.alpha / levels.denominator)
            codes = builder.add("QuantizeLinear", x, scale, builder.constant(0, np.uint8))
            return emit_table(builder, codes, np.minimum(np.arange(BYTE_MAX + 1), levels.denominator))
        u = builder.add("Div", x, builder.constant(projection.alpha))
        u = builder.add("Clip", u, builder.constant(0), builder.constant(1))
        if 2 * levels.denominator <= BYTE_MAX:
            cells = emit_cells(builder, u, levels, "UINT8")
            middles = (np.arange(BYTE_MAX + 1) + 0.5) / (2 * levels.denominator) * projection.alpha
            return emit_table(builder, cells, projection.project(middles), threaded=True)
        table = builder.constant(np.array(levels.numerators)[list(levels.cell_codes)], np.uint8)
        return builder.add("Gather", table, emit_cells(builder, u, levels, "INT32"))

    def sample(self, x: str, strides: list[int]) -> str:
        bounds = ([0, 0], [np.iinfo(np.int64).max] * 2, [2, 3], strides)
        return self.builder.add("Slice", x, *(self.builder.constant(bound, np.int64) for bound in bounds))

    def is_sum(self, node: onnx.NodeProto) -> bool:
        return all(name in self.ranges for name in (*node.input, *node.output))

    def join(self, node: onnx.NodeProto) -> None:
        operands = []
        for name in node.input:
            value = self.bytes.get(name)
            if value is None or value.offset:
                value = self.quantize(self.as_float(name), *self.ranges[name])
            operands.append(self.dequantize(value))
        self.bytes[node.output[0]] = self.quantize(self.builder.add("Add", *operands), *self.range_of(node.output[0]))


def linear_grid(low: float, high: float) -> tuple[float, int]:
    """Scale and zero point of 256 steps over [low, high], with 0 on the grid."""
    low, high = min(low, 0.0), max(high, 0.0)
    scale = float(np.float32((high - low) / BYTE_MAX)) or 1.0
    return scale, round(-low / scale)


def best_range(values: np.ndarray) -> tuple[float, float]:
    """The range whose 256 steps represent the values with the least squared error: the whole one, or a part of it."""
    low, high = min(float(values.min()), 0.0), max(float(values.max()), 0.0)

    def squared_error(part: float) -> float:
        scale, zero = linear_grid(part * low, part * high)
        steps = np.clip(np.round(values / scale) + zero, 0, BYTE_MAX) - zero
        return float(np.square(steps * scale - values).sum())

    part = min((1 - step / 16 for step in range(13)), key=squared_error)
    return part * low, part * high
