"""The files that ``apot-fat export --to`` writes: a new kind is a function here and its line in ``WRITERS``."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
from torch import Tensor, nn

from apot_fat.checkpoint import PACKED_SUFFIX, atomic_write, save_packed
from apot_fat.export.onnx import ExportMode, export_onnx
from apot_fat.integer import IntegerProgram, integer_program, to_pixels
from apot_fat.integer.c import Products, c_source, check_c_file
from apot_fat.integer.qonnx import clean_qonnx, qonnx_model, run_qonnx
from apot_fat.integer.vectors import hexadecimal, narrowest, vectors
from apot_fat.integer.verilog import check_verilog_file, verilog_files
from apot_fat.quant.layers import AnyQuantized

Array = np.ndarray
EXECUTED = 10
"""Images whose logits are compared where a file is executed."""
VECTORS = 2
"""Images whose vectors are written."""


@dataclass(frozen=True)
class Export:
    """What is to be written.

    Args:
        model: the network, in evaluation mode.
        path: the file.
        input_shape: (C, H, W) of an image.
        images: normalised images to measure ranges and compare on, or None.
        mean, std: what they were normalised with, a number a channel in units of 255.
        mode: arithmetic of an ONNX file.
        products: how C multiplies by a weight.
        grid_bits, accumulator_bits: see ``integer_program``.
        channels_last: whether QONNX's images are (H, W, C).
    """

    model: nn.Module
    path: Path
    input_shape: tuple[int, ...]
    images: Tensor | None
    mean: Sequence[float]
    std: Sequence[float]
    mode: ExportMode = "float"
    products: Products = "shift"
    grid_bits: int = 24
    accumulator_bits: int = 31
    channels_last: bool = False


def write_onnx(export: Export) -> str:
    """An ONNX file, see ``export_onnx``."""
    images = export.images
    report = export_onnx(export.model, export.path, export.input_shape, export.mode, verify_with=images)
    inputs = f"{len(images)} images" if images is not None else "noise"
    return (
        f"{report.integer_convs} of {report.quantized_layers} quantized layers in integers; compared with PyTorch on "
        f"{inputs}: median error {report.error:.2g} of the norm (allowed: {report.max_error:.2g}), same largest output "
        f"for {report.agreement:.1%}"
    )


def write_packed(export: Export) -> str:
    """A packed file, see ``save_packed``."""
    return f"{save_packed(export.model, export.path, mean=export.mean, std=export.std):,} bytes"


def write_c(export: Export) -> str:
    """A C99 source and, beside it, its header; see ``integer_program`` and ``c_source``."""
    program, _, measured = _program(export, "c")
    written = c_source(program, export.path.stem, export.products)
    for path, text in ((export.path.with_suffix(".h"), written.header), (export.path, written.source)):
        with atomic_write(path) as temporary:
            temporary.write_text(text, encoding="ascii")
    return (
        f"and {export.path.with_suffix('.h').name}: {written.constants:,} bytes of weights and tables, {written.ram:,} "
        f"bytes of buffers; {measured}"
    )


def write_qonnx(export: Export) -> str:
    """A cleaned QONNX graph, which the qonnx package has executed; see ``qonnx_model``."""
    program, pixels, measured = _program(export, "qonnx")
    model = clean_qonnx(qonnx_model(program, export.channels_last))
    pixels = pixels[:EXECUTED]
    logits = run_qonnx(model, pixels.transpose(0, 2, 3, 1) if export.channels_last else pixels)
    assert np.array_equal(logits, program.run(pixels)), "QONNX's logits are not the program's"
    with atomic_write(export.path) as temporary:
        temporary.write_bytes(model.SerializeToString())
    return f"{len(model.graph.node)} nodes, executed by qonnx: all logits of {len(pixels)} images; {measured}"


def write_vectors(export: Export) -> str:
    """Golden vectors, see ``vectors``: an .npz, and a folder of files for ``$readmemh``."""
    program, pixels, measured = _program(export, "vectors")
    made = list(vectors(program, pixels[:VECTORS]))
    folder = _folder_of(export.path)
    for name, values, bits in made:
        with atomic_write(folder / f"{name}.hex") as temporary:
            temporary.write_text(hexadecimal(values, bits), encoding="ascii")
    with atomic_write(export.path) as temporary, temporary.open("wb") as file:
        np.savez_compressed(file, allow_pickle=False, **{name: narrowest(values) for name, values, _ in made})
    return f"and {folder.name}/: {len(made)} vectors of {VECTORS} images; {measured}"


def write_verilog(export: Export) -> str:
    """The processing element of the low-bit layers and its test bench, see ``verilog_files``."""
    program, pixels, _ = _program(export, "verilog")
    layers = dict(export.model.named_modules())
    specs = {
        operation.name: layer.spec
        for operation in program.operations
        if isinstance(layer := layers.get(operation.name), AnyQuantized) and layer.act_alpha is not None
    }
    files, said = verilog_files(program, specs, pixels[:1], export.path.stem)
    for name, text in files.items():
        with atomic_write(export.path.with_name(name)) as temporary:
            temporary.write_text(text, encoding="ascii")
    return f"and {', '.join(list(files)[1:])}: {said}"


def _folder_of(path: Path) -> Path:
    return path.with_name(f"{path.stem}_hex")


def _check_vectors(path: Path) -> None:
    if _folder_of(path).exists() and not _folder_of(path).is_dir():
        raise ValueError(f"{_folder_of(path)}: is there, and no folder to write vectors to; give {path} another name")


def _program(export: Export, to: str) -> tuple[IntegerProgram, Array, str]:
    # the network in integers, its images as pixels, and what to say of its ranges
    if export.images is None:
        raise ValueError(f"--to {to}: the ranges of what is added are measured on images: name some with --data")
    images, mean, std = export.images, export.mean, export.std
    bits = {"grid_bits": export.grid_bits, "accumulator_bits": export.accumulator_bits}
    program = integer_program(export.model, images, mean=mean, std=std, **bits)
    return program, to_pixels(images, mean, std), f"ranges measured on {len(images)} images"


def _any_name(path: Path) -> None:
    """Every name will do."""


_IMAGES = ("data", "mean", "std")
_PROGRAM = (*_IMAGES, "grid_bits", "accumulator_bits")


class FileKind(NamedTuple):
    """A kind of file.

    ``suffix``: the one that is custom; ``write``: what writes it and says what to log; ``check_name``: what raises
    ``ValueError`` of a name that will not do; ``beside``: suffixes of what is written beside it; ``takes``: the options
    that make a difference to it, of those that not every kind has.
    """

    suffix: str
    write: Callable[[Export], str]
    check_name: Callable[[Path], None] = _any_name
    beside: tuple[str, ...] = ()
    takes: tuple[str, ...] = _IMAGES


WRITERS = {
    "onnx": FileKind(".onnx", write_onnx, takes=(*_IMAGES, "mode")),
    "packed": FileKind(PACKED_SUFFIX, write_packed, takes=()),
    "qonnx": FileKind(".onnx", write_qonnx, takes=(*_PROGRAM, "channels_last")),
    "c": FileKind(".c", write_c, check_c_file, (".h",), (*_PROGRAM, "multiply")),
    "verilog": FileKind(".v", write_verilog, check_verilog_file, takes=_PROGRAM),
    "vectors": FileKind(".npz", write_vectors, _check_vectors, takes=_PROGRAM),
}
