"""A network as an ONNX file, in float arithmetic or with integer convolutions; checked before it is written."""

from __future__ import annotations

import copy
import importlib
import math
import os
import warnings
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, get_args

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from apot_fat.checkpoint import atomic_write
from apot_fat.export.float32 import EXACT_FLOAT, RESCALE, SPLIT_SUMS, Rescaling, write_floats
from apot_fat.export.graph import MARKS_DOMAIN, PROJECT, Projection, mark_index
from apot_fat.export.int8 import best_range, write_integers
from apot_fat.export.verification import open_session, parts_bar, verify, verifying_inputs
from apot_fat.optional import needed_for
from apot_fat.quant.all_layers import threshold_layers
from apot_fat.quant.convert import fold_weight
from apot_fat.quant.input_shape import run_on, split_batch, zeros_for
from apot_fat.quant.integers import Integers, integer_weight
from apot_fat.quant.layers import AnyQuantized

if TYPE_CHECKING:
    import onnx

ExportMode = Literal["float", "int8"]
OPSET = 20
INT8_LIMIT = 0.25
"""Largest relative error of an int8 file …"""
INT8_AGREEMENT = 0.9
"""… and smallest share of inputs with the same largest output."""
_CALIBRATION_IMAGES = 64


class OnnxReport(NamedTuple):
    """What was written.

    ``error``: median of ‖y_file − y‖ / ‖y‖ over the verifying inputs, and ``max_error`` what it was allowed to be;
    ``agreement``: share of them with the same largest output; ``integer_convs``: convolutions computed in integers, of
    ``quantized_layers``.
    """

    path: Path
    mode: ExportMode
    error: float
    max_error: float
    agreement: float
    integer_convs: int
    quantized_layers: int


def export_onnx(
    model: nn.Module,
    path: str | os.PathLike[str],
    input_shape: Sequence[int],
    mode: ExportMode = "float",
    *,
    verify_with: Tensor | None = None,
    max_error: float | None = None,
    min_agreement: float | None = None,
) -> OnnxReport:
    """Write a network as an ONNX file of standard operators that takes batches of any size.

    The file is first run with onnxruntime, compared with the network in PyTorch, and written only if they agree. The
    measure is the median over the inputs of ‖y_file − y‖ / ‖y‖: two programs add in different orders, and where a value
    lies within the last bit of a threshold they quantize it differently, which in a deep network of few bits may
    change one input's output by a tenth (so it does between PyTorch and PyTorch in another memory format).

    Args:
        model: any network, its quantized layers ``QuantConv2d`` and ``QuantLinear``; one input, one output. Exported as
            in evaluation, in float32; left as it is.
        path: the file; it appears whole or not at all.
        input_shape: of one input, such as (3, 32, 32); four numbers are (N, C, H, W), whatever N.
        mode: ``float`` computes in float arithmetic, with the numerators of the levels as operands wherever float32
            holds their sums exactly, see ``apot_fat.export.float32``. ``int8`` computes convolutions of quantized
            operands in integers, and their sums in bytes: faster, and close instead of equal, see
            ``apot_fat.export.int8``. What does not fit that form stays float.
        verify_with: a batch of such inputs to compare on, finite; for ``int8`` the ranges of sums are measured on them
            too, so that they should be real ones. By default a few normally distributed ones.
        max_error: largest median error. By default ``INT8_LIMIT``, or ``FLOAT_LIMIT`` or, where that is more, the
            median difference between PyTorch in float32 and in float64 times ``OWN_ERRORS`` (sums of levels may lie
            on thresholds exactly, where no batch norm follows).
        min_agreement: smallest share of inputs whose largest output is the same; by default ``INT8_AGREEMENT`` for
            ``int8`` on given inputs, and 0 for ``float`` and on noise, of which no network is sure.

    Raises:
        ValueError: onnx, onnxruntime or onnxscript missing, an unknown mode, a shape that is none or that the network
            refuses, inputs of another, a network that PyTorch cannot export, or a file that disagrees with the network.
    """
    if mode not in get_args(ExportMode):
        raise ValueError(f"mode {mode!r}: choose one of {', '.join(get_args(ExportMode))}")
    if mode == "int8" and not any(isinstance(module, AnyQuantized) for module in model.modules()):
        raise ValueError(f"mode 'int8': {type(model).__name__} holds no quantized layer; quantize it first")
    with needed_for("ONNX export"):
        for package in ("onnx", "onnxscript", "onnxruntime"):
            importlib.import_module(package)
    _, one = split_batch(input_shape)
    x = verifying_inputs(verify_with, one)
    reference = copy.deepcopy(model).to("cpu", torch.float32).eval()
    run_on(reference, zeros_for(reference, (1, *one)))
    graph, layers, rescalings = _trace(reference, one, float(x.abs().max()) if mode == "float" else None)
    projections = [projection for _, projection in layers]
    file, integer_convs = write_floats(graph, projections, rescalings), 0
    if mode == "int8":
        weights = [_integers(layer) for layer, _ in layers]
        numerators = [None if weight is None else weight.numerators.numpy() for weight in weights]
        ranges = _measure_ranges(file, graph, x)
        file, integer_convs = write_integers(graph, projections, numerators, ranges)
    content = file.SerializeToString()
    if max_error is None and mode == "int8":
        max_error = INT8_LIMIT
    if min_agreement is None:
        min_agreement = INT8_AGREEMENT if mode == "int8" and verify_with is not None else 0.0
    error, agreement, max_error = verify(content, reference, x, max_error)
    if not (error <= max_error and agreement >= min_agreement):
        raise ValueError(
            f"{path}: not written, since the {mode} file's outputs differ from the network's by {error:.2g} of their "
            f"norm (allowed: {max_error:.2g}) and agree on the largest for {agreement:.1%} of {len(x)} inputs "
            f"(required: {min_agreement:.0%}); verify with real inputs, or allow more with max_error and min_agreement"
        )
    with atomic_write(path) as temporary:
        temporary.write_bytes(content)
    quantized = sum(1 for _ in threshold_layers(reference))
    return OnnxReport(Path(path), mode, error, max_error, agreement, integer_convs, quantized)


