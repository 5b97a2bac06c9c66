"""Networks as other programs run them: ONNX files; and integer-only inference as their proof."""

from apot_fat.export.integer import Divergence, IntegerLayer, compare_networks, integer_network, simulated_accumulator
from apot_fat.export.onnx import OnnxReport, export_onnx
from apot_fat.export.writers import WRITERS, FileKind

__all__ = [
    "WRITERS",
    "Divergence",
    "FileKind",
    "IntegerLayer",
    "OnnxReport",
    "compare_networks",
    "export_onnx",
    "integer_network",
    "simulated_accumulator",
]
