"""Networks as files that other programs run."""

from apot_fat.export.onnx import OnnxReport, export_onnx

__all__ = ["OnnxReport", "export_onnx"]
