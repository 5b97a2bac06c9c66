"""The files that ``scripts/export.py --to`` writes: a new kind is a function here and its line in ``WRITERS``."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from torch import Tensor, nn

from apot_fat.checkpoint import PACKED_SUFFIX, save_packed
from apot_fat.export.onnx import ExportMode, export_onnx

Writer = Callable[[nn.Module, Path, tuple[int, ...], Tensor | None, ExportMode], str]
"""Network in evaluation mode, file, its input's shape, images to compare on or None, arithmetic → what to log."""


def write_onnx(
    model: nn.Module, path: Path, input_shape: tuple[int, ...], images: Tensor | None, mode: ExportMode
) -> str:
    """An ONNX file, see ``export_onnx``."""
    report = export_onnx(model, path, input_shape, mode, verify_with=images)
    inputs = f"{len(images)} images" if images is not None else "noise"
    return (
        f"{report.integer_convs} of {report.quantized_layers} quantized layers in integers; compared with PyTorch on "
        f"{inputs}: median error {report.error:.2g} of the norm (allowed: {report.max_error:.2g}), same largest output "
        f"for {report.agreement:.1%}"
    )


def write_packed(
    model: nn.Module, path: Path, input_shape: tuple[int, ...], images: Tensor | None, mode: ExportMode
) -> str:
    """A packed file, see ``save_packed``."""
    return f"{save_packed(model, path):,} bytes"


class FileKind(NamedTuple):
    """A kind of file: the suffix that is custom, and what writes it."""

    suffix: str
    write: Writer


WRITERS = {"onnx": FileKind(".onnx", write_onnx), "packed": FileKind(PACKED_SUFFIX, write_packed)}
