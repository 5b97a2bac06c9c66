"""The processing element of a level family in Verilog, and its test bench of sums that occur in a network.

A weight of a family of magnitudes is a sign and fields, each of which selects 0 or a shift of the input; any other is
of two's complement, and multiplies. What adds up is the same for all, so that they can be compared.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from string import Template

import numpy as np

from apot_fat.integer.program import Convolution, IntegerProgram, width
from apot_fat.integer.vectors import hexadecimal
from apot_fat.quant.levels import SIGNED_FAMILIES, apot_base_sets, level_set
from apot_fat.quant.spec import QuantSpec

Array = np.ndarray
SUMS_OF_A_LAYER = 8
"""In a test bench."""


@dataclass(frozen=True)
class WeightCode:
    """How a weight of a level family lies in bits.

    APoT, powers of two and uniform: the highest bit is the sign, 1 below 0; under it lies the magnitude, a field for
    each set whose members are added, the first lowest: APoT's base sets; all powers of two; or each bit's 0 and 2^k. A
    field is the number of the member, and member 0 is 0. Others: two's complement.

    Args:
        family: ``apot``, ``pot``, ``uniform``, ``twos-complement`` or ``odd``.
        bits: of a weight as networks count them, its sign included; 2 to 8.

    >>> code = WeightCode("apot", 4)
    >>> code.fields, code.encode(np.array([-10, 3])).tolist()
    (((0, 1, 4, 8), (0, 2)), [15, 5])
    """

    family: str
    bits: int

    @property
    def fields(self) -> tuple[tuple[int, ...], ...]:
        """The members that each field of a magnitude selects from; no fields in two's complement."""
        if self.family == "apot":
            return tuple(apot_base_sets(self.bits - 1))
        if self.family == "uniform":
            return tuple((0, 1 << place) for place in range(self.bits - 1))
        return (level_set("pot", self.bits - 1).numerators,) if self.family == "pot" else ()

    @cached_property
    def numerators(self) -> tuple[int, ...]:
        """All weights, rising."""
        is_signed = self.family in SIGNED_FAMILIES
        return level_set(self.family, self.bits - (not is_signed)).signed_numerators

    @property
    def largest(self) -> int:
        """The largest magnitude."""
        return max(-self.numerators[0], self.numerators[-1])

    @property
    def width(self) -> int:
        """Bits of a code."""
        return self.bits if self.fields else width(self.numerators[0], self.numerators[-1])

    def encode(self, numerators: Array) -> Array:
        """The codes, ≥ 0, of weights."""
        if not self.fields:
            return numerators & (1 << self.width) - 1
        magnitudes, codes, place = np.zeros(1, np.int64), np.zeros(1, np.int64), 0
        for members in self.fields:
            magnitudes = np.add.outer(members, magnitudes).ravel()
            codes = np.add.outer(np.arange(len(members)) << place, codes).ravel()
            place += _field_bits(members)
        order = np.argsort(magnitudes)
        found = codes[order][np.searchsorted(magnitudes[order], np.abs(numerators))]
        return found | (numerators < 0) << place


def mac_module(code: WeightCode, name: str, x: tuple[int, int], largest_sum: int) -> str:
    """A multiply-accumulate in Verilog.

    Args:
        code: of its weights.
        name: of the module.
        x: smallest and largest input.
        largest_sum: the magnitude that the sum must hold.
    """
    values = {
        "levels": f"{code.family} weights of {code.bits} bits, integers to {code.largest}",
        "encoding": _encoding(code),
        "name": name,
        "x_bits": width(*x),
        "x_signed": int(x[0] < 0),
        "sum_bits": width(-largest_sum, largest_sum),
        "w_top": code.width - 1,
        "grown": code.largest.bit_length() + 1,
        "product": "\n".join(f"    {line}" for line in _product(code)),
    }
    return _template("mac.v").substitute(values)


