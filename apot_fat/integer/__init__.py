"""A whole network in integer arithmetic, from pixels to logits."""

from apot_fat.integer.lowering import integer_program
from apot_fat.integer.program import IntegerProgram

__all__ = ["IntegerProgram", "integer_program"]
