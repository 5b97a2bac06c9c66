"""Convolutions and linear layers of quantized operands in the float arithmetic of an ONNX graph.

Their operands are the numerators of the levels, whole numbers whose sums of products float32 holds exactly: these are
the same in whatever order a runtime adds. One factor and one offset a channel follow, batch normalisation included,
rounded about once instead of at each step: a value within the last bits of a threshold becomes another level, so that
every rounding less is a file that decides as exact arithmetic does on more inputs.

A first convolution, whose input is float, takes it as whole numbers of steps, which sum exactly too, and rests.

Legend: Σ the sum of products, T the factor, B the offset, g a power of two.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np

from apot_fat.export.graph import PROJECT, GraphBuilder, Projection, emit_projection, mark_index

if TYPE_CHECKING:
    import onnx

RESCALE = "Rescale"
"""The mark for what makes a layer's output of its sums; its ``index`` says which ``Rescaling``. Where the input is
float, its first operand are the sums over the whole parts of the input and its second those over the rests."""
EXACT_FLOAT = 1 << 24
"""Integers up to here are float32 numbers."""
SPLIT_SUMS = 1 << 18
"""Largest sums over whole numbers of steps: exact, with bits left for the factor, and steps much finer than levels."""


@dataclass(frozen=True)
class Rescaling:
    """What makes a layer's output of its sums.

    Equation: y = T Σ + B.

    Args:
        factor: T, float64 (C_out,).
        offset: B, float64 (C_out,).
        largest: the largest |Σ| that can occur, float64 (C_out,).
        inner: how many dimensions of the output lie behind its channels.
    """

    factor: np.ndarray
    offset: np.ndarray
    largest: np.ndarray
    inner: int

    def then_batch_norm(
        self, weight: np.ndarray, bias: np.ndarray, mean: np.ndarray, var: np.ndarray, eps: float
    ) -> Rescaling:
        """The same with a batch normalisation behind it; all (C_out,)."""
        factor = weight.astype(float) / np.sqrt(var.astype(float) + eps)
        return replace(self, factor=self.factor * factor, offset=(self.offset - mean) * factor + bias)


def write_floats(model: onnx.ModelProto, projections: list[Projection], rescalings: list[Rescaling]) -> onnx.ModelProto:
    """The same model with every mark written out in float arithmetic.

    Args:
        model: with ``Project`` and ``Rescale`` nodes.
        projections: what the first stand for.
        rescalings: what the others stand for.
    """
    builder = GraphBuilder(model)
    written: set[str] = set()
    for node in model.graph.node:
        projection, rescaling = mark_index(node, PROJECT), mark_index(node, RESCALE)
        if projection is not None:
            emit_projection(builder, node.input[0], projections[projection], node.output[0])
        elif rescaling is not None:
            scale, output = _with_batch_norm(builder, rescalings[rescaling], node)
            _emit_rescaling(builder, list(node.input), scale, output)
            written.add(output)
        elif not written.intersection(node.output):
            builder.nodes.append(node)
    return builder.finish()


def _with_batch_norm(builder: GraphBuilder, scale: Rescaling, node: onnx.NodeProto) -> tuple[Rescaling, str]:
    # with the batch norm that alone takes the output of a convolution, and whose output it then is
    output = node.output[0]
    norm = builder.only_consumer(output)
    if norm is None or norm.op_type != "BatchNormalization" or not scale.inner:
        return scale, output
    weight, bias, mean, var = (builder.array(name) for name in norm.input[1:5])
    eps = next((attribute.f for attribute in norm.attribute if attribute.name == "epsilon"), 1e-5)
    if weight is None or bias is None or mean is None or var is None:
        return scale, output
    return scale.then_batch_norm(weight, bias, mean, var, eps), norm.output[0]


def _emit_rescaling(builder: GraphBuilder, sums: list[str], scale: Rescaling, output: str) -> None:
    """y = (Σ T_g + B_g) + (Σ (T − T_g) + (B − B_g)), T_g and B_g multiples of g.

    The first bracket is exact, and the second as much smaller as T has bits in units of g: 22 less those of Σ.
    """
    shape = (-1, *[1] * scale.inner)
    # |T Σ + B| <= 2^22 g, and T_g Σ differs from T Σ by 2^24 g / 2 at most: 24 bits in all
    reach = scale.largest * np.abs(scale.factor) + np.abs(scale.offset)
    g = np.exp2(np.ceil(np.log2(np.maximum(reach, np.finfo(np.float32).tiny))) - 22)
    coarse = [np.round(value / g) * g for value in (scale.factor, scale.offset)]
    fine = [scale.factor - coarse[0], scale.offset - coarse[1]]
    # both products read the sums, so that no runtime can fold one factor into the weights
    parts = []
    for factor, offset in (coarse, fine):
        product = builder.add("Mul", sums[0], builder.constant(factor.reshape(shape)))
        parts.append(builder.add("Add", product, builder.constant(offset.reshape(shape))))
    for rest in sums[1:]:
        product = builder.add("Mul", rest, builder.constant(scale.factor.reshape(shape)))
        parts[1] = builder.add("Add", parts[1], product)
    builder.add("Add", *parts, output=output)
