"""An integer program as a QONNX graph: convolutions, MultiThreshold, what lies between, and each tensor's type.

QONNX carries integers as float32, which holds all up to 2^24. Wider ones are int64 here: products of a ``Rescale``, and
sums of layers of float inputs unless ``accumulator_bits=24`` keeps a program to what float32 holds.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np

from apot_fat.integer.program import (
    PIXELS,
    Add,
    Convolution,
    Flatten,
    IntegerProgram,
    Lookup,
    Operation,
    Pool,
    Rescale,
    Thresholds,
    width,
)
from apot_fat.optional import needed_for

if TYPE_CHECKING:
    import onnx

Array = np.ndarray
CARRIER_BITS = 24
"""Beside the sign, of the integers that float32 holds."""
OPSET = 13
_CARRIED = 1 << CARRIER_BITS
_FLOAT, _INT64, _DOUBLE = 1, 7, 11  # element types of ONNX
_CUSTOM, _CHANNELS_LAST = "qonnx.custom_op.general", "qonnx.custom_op.channels_last"


def qonnx_model(program: IntegerProgram, channels_last: bool = False) -> onnx.ModelProto:
    """A program as a graph for one image: from ``pixels``, (1, C, H, W) in 0 … 255, to ``logits``, (1, classes).

    All are integers, carried as float32, or as int64 what may exceed 2^24; a convolution of such sums is two, of the
    upper and the lower bits of its input. A quantizer is a MultiThreshold whose output is the numerator itself: where a
    level jumps by more than one, its threshold is repeated. Weights and results are annotated with the narrowest INT or
    UINT that holds them. Rows of weights whose result falls with its sums are negated, as MultiThreshold only rises.

    Args:
        program: the program.
        channels_last: images are (1, H, W, C), and convolutions and poolings those of QONNX's ``channels_last`` domain.

    Raises:
        ValueError: maxima, or sums of a convolution, that are too wide, naming their layer.
        MissingPackageError: onnx is not installed.
    """
    return _Writer(program, channels_last).write()


def clean_qonnx(model: onnx.ModelProto) -> onnx.ModelProto:
    """A graph after the clean-up of the qonnx package: constants folded, names unique and readable.

    Raises:
        MissingPackageError: qonnx is not installed.
    """
    with needed_for("the export to QONNX"):
        from qonnx.core.modelwrapper import ModelWrapper
        from qonnx.util.cleanup import cleanup_model
    return cleanup_model(ModelWrapper(model)).model


def run_qonnx(model: onnx.ModelProto, pixels: Array) -> Array:
    """Logits of images as the qonnx package executes a graph, node by node.

    Args:
        model: what ``qonnx_model`` makes, or ``clean_qonnx`` of it.
        pixels: uint8, (N, C, H, W), or (N, H, W, C) if the model's channels are last.

    Returns:
        int64, (N, classes).

    Raises:
        MissingPackageError: qonnx is not installed.
    """
    with needed_for("the execution of QONNX"):
        from qonnx.core.modelwrapper import ModelWrapper
        from qonnx.core.onnx_exec import execute_onnx
    wrapped = ModelWrapper(model)
    (read,) = (entry.name for entry in model.graph.input)
    (given,) = (entry.name for entry in model.graph.output)
    logits = [execute_onnx(wrapped, {read: image[None].astype(np.float32)})[given] for image in pixels]
    return np.concatenate(logits).astype(np.int64)


class _Writer:
    def __init__(self, program: IntegerProgram, channels_last: bool) -> None:
        with needed_for("the export to QONNX"):
            import onnx
        self.onnx, self.channels_last = onnx, channels_last
        self.input_shape, self.operations = program.input_shape, _rising(program.operations)
        self.nodes: list[Any] = []
        self.constants: dict[str, Array] = {}
        self.infos: list[Any] = []
        self.types: dict[str, str] = {"pixels": "UINT8"}
        self.names = {PIXELS: "pixels"}
        self.shapes: dict[str, tuple[int, ...]] = {"pixels": program.input_shape}  # (C, H, W) or (C,)
        self.elements = {"pixels": _FLOAT}

    def write(self) -> onnx.ModelProto:
        """The graph."""
        helper = self.onnx.helper
        for number, operation in enumerate(self.operations):
            self.names[number] = self._cast(self._operation(operation), operation.name, _element(operation))
            self.types[self.names[number]] = _type(operation.low, operation.high)
        last = self.operations[-1]
        self.types["logits"] = self.types.pop(self._flat(len(self.operations) - 1), _type(last.low, last.high))
        self.nodes[-1].output[:] = ["logits"]
        self.infos.pop()
        graph = helper.make_graph(
            self.nodes,
            "network",
            [helper.make_tensor_value_info("pixels", _FLOAT, (1, *self._placed(self.input_shape)))],
            [helper.make_tensor_value_info("logits", _element(last), (1, last.shape[0]))],
            [self.onnx.numpy_helper.from_array(value, name) for name, value in self.constants.items()],
            value_info=self.infos,
        )
        for name, kind in self.types.items():
            entry = self.onnx.StringStringEntryProto(key="finn_datatype", value=kind)
            noted = self.onnx.TensorAnnotation(tensor_name=name, quant_parameter_tensor_names=[entry])
            graph.quantization_annotation.append(noted)
        versions = {"": OPSET, _CUSTOM: 1} | ({_CHANNELS_LAST: OPSET} if self.channels_last else {})
        opsets = [helper.make_opsetid(domain, version) for domain, version in versions.items()]
        model = helper.make_model(graph, opset_imports=opsets, ir_version=8, producer_name="apot-fat")
        self.onnx.checker.check_model(model)
        return model

    def _operation(self, operation: Operation) -> str:
        # the name of the result; of a linear layer and what follows it (1, C), else (1, C, H, W)
        name, reads = operation.name, operation.inputs
        if isinstance(operation, Convolution):
            return self._convolution(operation)
        if isinstance(operation, Pool):
            return self._pool(operation)
        if isinstance(operation, Flatten):
            return self._flattened(operation)
        inputs = self._alike(reads)
        shape = self.shapes[inputs[0]]
        if isinstance(operation, Lookup):
            return self._look_up(operation, inputs[0], shape)
        if isinstance(operation, Thresholds):
            return self._thresholds(operation, inputs[0], shape)
        if isinstance(operation, Rescale):
            return self._rescale(operation, inputs[0], shape)
        assert isinstance(operation, Add)
        element = max(_element(operation), *(self.elements[name] for name in inputs))
        total = self._node("Add", [self._cast(x, name, element) for x in inputs], name, shape, element)
        return self._clipped(total, operation, shape)

    def _convolution(self, operation: Convolution) -> str:
        weight, name, (read,) = operation.weight_OIHW, operation.name, operation.inputs
        is_linear = weight.shape[2:] == operation.shape[1:] == self._shape(read)[1:] == (1, 1)
        if is_linear and operation.groups == 1 and operation.padding == (0, 0):
            element = _INT64 if operation.largest_sum > _CARRIED else _FLOAT
            matrix = self._constant(weight[:, :, 0, 0].T, name, element, weight)
            return self._node(
                "MatMul", [self._cast(self._flat(read), name, element), matrix], name, operation.shape[:1], element
            )
        options = {"strides": operation.stride, "pads": operation.padding * 2, "dilations": operation.dilation}
        return self._windows(operation, weight, operation.largest_sum, **options, group=operation.groups)

    def _pool(self, operation: Pool) -> str:
        options = {"strides": operation.stride, "pads": operation.padding * 2}
        if operation.kind == "sum":
            channels, largest = operation.shape[0], max(-operation.low, operation.high)
            ones = np.ones((channels, 1, *operation.kernel), np.int64)
            return self._windows(operation, ones, largest, **options, dilations=(1, 1), group=channels)
        image = self._image(operation.inputs[0])
        if self.elements[image] != _FLOAT:
            raise ValueError(f"layer {operation.name}: maxima beyond 2^{CARRIER_BITS}: give at most 24 grid_bits")
        return self._layered("MaxPool", [image], operation, kernel_shape=operation.kernel, **options)

    def _windows(self, operation: Operation, weight_OIHW: Array, largest_sum: int, **options: Any) -> str:
        image, name = self._image(operation.inputs[0]), operation.name
        weight = weight_OIHW.transpose(0, 2, 3, 1) if self.channels_last else weight_OIHW
        kernel = self._constant(weight, name, _FLOAT, weight)
        options["kernel_shape"] = weight_OIHW.shape[2:]
        if largest_sum <= _CARRIED:
            return self._layered("Conv", [self._cast(image, name, _FLOAT), kernel], operation, **options)
        shape = self.shapes[image]
        row_bits = int(np.abs(weight_OIHW).sum((1, 2, 3)).max()).bit_length()
        if largest_sum.bit_length() + row_bits >= 2 * CARRIER_BITS:  # sums of upper bits: largest_sum / step + a row's
            raise ValueError(
                f"layer {name}: sums up to {largest_sum} do not come from two of float32's; give {CARRIER_BITS} "
                "accumulator_bits"
            )
        step = self._constant(np.array(1 << CARRIER_BITS - row_bits), name, _INT64)
        lower, upper = self._split(self._cast(image, name, _INT64), step, name, shape)
        sums = [
            self._layered("Conv", [self._cast(x, name, _FLOAT), kernel], operation, **options) for x in (upper, lower)
        ]
        above, below = (self._cast(part, name, _INT64) for part in sums)
        above = self._node("Mul", [above, step], name, operation.shape, _INT64)
        return self._node("Add", [above, below], name, operation.shape, _INT64)

    def _split(self, x: str, divisor: str, name: str, shape: Sequence[int]) -> tuple[str, str]:
        # of integers x = divisor q + r: r ≥ 0 and q, which is rounded down
        remainder = self._node("Mod", [x, divisor], name, shape, _INT64)
        multiple = self._node("Sub", [x, remainder], name, shape, _INT64)
        return remainder, self._node("Div", [multiple, divisor], name, shape, _INT64)

    def _layered(self, op: str, inputs: Sequence[str], operation: Operation, **options: Any) -> str:
        # a convolution or a pooling of the layout
        domain = _CHANNELS_LAST if self.channels_last else ""
        return self._node(op, inputs, operation.name, operation.shape, domain=domain, **options)

    def _flattened(self, operation: Flatten) -> str:
        name, image = operation.name, self.names[operation.inputs[0]]
        element = self.elements[image]
        if self.channels_last:  # flattened channel by channel all the same
            channels, height, wide = self.shapes[image]
            first = (wide, channels, height)  # which lies as (channels, height, width)
            image = self._node("Transpose", [image], name, first, element, perm=(0, 3, 1, 2))
        return self._node("Flatten", [image], name, operation.shape[:1], element, axis=1)

    def _look_up(self, operation: Lookup, x: str, shape: Sequence[int]) -> str:
        # the place of each pixel's entry in a flat table
        name, table, element = operation.name, operation.table, _element(operation)
        starts = self._by_channel(256 * np.arange(len(table)), shape, name, _INT64)
        place = self._node("Add", [self._cast(x, name, _INT64), starts], name, shape, _INT64)
        flat = self._constant(table.ravel(), name, element, table)
        return self._node("Gather", [flat, place], name, shape, element, axis=0)

    def _thresholds(self, operation: Thresholds, x: str, shape: Sequence[int]) -> str:
        name, rows = operation.name, operation.repeated_CT
        is_wide = self.elements[x] != _FLOAT or np.abs(rows).max(initial=0) > _CARRIED
        element = _DOUBLE if is_wide else _FLOAT  # qonnx counts in floats
        if operation.falls_C.any():  # of what others read too
            signs = self._by_channel(np.where(operation.falls_C, -1, 1), shape, name, self.elements[x])
            x = self._node("Mul", [x, signs], name, shape, self.elements[x])
        return self._node(
            "MultiThreshold",
            [self._cast(x, name, element), self._constant(rows, name, element, rows)],
            name,
            shape,
            element,
            domain=_CUSTOM,
            data_layout="NC" if len(shape) == 1 else "NHWC" if self.channels_last else "NCHW",
            out_dtype=_type(operation.low, operation.high),
            out_scale=1.0,
            out_bias=float(operation.levels[0]),
        )

    def _rescale(self, operation: Rescale, x: str, shape: Sequence[int]) -> str:
        name, y = operation.name, self._cast(x, operation.name, _INT64)
        for op, column in (("Mul", operation.factor_C), ("Add", operation.addend_C)):
            y = self._node(op, [y, self._by_channel(column, shape, name, _INT64)], name, shape, _INT64)
        power = self._by_channel(np.left_shift(1, operation.shift_C), shape, name, _INT64)
        return self._clipped(self._split(y, power, name, shape)[1], operation, shape)

    def _clipped(self, x: str, operation: Operation, shape: Sequence[int]) -> str:
        element, name = self.elements[x], operation.name
        limits = [self._constant(np.array(bound), name, element) for bound in (operation.low, operation.high)]
        return self._node("Clip", [x, *limits], name, shape, element)

    # what is written

    def _node(
        self, op: str, inputs: Sequence[str], name: str, shape: Sequence[int], element: int = _FLOAT, **attributes: Any
    ) -> str:
        # the name of its result
        result = f"{name}/{op}_{len(self.nodes)}"
        self.nodes.append(self.onnx.helper.make_node(op, inputs, [result], name=result, **attributes))
        self.shapes[result], self.elements[result] = tuple(shape), element
        self.infos.append(self.onnx.helper.make_tensor_value_info(result, element, (1, *self._placed(shape))))
        return result

    def _cast(self, x: str, name: str, element: int) -> str:
        return x if self.elements[x] == element else self._node("Cast", [x], name, self.shapes[x], element, to=element)

    def _constant(self, value: Array, layer: str, element: int, noted: Array | None = None) -> str:
        # its type is noted if it is that of values
        name = f"{layer}/constant_{len(self.constants)}"
        self.constants[name] = value.astype({_FLOAT: np.float32, _INT64: np.int64, _DOUBLE: np.float64}[element])
        if noted is not None:
            self.types[name] = _type(int(noted.min(initial=0)), int(noted.max(initial=0)))
        return name

    def _by_channel(self, column: Array, shape: Sequence[int], layer: str, element: int) -> str:
        # one entry a channel, for results of a shape
        entries = column.reshape(-1, *[1] * (len(shape) - 1))
        return self._constant(entries.reshape(1, *self._placed(entries.shape)), layer, element)

    def _placed(self, shape: Sequence[int]) -> tuple[int, ...]:
        return (*shape[1:], shape[0]) if self.channels_last else tuple(shape)

    def _shape(self, number: int) -> tuple[int, int, int]:
        return self.input_shape if number == PIXELS else self.operations[number].shape

    def _alike(self, reads: Sequence[int]) -> list[str]:
        # results of one rank
        names = [self.names[read] for read in reads]
        return names if len({len(self.shapes[name]) for name in names}) == 1 else [*map(self._image, reads)]

    def _image(self, read: int) -> str:
        name = self.names[read]
        if len(self.shapes[name]) == 3:
            return name
        axes = self._constant(np.array([1, 2] if self.channels_last else [2, 3]), name, _INT64)
        return self._node("Unsqueeze", [name, axes], name, self._shape(read), self.elements[name])

    def _flat(self, read: int) -> str:
        # a result of 1 × 1
        name = self.names[read]
        if len(self.shapes[name]) == 1:
            return name
        return self._node("Flatten", [name], name, self._shape(read)[:1], self.elements[name], axis=1)


def _rising(operations: Sequence[Operation]) -> list[Operation]:
    # with the rows of weights negated that nobody but thresholds that fall reads
    changed = list(operations)
    readers = Counter(read for operation in operations for read in operation.inputs)
    for number, operation in enumerate(operations):
        if not isinstance(operation, Thresholds) or not operation.falls_C.any():
            continue
        (read,) = operation.inputs
        sums = operations[read]
        if isinstance(sums, Convolution) and readers[read] == 1:
            signs = np.where(operation.falls_C, -1, 1)[:, None, None, None]
            largest = max(-sums.low, sums.high)
            changed[read] = replace(sums, weight_OIHW=sums.weight_OIHW * signs, low=-largest, high=largest)
            changed[number] = replace(operation, falls_C=np.zeros_like(operation.falls_C))
    return changed


def _type(low: int, high: int) -> str:
    bits = width(low, high)
    if low < 0:
        return f"INT{bits}"
    return f"UINT{bits}" if bits > 1 else "BINARY"


def _element(operation: Operation) -> int:
    # what carries its result
    return _FLOAT if max(-operation.low, operation.high) <= _CARRIED else _INT64
