"""Networks as other programs run them: ONNX files; and integer-only inference as their proof."""

from apot_fat.export.integer import Divergence, IntegerLayer, compare_networks, integer_network, simulated_accumulator
from apot_fat.export.onnx import OnnxReport, export_onnx
from apot_fat.export.writers import WRITERS, Export, FileKind
from apot_fat.integer import IntegerProgram, integer_program

__all__ = [
    "WRITERS",
    "Divergence",
    "Export",
    "FileKind",
    "IntegerLayer",
    "IntegerProgram",
    "OnnxReport",
    "compare_networks",
    "export_onnx",
    "integer_network",
    "integer_program",
    "simulated_accumulator",
]
