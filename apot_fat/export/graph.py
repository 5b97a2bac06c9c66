"""ONNX graphs: a builder, and the activation quantizer as standard operators.

onnxruntime runs ``Gather`` at a hundredth of the speed of elementwise arithmetic, so that a look-up in a small table is
written as arithmetic on bytes here.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from apot_fat.quant.layers import AnyQuantized
from apot_fat.quant.levels import LevelSet
from apot_fat.quant.quantizer import Quantizer
from apot_fat.quant.units import threshold_in_use

if TYPE_CHECKING:
    import onnx

MARKS_DOMAIN, PROJECT = "apot_fat", "Project"
"""The operator that stands for an activation quantizer until it is written out; its ``index`` says which."""
BYTE_MAX = 255
_SLOPE_MARGIN = 1e-4


@dataclass(frozen=True)
class Projection:
    """A layer's activation quantizer with its threshold.

    Args:
        quantizer: the quantizer.
        alpha: α, same unit as the input, > 0.
        as_integers: give the numerators n of x_q = α · n / d instead, as floats.
    """

    quantizer: Quantizer
    alpha: float
    as_integers: bool = False

    @classmethod
    def of(cls, layer: AnyQuantized) -> Projection | None:
        """A layer's, or None where it takes its input as it is.

        Raises:
            ValueError: thresholds of one a channel.
        """
        if layer.act_alpha is None or layer.act_quantizer is None:
            return None
        if layer.act_alpha.dim():
            raise ValueError("act_per_channel True: ONNX files hold one activation threshold a layer; choose False")
        return cls(layer.act_quantizer, threshold_in_use(layer.act_alpha.detach()).float().item())

    @property
    def levels(self) -> LevelSet:
        """The quantizer's."""
        return self.quantizer.levels

    def project(self, values: np.ndarray) -> np.ndarray:
        """The numerators n of α · n / d that non-negative values become; float64 in, int64 out, same shape."""
        u = np.clip(values / self.alpha, 0, 1)
        if self.levels.is_uniform:
            return np.round(u * self.levels.denominator).astype(np.int64)
        return np.array(self.levels.numerators)[np.searchsorted(self.levels.thresholds, u, side="right")]


class GraphBuilder:
    """The nodes and constants of a graph that takes the place of another one's, with its inputs and outputs."""

    def __init__(self, model: onnx.ModelProto) -> None:
        from onnx import numpy_helper

        self.source = model
        self.nodes: list[onnx.NodeProto] = []
        self.given = {tensor.name: tensor for tensor in model.graph.initializer}
        self.outputs = {output.name for output in model.graph.output}
        self.consumers: dict[str, list[onnx.NodeProto]] = {}
        for node in model.graph.node:
            for name in node.input:
                self.consumers.setdefault(name, []).append(node)
        self._to_array = numpy_helper.to_array
        self._constants: dict[str, onnx.TensorProto] = {}
        self._names: dict[tuple[str, tuple[int, ...], bytes], str] = {}

    def array(self, name: str) -> np.ndarray | None:
        """The values of a constant of the source graph; None for anything else."""
        return self._to_array(self.given[name]) if name in self.given else None

    def only_consumer(self, name: str) -> onnx.NodeProto | None:
        """The node of the source graph that alone takes a tensor."""
        users = self.consumers.get(name, [])
        return users[0] if len(users) == 1 and name not in self.outputs else None

    def constant(self, value: Any, dtype: Any = np.float32) -> str:
        """The name of a constant."""
        from onnx import numpy_helper

        array = np.asarray(value, dtype)
        key = (array.dtype.str, array.shape, array.tobytes())
        if key not in self._names:
            name = self._names[key] = f"apot_fat.constant{len(self._names)}"
            self._constants[name] = numpy_helper.from_array(array, name)
        return self._names[key]

    def add(self, op: str, *inputs: str, output: str | None = None, **attributes: Any) -> str:
        """Append an operator of one output; its name."""
        from onnx import helper

        output = output or f"apot_fat.value{len(self.nodes)}"
        self.nodes.append(helper.make_node(op, list(inputs), [output], **attributes))
        return output

    def finish(self) -> onnx.ModelProto:
        """The whole model."""
        import onnx

        model = onnx.ModelProto()
        model.CopyFrom(self.source)
        used = {name for node in self.nodes for name in node.input} | {o.name for o in model.graph.output}
        kept = [t for name, t in (self.given | self._constants).items() if name in used]
        for field in ("node", "initializer", "value_info"):
            model.graph.ClearField(field)
        model.graph.node.extend(self.nodes)
        model.graph.initializer.extend(kept)
        opsets = [opset for opset in model.opset_import if opset.domain != MARKS_DOMAIN]
        model.ClearField("opset_import")
        model.opset_import.extend(opsets)
        return model