class _Plain(nn.Module):
    """A layer with its quantized weight as the weight, and a mark where its input is quantized.

    With ``rescaling_index`` both operands are the numerators of their levels, and a mark stands for what makes the
    output of their product. With ``steps`` the input is float, and split: into whole numbers of steps, and rests.
    """

    projection_index: int | None
    rescaling_index: int | None
    relu: bool
    steps: float | None

    def forward(self, x: Tensor) -> Tensor:
        """y = product(x_q, w_q) + bias."""
        if self.projection_index is not None:
            x = _marked(PROJECT, self.projection_index, x)
        elif self.relu:
            x = F.relu(x)
        if self.rescaling_index is None:
            return self._product(x, self.bias)  # type: ignore[arg-type]
        if self.steps is None:
            return _marked(RESCALE, self.rescaling_index, self._product(x, None))
        x = x * self.steps
        whole = x.round()
        return _marked(RESCALE, self.rescaling_index, self._product(whole, None), self._product(x - whole, None))

    def _product(self, x: Tensor, bias: Tensor | None) -> Tensor:
        raise NotImplementedError


class _PlainConv2d(_Plain, nn.Conv2d):
    def _product(self, x: Tensor, bias: Tensor | None) -> Tensor:
        return self._conv_forward(x, self.weight, bias)


class _PlainLinear(_Plain, nn.Linear):
    def _product(self, x: Tensor, bias: Tensor | None) -> Tensor:
        return F.linear(x, self.weight, bias)


def _marked(mark: str, index: int, *inputs: Tensor) -> Tensor:
    x, name = inputs[0], f"{MARKS_DOMAIN}::{mark}"
    return torch.onnx.ops.symbolic(name, inputs, {"index": index}, dtype=x.dtype, shape=x.shape, version=1)


Layers = list[tuple[AnyQuantized, Projection]]


def _trace(
    reference: nn.Module, input_shape: tuple[int, ...], largest_input: float | None
) -> tuple[onnx.ModelProto, Layers, list[Rescaling]]:
    # the graph with its marks, the layer and quantizer that each Project stands for, and what each Rescale stands for;
    # without a largest input the operands are the levels themselves, and nothing is rescaled
    plain = copy.deepcopy(reference)
    layers: Layers = []
    rescalings: list[Rescaling] = []
    for original, module in zip(list(reference.modules()), list(plain.modules()), strict=True):
        if not isinstance(original, AnyQuantized):
            continue
        relu, projection, index, operands = original.relu, Projection.of(original), None, None
        if projection is not None:
            index = len(layers)
            if largest_input is not None:
                operands = _exact_operands(original, projection)
            layers.append((original, replace(projection, as_integers=operands is not None)))
        elif largest_input is not None and original.spec.weight_scale == "max" and isinstance(original, nn.Conv2d):
            operands = _split_operands(original, largest_input)
        fold_weight(module, _PlainConv2d if isinstance(module, nn.Conv2d) else _PlainLinear)
        marks: dict[str, Any] = {"projection_index": index, "rescaling_index": None, "relu": relu, "steps": None}
        if operands is not None:
            marks["rescaling_index"], marks["steps"] = len(rescalings), operands.steps
            rescalings.append(operands.rescaling)
            module.weight = nn.Parameter(operands.weight)
        for name, value in marks.items():
            setattr(module, name, value)
    batch: Any = torch.export.Dim.DYNAMIC
    with warnings.catch_warnings():
        for category in (DeprecationWarning, FutureWarning, UserWarning):
            warnings.simplefilter("ignore", category)  # of PyTorch and onnxscript about themselves
        try:
            program = torch.onnx.export(
                plain,
                (torch.zeros(2, *input_shape),),
                dynamo=True,
                dynamic_shapes=({0: batch},),
                opset_version=OPSET,
                input_names=["input"],
                output_names=["output"],
                verbose=False,
            )
        except Exception as error:
            raise ValueError(f"{type(reference).__name__}: PyTorch cannot export it: {_gist(error)}") from error
    assert program is not None
    return program.model_proto, layers, rescalings