def verilog_files(
    program: IntegerProgram, specs: Mapping[str, QuantSpec], pixels: Array, name: str
) -> tuple[dict[str, str], str]:
    """The processing element of a network's low-bit layers, and a test bench of sums that occur in it.

    Args:
        program: the network.
        specs: by name the variants of the layers that quantize their input. The element is that of the first, and of
            all whose weights have its levels.
        pixels: an image, uint8 (1, C, H, W).
        name: of the module, as Verilog spells names.

    Returns:
        NAME.v, NAME_tb.v, NAME_terms.hex and NAME_sums.hex, their texts by their names; and what they hold, in words.

    Raises:
        ValueError: no layer quantizes its input.
    """
    if not specs:
        raise ValueError("no layer quantizes its input: there are no low-bit products to make")
    codes = {layer: WeightCode(spec.weight_levels, spec.weight_bits) for layer, spec in specs.items()}
    code = next(iter(codes.values()))
    operations, results = program.operations, list(program.results(pixels))
    layers = [
        (operation, operation.inputs[0], result)
        for operation, result in zip(operations, results, strict=True)
        if isinstance(operation, Convolution) and codes.get(operation.name) == code
    ]
    x = min(operations[read].low for _, read, _ in layers), max(operations[read].high for _, read, _ in layers)
    largest_sum = max(operation.largest_sum for operation, _, _ in layers)
    rng = np.random.default_rng(0)
    terms, sums = [], []
    for operation, read, (result,) in layers:
        for _ in range(SUMS_OF_A_LAYER):
            channel, row, column = (int(rng.integers(size)) for size in operation.shape)
            weights, inputs = _terms(operation, results[read][0], channel, row, column)
            last = np.arange(len(weights)) == len(weights) - 1
            terms.append((last << code.width | code.encode(weights)) << width(*x) | inputs & (1 << width(*x)) - 1)
            sums.append(int(result[channel, row, column]))
    term_bits, sum_bits = 1 + code.width + width(*x), width(-largest_sum, largest_sum)
    listed = np.concatenate(terms)
    bench = {
        "name": name,
        "term_top": term_bits - 1,
        "last_term": len(listed) - 1,
        "sum_top": sum_bits - 1,
        "last_sum": len(sums) - 1,
        "w_top": code.width - 1,
        "x_top": width(*x) - 1,
    }
    files = {
        f"{name}.v": mac_module(code, name, x, largest_sum),
        f"{name}_tb.v": _template("mac_tb.v").substitute(bench),
        f"{name}_terms.hex": hexadecimal(listed, term_bits),
        f"{name}_sums.hex": hexadecimal(np.array(sums), sum_bits),
    }
    return files, f"{code.family} weights of {code.bits} bits; {len(sums)} sums of {len(layers)} layers"


def check_verilog_file(path: Path) -> None:
    """Raise ``ValueError`` unless a file's name is one that a module can have, and ends in .v."""
    if path.suffix != ".v" or not re.fullmatch(r"[A-Za-z]\w*", path.stem, re.ASCII):
        raise ValueError(f"{path}: names a module of Verilog; letters, digits and underscores and .v, such as mac.v")


def _terms(operation: Convolution, x_CHW: Array, channel: int, row: int, column: int) -> tuple[Array, Array]:
    # weights and inputs of one sum, padded zeros included
    inputs, *kernel = operation.weight_OIHW.shape[1:]
    group = channel // (len(operation.weight_OIHW) // operation.groups)
    (top, left), (down, right) = operation.padding, operation.stride
    padded = np.pad(x_CHW[group * inputs : (group + 1) * inputs], ((0, 0), (top, top), (left, left)))
    rows, columns = (
        start * stride + dilation * np.arange(size)
        for start, stride, dilation, size in zip((row, column), (down, right), operation.dilation, kernel, strict=True)
    )
    return operation.weight_OIHW[channel].ravel(), padded[:, rows][:, :, columns].ravel()


def _field_bits(members: Sequence[int]) -> int:
    return (len(members) - 1).bit_length()


def _fields(code: WeightCode) -> Iterator[tuple[str, Sequence[int]]]:
    # the bits of each field, and its members
    low = 0
    for members in code.fields:
        high = low + _field_bits(members) - 1
        yield f"weight[{high}:{low}]" if high > low else f"weight[{low}]", members
        low = high + 1


def _encoding(code: WeightCode) -> str:
    if not code.fields:
        return "A weight is of two's complement."
    fields = (f"{bits} selects from {', '.join(map(str, members))}" for bits, members in _fields(code))
    return "\n * ".join(
        [
            "Of a weight",
            *(f"{field};" for field in fields),
            f"their sum is the magnitude, weight[{code.width - 1}] the sign.",
        ]
    )


def _product(code: WeightCode) -> list[str]:
    add = ["always @(posedge clock)", "    if (enable)", "        sum <= before + product;"]
    if not code.fields:
        factor = f"wire signed [{code.width - 1}:0] factor = weight;"
        return [factor, "wire signed [P_BITS-1:0] product = value * factor;", *add]
    lines = [f"reg signed [P_BITS-1:0] {', '.join(f'field{i}' for i in range(len(code.fields)))};", "always @* begin"]
    for i, (bits, members) in enumerate(_fields(code)):
        if code.family == "pot":
            lines.append(f"    field{i} = {bits} ? (value <<< {bits}) >>> 1 : 0;")
            continue
        lines.append(f"    case ({bits})")
        shifts = enumerate(member.bit_length() - 1 for member in members if member)
        lines += [f"        {number + 1}: field{i} = value <<< {shift};" for number, shift in shifts]
        lines += [f"        default: field{i} = 0;", "    endcase"]
    negative = f"weight[{code.width - 1}]"
    return [
        *lines,
        "end",
        f"wire signed [SUM_BITS-1:0] magnitude = {' + '.join(f'field{i}' for i in range(len(code.fields)))};",
        f"wire [SUM_BITS-1:0] product = magnitude ^ {{SUM_BITS{{{negative}}}}};",
        *add[:2],
        f"        sum <= before + product + {negative}; // of two's complement: all bits turned, and 1",
    ]


def _template(name: str) -> Template:
    return Template((Path(__file__).parent / name).read_text(encoding="utf-8"))