def mark_index(node: onnx.NodeProto, mark: str) -> int | None:
    """Which of the things that a mark stands for a node is, by its ``index``; None for any other node."""
    if node.domain != MARKS_DOMAIN or node.op_type != mark:
        return None
    return next(attribute.i for attribute in node.attribute if attribute.name == "index")


def emit_projection(builder: GraphBuilder, x: str, projection: Projection, output: str) -> None:
    """α times the nearest level, or its numerator, with the decisions of ``project``: float in, float out."""
    levels, alpha = projection.levels, projection.alpha
    u = builder.add("Div", x, builder.constant(alpha))
    sign = None
    if projection.quantizer.is_signed:
        sign, u = builder.add("Sign", u), builder.add("Abs", u)
    low = "" if projection.quantizer.keeps_negatives else builder.constant(0)
    u = builder.add("Clip", u, low, builder.constant(1))
    last = None if sign else output
    if levels.is_uniform:
        u = builder.add("Mul", u, builder.constant(levels.denominator))
        q = _emit_level(builder, "Round", u, projection, last)
    elif 2 * levels.denominator <= BYTE_MAX:
        table = _cell_numerators(levels)
        numerators = emit_table(builder, emit_cells(builder, u, levels, "UINT8"), table)
        q = _emit_level(builder, "Cast", numerators, projection, last, to=1)
    else:
        scaled = np.array(levels.levels, np.float32) * np.float32(alpha)
        values = builder.constant(levels.numerators if projection.as_integers else scaled)
        if levels.has_table:
            codes = builder.constant(levels.cell_codes, np.int32)
            code = builder.add("Gather", codes, emit_cells(builder, u, levels, "INT32"))
        else:
            code = _emit_search(builder, u, levels)
        q = builder.add("Gather", values, code, output=last)
    if sign:
        builder.add("Mul", q, sign, output=output)


def emit_cells(builder: GraphBuilder, u: str, levels: LevelSet, integer_type: str) -> str:
    """floor(u · 2d), on which the nearest level alone depends; u in [0, 1]."""
    from onnx import TensorProto

    cells = builder.add("Mul", u, builder.constant(2 * levels.denominator))
    return builder.add("Cast", cells, to=TensorProto.DataType.Value(integer_type))


def emit_table(builder: GraphBuilder, codes: str, table: np.ndarray, *, threaded: bool = False) -> str:
    """table[codes] of bytes for a table that nowhere falls, as arithmetic.

    Equation: table[c] = table[0] + Σ_r w_r · (clip(c, low_r, high_r) − low_r), one r for each run of equal jumps w_r,
    in the arithmetic of bytes (modulo 256).

    Args:
        builder: the graph.
        codes: name of the bytes.
        table: (256,) integers, range [0, 255].
        threaded: prefer ``_Bend``, which onnxruntime runs on all threads, where ``Clip`` and ``Add`` of bytes run on
            one: two of them for the whole table where each bends once (3-bit APoT), else one for jumps of one height
            that rise along a line.
    """
    bends = _bends(table) if threaded else None
    if bends is not None:
        for bend in bends:
            codes = bend.emit(builder, codes)
        return codes
    runs: list[list[int]] = []  # low, high, weight
    for position, jump in enumerate(np.diff(table).tolist(), start=1):
        if jump and runs and runs[-1][1] == position - 1 and runs[-1][2] == jump:
            runs[-1][1] = position
        elif jump:
            runs.append([position - 1, position, jump])
    rest = int(table[0])
    by_weight: dict[int, str] = {}
    if threaded:
        for weight in sorted({weight for _, _, weight in runs}):
            jumps = [high for low, high, w in runs if w == weight and high == low + 1]
            for first, last, zero, slope in _lines(jumps):
                base = BYTE_MAX - (last - first)  # so that the count ends where bytes do
                term = _Bend(zero, base, 0.0, slope).emit(builder, codes)
                rest -= weight * base
                before = by_weight.get(weight)
                by_weight[weight] = builder.add("Add", before, term) if before else term
                taken = set(jumps[first:last])
                runs = [run for run in runs if not (run[2] == weight and run[1] in taken and run[1] == run[0] + 1)]
    for low, high, weight in runs:
        bounds = builder.constant(low, np.uint8), builder.constant(high, np.uint8)
        clipped = codes if (low, high) == (0, BYTE_MAX) else builder.add("Clip", codes, *bounds)
        before = by_weight.get(weight)
        by_weight[weight] = builder.add("Add", before, clipped) if before else clipped
        rest -= weight * low
    total = ""
    for weight, clipped in by_weight.items():
        term = clipped if weight == 1 else builder.add("Mul", clipped, builder.constant(weight, np.uint8))
        total = builder.add("Add", total, term) if total else term
    total = total or builder.add("Mul", codes, builder.constant(0, np.uint8))  # a constant table
    return builder.add("Add", total, builder.constant(rest % 256, np.uint8)) if rest % 256 else total