def _gist(error: BaseException) -> str:
    while error.__cause__ is not None:
        error = error.__cause__
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0] if lines else type(error).__name__


class _Operands(NamedTuple):
    # a weight's numerators, what makes the output of the sums, and into how many steps a 1 of a float input is split
    weight: Tensor
    rescaling: Rescaling
    steps: float | None = None


def _exact_operands(layer: AnyQuantized, projection: Projection) -> _Operands | None:
    # where float32 holds every sum of products of the numerators exactly
    integers = _integers(layer)
    if integers is None:
        return None
    largest = integers.numerators.abs().flatten(1).sum(1).double() * projection.levels.denominator
    if largest.max() > EXACT_FLOAT:
        return None
    return _Operands(
        integers.numerators.float(),
        _rescaling(layer, integers.unit(1) * projection.alpha / projection.levels.denominator, largest),
    )


def _split_operands(layer: AnyQuantized, largest_input: float) -> _Operands | None:
    # the input in whole numbers of steps, and what is between them
    integers = _integers(layer)
    if integers is None:
        return None
    largest = integers.numerators.abs().flatten(1).sum(1).double()
    steps = 2.0 ** math.floor(math.log2(SPLIT_SUMS / max(largest_input * float(largest.max()), 1)))
    rescaling = _rescaling(layer, integers.unit(1) / steps, largest * largest_input * steps)
    return _Operands(integers.numerators.float(), rescaling, steps)


def _rescaling(layer: nn.Conv2d | nn.Linear, factor: Tensor, largest: Tensor) -> Rescaling:
    bias = torch.zeros(len(largest)) if layer.bias is None else layer.bias.detach()
    inner = layer.weight.dim() - 2
    return Rescaling(factor.expand(len(largest)).numpy(), bias.double().numpy(), largest.numpy(), inner)


def _integers(layer: AnyQuantized) -> Integers | None:
    try:
        return integer_weight(layer)
    except ValueError:  # levels too far apart for integers
        return None


def _measure_ranges(file: onnx.ModelProto, graph: onnx.ModelProto, x: Tensor) -> dict[str, tuple[float, float]]:
    # the range of every float feature map (N, C, H, W) of the float network that 256 steps represent best
    import onnx
    from onnx import helper

    hidden = {name for node in graph.graph.node if mark_index(node, PROJECT) is not None for name in node.output}
    made = {name for node in graph.graph.node for name in node.output} - hidden
    names = []
    for value in (*graph.graph.value_info, *graph.graph.output):
        tensor = value.type.tensor_type
        if value.name in made and tensor.elem_type == onnx.TensorProto.FLOAT and len(tensor.shape.dim) == 4:
            names.append(value.name)
    if not names:
        return {}
    probe = onnx.ModelProto()
    probe.CopyFrom(file)
    probe.graph.ClearField("output")
    probe.graph.output.extend(helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, None) for name in names)
    session = open_session(probe.SerializeToString())
    samples: dict[str, list[np.ndarray]] = {name: [] for name in names}
    # the maps of one image alone may take a gigabyte
    for part in parts_bar(x[:_CALIBRATION_IMAGES].split(1), "ranges of sums"):
        maps = session.run(None, {session.get_inputs()[0].name: part.numpy()})
        for name, values in zip(names, maps, strict=True):
            flat = values.ravel()
            # every so many, by a number prime to sizes of maps; and the extremes
            samples[name] += [flat[:: 1 + 2 * (flat.size // 4096 // 2)], np.array([flat.min(), flat.max()])]
    return {name: best_range(np.concatenate(parts)) for name, parts in samples.items()}
