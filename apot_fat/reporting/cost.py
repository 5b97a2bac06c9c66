"""What a network costs to store and to run: size, multiplications, bit-operations, shifts and adds."""

from __future__ import annotations

import copy
import csv
import io
import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any

import torch
from torch import Tensor, nn

from apot_fat.quant.input_shape import run_on, split_batch, zeros_for
from apot_fat.quant.integers import integer_weight, shift_terms
from apot_fat.quant.layers import AnyQuantized
from apot_fat.quant.spec import FLOAT_BITS
from apot_fat.text import aligned, csv_cell, html_table

FLOAT_BYTES = FLOAT_BITS // 8
OTHERS = "(others)"
TOTAL = "total"
_SIZES = ("parameters", "float32 B", "packed B")
_OPERATIONS = ("MACs", "bit-operations", "shift-adds", "float %")
_HEAD = ("layer", "kind", "weight", "input", *_SIZES, *_OPERATIONS)


@dataclass(frozen=True)
class LayerCost:
    """What a layer costs.

    Args:
        name: as in ``named_modules``; ``(others)`` for what no convolution or linear layer owns, ``total`` for the sum.
        kind: the layer's class; empty for the last two.
        weight_bits, act_bits: bits of a weight and of an input, 32 for float; None for the last two.
        parameters: numbers that training learns: weight, bias, thresholds, FAT's matrix. What two layers share counts
            for the first.
        float32_bytes: weight, bias and statistics of normalisation in float32: the full-precision network.
        packed_bytes: the weight's codes, packed to the bit and rounded up to a byte, and in float32 the thresholds (for
            8-bit weights the scale), bias and statistics. FAT's matrix is in the codes.
        macs: multiply-accumulates of all calls, those of zero padding included.
        bit_operations: macs · weight_bits · act_bits.
        shift_adds: where weight and input are quantized, additions of shifted inputs in place of the macs: of each
            weight the powers of two it is made of (``shift_terms``), at every output position.
        float_macs: macs with a float weight or input.
    """

    name: str
    kind: str
    weight_bits: int | None
    act_bits: int | None
    parameters: int
    float32_bytes: int
    packed_bytes: int
    macs: int
    bit_operations: int
    shift_adds: int
    float_macs: int

    @property
    def float_share(self) -> float:
        """Share of the multiply-accumulates that stays float, 0 to 1; 0 where there are none."""
        return self.float_macs / self.macs if self.macs else 0.0


@dataclass(frozen=True)
class CostReport:
    """What a network costs for one input, layer by layer.

    Args:
        input_shape: (N, C, H, W), or that of the tensor given.
        rows: one a convolution or linear layer, in the order of definition; last the others.
    """

    input_shape: tuple[int, ...]
    rows: tuple[LayerCost, ...]

    @property
    def total(self) -> LayerCost:
        """The sum of all rows."""
        summed = [field.name for field in fields(LayerCost)][4:]
        return LayerCost(TOTAL, "", None, None, *(sum(getattr(row, name) for row in self.rows) for name in summed))

    def table(self) -> str:
        """All rows and the total, aligned; ``float %`` is the share of the multiply-accumulates left in float."""
        return aligned(*self._columns())

    def _repr_html_(self) -> str:
        return html_table(*self._columns())

    def _columns(self) -> tuple[Sequence[str], Sequence[Sequence[str]], Sequence[str]]:
        return _HEAD, [_cells(row) for row in (*self.rows, self.total)], ("layer", "kind")

    def to_csv(self) -> str:
        """All rows and the total as comma-separated values under the names of ``LayerCost``."""
        text = io.StringIO()
        writer = csv.DictWriter(text, [field.name for field in fields(LayerCost)], lineterminator="\n")
        writer.writeheader()
        for row in (*self.rows, self.total):
            writer.writerow({name: csv_cell(value) for name, value in asdict(row).items()})
        return text.getvalue()

    def to_json(self) -> str:
        """``input_shape``, ``layers`` and ``total`` as JSON."""
        layers = [asdict(row) for row in self.rows]
        return json.dumps({"input_shape": self.input_shape, "layers": layers, "total": asdict(self.total)}, indent=2)


