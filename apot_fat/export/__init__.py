"""Networks as other programs run them: files and their kinds."""

from apot_fat.export.onnx import OnnxReport, export_onnx
from apot_fat.export.writers import WRITERS, Export, FileKind

__all__ = [
    "WRITERS",
    "Export",
    "FileKind",
    "OnnxReport",
    "export_onnx",
]