@dataclass(frozen=True)
class _Bend:
    """y = y_0 + round(slope · (c − c_0)), slope one below c_0 and another above, held to [0, 255].

    Three standard operators, of which onnxruntime makes one that looks bytes up.
    """

    x: int
    y: int
    below: float
    above: float

    def emit(self, builder: GraphBuilder, codes: str) -> str:
        x, y = builder.constant(self.x, np.uint8), builder.constant(self.y, np.uint8)
        run = builder.add("DequantizeLinear", codes, builder.constant(self.above), x)
        rise = builder.add("LeakyRelu", run, alpha=self.below / self.above)
        return builder.add("QuantizeLinear", rise, builder.constant(1.0), y)


def _bends(table: np.ndarray) -> list[_Bend] | None:
    # from the bytes to the number of the value, counted so that the last one is 255, and from there to the value
    values, ranks = np.unique(table, return_inverse=True)
    numbers = np.arange(len(values)) + BYTE_MAX + 1 - len(values)
    to_number, to_value = _bend(np.arange(len(table)), numbers[ranks]), _bend(numbers, values)
    return None if to_number is None or to_value is None else [to_number, to_value]


def _bend(x: np.ndarray, y: np.ndarray) -> _Bend | None:
    for at in range(1, len(x) - 1):
        run, rise = x - x[at], y - y[at]
        slopes = []
        for side in (slice(0, at), slice(at + 1, None)):
            # |slope · run − rise| < 1/2, with no bound where the result is held to 0 or 255
            near, far = (np.abs(rise[side]) - 0.5) / np.abs(run[side]), (np.abs(rise[side]) + 0.5) / np.abs(run[side])
            far[(y[side] == BYTE_MAX) | (y[side] == 0)] = np.inf
            slopes.append((near.max(), far.min()))
        if all(high - low > _SLOPE_MARGIN and high > _SLOPE_MARGIN for low, high in slopes):
            below, above = ((max(low, 0.0) + min(high, max(low, 0.0) + 1)) / 2 for low, high in slopes)
            return _Bend(int(x[at]), int(y[at]), below, above)
    return None


def _lines(jumps: list[int]) -> list[tuple[int, int, int, float]]:
    """Stretches jumps[first:last] of at least three, with z and s so that round((c − z) s) counts those up to c."""
    lines = []
    first = 0
    while first < len(jumps):
        found = None
        for last in range(first + 3, len(jumps) + 1):
            line = _line(jumps[first:last])
            if line is None:
                break
            found = (first, last, *line)
        if found:
            lines.append(found)
            first = found[1]
        else:
            first += 1
    return lines


def _line(jumps: list[int]) -> tuple[int, float] | None:
    for zero in range(jumps[0]):
        # (jump − z) s >= i − 1/2 > (jump − 1 − z) s
        low = max((i + 0.5) / (jump - zero) for i, jump in enumerate(jumps))
        high = min((i + 0.5) / (jump - 1 - zero) if jump - 1 > zero else 1.0 for i, jump in enumerate(jumps))
        if high - low > _SLOPE_MARGIN:
            return zero, (low + high) / 2
    return None


def _emit_level(
    builder: GraphBuilder, op: str, x: str, projection: Projection, output: str | None, **attributes: Any
) -> str:
    # op(x) is the numerators
    if projection.as_integers:
        return builder.add(op, x, output=output, **attributes)
    # two roundings, as in PyTorch: another last bit of every input would turn more decisions of the next layers
    level = builder.add("Div", builder.add(op, x, **attributes), builder.constant(projection.levels.denominator))
    return builder.add("Mul", level, builder.constant(projection.alpha), output=output)


def _cell_numerators(levels: LevelSet) -> np.ndarray:
    codes = np.array(levels.cell_codes)
    numerators = np.array(levels.numerators)[codes]
    return np.concatenate([numerators, np.full(BYTE_MAX + 1 - len(codes), numerators[-1])])


def _emit_search(builder: GraphBuilder, u: str, levels: LevelSet) -> str:
    # binary search among thresholds too far apart for a table of cells: int32 codes
    size = 1 << levels.bits
    thresholds = builder.constant([*levels.thresholds, *[np.inf] * (size - len(levels))])
    half = size // 2
    code = ""
    while half:
        middle = builder.constant(half - 1, np.int32)
        where = builder.add("Add", code, middle) if code else middle
        above = builder.add("GreaterOrEqual", u, builder.add("Gather", thresholds, where))
        step = builder.add("Mul", builder.add("Cast", above, to=6), builder.constant(half, np.int32))
        code = builder.add("Add", code, step) if code else step
        half //= 2
    return code