def cost_report(model: nn.Module, input_shape: Sequence[int] | Tensor) -> CostReport:
    """What a network costs to store and to run on an input.

    Every ``nn.Conv2d`` and ``nn.Linear`` counts, quantized or not; of normalisation, activations and pooling only the
    parameters and statistics do. Sizes are found by one forward of a copy, on zeros or the tensor given.

    Args:
        model: any network; left as it is.
        input_shape: (C, H, W) of one image, or (N, C, H, W): then operations are those of N images. Of a network that
            takes something else, such as tokens, the tensor that it takes.

    Raises:
        ValueError: another shape, or one that the network refuses.

    >>> from apot_fat import QuantConv2d
    >>> layer = QuantConv2d(2, 3, 3, bit=3)
    >>> cost_report(layer, (2, 4, 4)).total.macs  # 3 channels at 2 × 2 positions, 2 · 3 · 3 weights each
    216
    """
    if isinstance(input_shape, Tensor):
        x = input_shape
    else:
        count, one = split_batch(input_shape, images=True)
        x = zeros_for(model, (count, *one))
    model = copy.deepcopy(model).eval()
    positions = _output_positions(model, x)
    seen: set[int] = set()
    rows = [_layer_cost(name, layer, positions[name], seen) for name, layer in _layers(model)]
    rest = _sizes(model.parameters(), seen), _sizes((b for b in model.buffers() if b.is_floating_point()), seen)
    size = sum(rest) * FLOAT_BYTES
    others = LayerCost(OTHERS, "", None, None, rest[0], size, size, 0, 0, 0, 0)
    return CostReport(tuple(x.shape), (*rows, others))


def _layers(model: nn.Module) -> list[tuple[str, nn.Conv2d | nn.Linear]]:
    return [(name, layer) for name, layer in model.named_modules() if isinstance(layer, nn.Conv2d | nn.Linear)]


def _output_positions(model: nn.Module, x: Tensor) -> dict[str, int]:
    # of each layer: output positions of all inputs and calls
    positions = {name: 0 for name, _ in _layers(model)}

    def counter(name: str, outputs: int) -> Callable[[Any, Any, Tensor], None]:
        def count(layer: nn.Module, args: Any, y: Tensor) -> None:
            positions[name] += y.numel() // outputs

        return count

    for name, layer in _layers(model):
        layer.register_forward_hook(counter(name, layer.weight.shape[0]))
    run_on(model, x)
    return positions


def _layer_cost(name: str, layer: nn.Conv2d | nn.Linear, positions: int, seen: set[int]) -> LayerCost:
    weight_bits, act_bits, scales = _quantizers(layer)
    weights = _sizes([layer.weight], seen)
    biases = _sizes([] if layer.bias is None else [layer.bias], seen)
    parameters = weights + biases + _sizes(layer.parameters(), seen)
    codes = FLOAT_BYTES * weights if weight_bits == FLOAT_BITS else -(-weights * weight_bits // 8)
    macs = layer.weight.numel() * positions
    is_float = FLOAT_BITS in (weight_bits, act_bits)
    return LayerCost(
        name=name or type(layer).__name__,
        kind=type(layer).__name__,
        weight_bits=weight_bits,
        act_bits=act_bits,
        parameters=parameters,
        float32_bytes=FLOAT_BYTES * (weights + biases),
        packed_bytes=codes + FLOAT_BYTES * (biases + scales),
        macs=macs,
        bit_operations=macs * weight_bits * act_bits,
        shift_adds=0 if is_float else _terms(layer) * positions,
        float_macs=macs if is_float else 0,
    )


def _quantizers(layer: nn.Module) -> tuple[int, int, int]:
    # bits of weight and input as they are computed with, and how many scales they count in
    if not isinstance(layer, AnyQuantized):
        return FLOAT_BITS, FLOAT_BITS, 0
    scale, alpha = layer.weight_scale(), layer.act_alpha
    weight_bits = FLOAT_BITS if scale is None else layer.spec.weight_bits
    return weight_bits, layer.spec.act_bits, sum(s.numel() for s in (scale, alpha) if s is not None)


def _terms(layer: nn.Module) -> int:
    if isinstance(layer, AnyQuantized) and layer.spec.weight_set.is_pot:
        return int(layer.quantized_weight().count_nonzero())  # one each; some have no integers of reasonable size
    weight = integer_weight(layer)
    assert weight is not None  # its bits are not float's
    occurrences = weight.numerators.abs().flatten().bincount()  # few values: far faster than terms weight by weight
    counts = shift_terms(torch.arange(len(occurrences), device=occurrences.device)).counts
    return int((counts * occurrences).sum())


def _sizes(tensors: Iterable[Tensor], seen: set[int]) -> int:
    # elements of those not seen yet
    fresh = {id(tensor): tensor.numel() for tensor in tensors if id(tensor) not in seen}
    seen.update(fresh)
    return sum(fresh.values())


def _cells(row: LayerCost) -> tuple[str, ...]:
    bits = ("–" if n is None else str(n) for n in (row.weight_bits, row.act_bits))
    counts = (row.parameters, row.float32_bytes, row.packed_bytes, row.macs, row.bit_operations, row.shift_adds)
    share = f"{100 * row.float_share:.2f}" if row.macs else "–"
    return row.name, row.kind or "–", *bits, *(f"{n:,}" for n in counts), share
