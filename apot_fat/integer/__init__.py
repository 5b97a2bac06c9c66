"""Networks in integer arithmetic: whole, from pixels to logits (``integer_program``), and layer by layer as their proof
(``integer_reference``)."""

from apot_fat.integer.lowering import integer_program
from apot_fat.integer.pixels import to_pixels
from apot_fat.integer.program import IntegerProgram
from apot_fat.integer.reference import (
    Divergence,
    IntegerLayer,
    compare_networks,
    integer_reference,
    simulated_accumulator,
)

__all__ = [
    "Divergence",
    "IntegerLayer",
    "IntegerProgram",
    "compare_networks",
    "integer_program",
    "integer_reference",
    "simulated_accumulator",
    "to_pixels",
]
