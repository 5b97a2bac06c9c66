"""Golden vectors of an integer program: what goes in, what each operation gives, and all constants."""

from __future__ import annotations

import re
from collections.abc import Iterator

import numpy as np

from apot_fat.integer.program import Convolution, IntegerProgram, Lookup, Rescale, Thresholds, width

Array = np.ndarray


def vectors(program: IntegerProgram, pixels: Array) -> Iterator[tuple[str, Array, int]]:
    """Name, integers and width of each vector, in the order in which hardware meets them.

    ``pixels``; then, for the operation of each number N made of a layer, ``N_layer``, its result (images, C, H, W),
    preceded by its constants, such as ``N_layer.weight``; last ``logits`` (images, classes). A width is that of
    two's complement if one of the values may be negative.

    Args:
        program: the program.
        pixels: uint8, (images, C, H, W).
    """
    yield "pixels", pixels, 8
    for number, (operation, result) in enumerate(zip(program.operations, program.results(pixels), strict=True)):
        name = f"{number:0{len(str(len(program.operations)))}}_{re.sub(r'[^A-Za-z0-9.]', '_', operation.name)}"
        constants: dict[str, Array] = {}
        if isinstance(operation, Convolution):
            constants = {"weight": operation.weight_OIHW}
        elif isinstance(operation, Thresholds):
            levels = np.array(operation.levels)
            constants = {"thresholds": operation.thresholds_CT, "falls": operation.falls_C, "levels": levels}
        elif isinstance(operation, Rescale):
            constants = {"factor": operation.factor_C, "addend": operation.addend_C, "shift": operation.shift_C}
        elif isinstance(operation, Lookup):
            constants = {"table": operation.table}
        for key, value in constants.items():
            integers = value.astype(np.int64)
            yield f"{name}.{key}", integers, width(int(integers.min(initial=0)), int(integers.max(initial=0)))
        yield name, result, operation.bits
    yield "logits", result.reshape(len(pixels), -1), operation.bits


def narrowest(values: Array) -> Array:
    """The values in the smallest of NumPy's types that holds them.

    >>> narrowest(np.array([0, 200])).dtype, narrowest(np.array([-4, 4])).dtype
    (dtype('uint8'), dtype('int8'))
    """
    low, high = int(values.min(initial=0)), int(values.max(initial=0))
    return values.astype(np.min_scalar_type(min(low, -high - 1) if low < 0 else high))


def hexadecimal(values: Array, bits: int) -> str:
    """Values as Verilog's ``$readmemh`` reads them: a line each, in as many digits as the width takes.

    Args:
        values: integers, written in the order of NumPy's (C's).
        bits: of each; negative ones are of two's complement.

    >>> print(hexadecimal(np.array([10, -1]), 6), end="")
    // 2, 6 bits
    0a
    3f
    """
    digits, mask = -(-bits // 4), (1 << bits) - 1
    lines = [f"{value & mask:0{digits}x}" for value in values.ravel().tolist()]
    return "\n".join([f"// {' x '.join(map(str, values.shape))}, {bits} bits", *lines, ""])
