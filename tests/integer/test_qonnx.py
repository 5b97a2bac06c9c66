from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import onnx
import pytest
import torch
from onnx import numpy_helper
from torch import nn

from apot_fat import integer_program
from apot_fat.data.normalization import CIFAR_APOT
from apot_fat.integer import IntegerProgram
from apot_fat.integer.program import Convolution, Thresholds, width
from apot_fat.integer.qonnx import clean_qonnx, qonnx_model, run_qonnx
from apot_fat.quant import EIGHT_BIT, QuantConv2d, QuantLinear
from tests.integer.networks import NORMALIZATION, normalized, random_pixels, with_statistics
from tests.integer.test_c import network

if TYPE_CHECKING:
    from tests.export.conftest import Released

pytest.importorskip("onnx", reason="not installed: pip install apot-fat[qonnx]")


def needs_qonnx() -> None:
    pytest.importorskip("qonnx", reason="qonnx is not installed: pip install apot-fat[qonnx]")


def program_of(name: str, **options: Any) -> tuple[IntegerProgram, np.ndarray]:
    model, size = network(name)
    pixels = random_pixels(3, size)
    model = with_statistics(model, normalized(pixels))
    return integer_program(model, normalized(pixels), **NORMALIZATION, **options), pixels


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("name", ["signed", "powers of two", "two's complement", "below zero", "residual"])
@pytest.mark.parametrize("accumulator_bits", [24, 31])
def test_qonnx_executes_to_the_program_s_logits(name: str, accumulator_bits: int, channels_last: bool) -> None:
    needs_qonnx()
    program, pixels = program_of(name, accumulator_bits=accumulator_bits)
    model = qonnx_model(program, channels_last)
    given = pixels.transpose(0, 2, 3, 1) if channels_last else pixels
    wanted = program.run(pixels)
    assert np.array_equal(run_qonnx(model, given), wanted)
    assert np.array_equal(run_qonnx(clean_qonnx(model), given), wanted)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["resnet", "mobilenet", "sizes stay"])
def test_every_family_in_qonnx(name: str) -> None:
    needs_qonnx()
    program, pixels = program_of(name)
    assert np.array_equal(run_qonnx(clean_qonnx(qonnx_model(program)), pixels), program.run(pixels))


def test_qonnx_s_own_change_of_layout_keeps_the_logits_of_a_chain_of_layers() -> None:
    needs_qonnx()
    from qonnx.core.modelwrapper import ModelWrapper
    from qonnx.transformation.channels_last import ConvertToChannelsLastAndClean

    program, pixels = program_of("sizes stay")
    model = ModelWrapper(clean_qonnx(qonnx_model(program)))
    model = model.transform(ConvertToChannelsLastAndClean())
    assert np.array_equal(run_qonnx(model.model, pixels), program.run(pixels))


def test_levels_are_counts_of_thresholds_and_weights_integers_of_their_bits() -> None:
    program, _ = program_of("residual")
    model = qonnx_model(program)
    onnx.checker.check_model(model, full_check=True)
    constants = {constant.name: numpy_helper.to_array(constant) for constant in model.graph.initializer}
    kinds = {
        noted.tensor_name: noted.quant_parameter_tensor_names[0].value for noted in model.graph.quantization_annotation
    }
    thresholds = [operation for operation in program.operations if isinstance(operation, Thresholds)]
    nodes = [node for node in model.graph.node if node.op_type == "MultiThreshold"]
    for operation, node in zip(thresholds, nodes, strict=True):
        assert operation.levels[-1] == 48  # 4-bit APoT
        rows = constants[node.input[1]]
        assert rows.shape[1] == 48
        assert np.array_equal(rows, operation.repeated_CT)
        assert {attribute.name: attribute.s for attribute in node.attribute}["out_dtype"] == b"UINT6"
    for name in (node.input[1] for node in model.graph.node if node.op_type in ("Conv", "MatMul")):
        weight = constants[name]
        assert np.array_equal(weight, np.round(weight))
        low, high = int(weight.min()), int(weight.max())
        assert kinds[name] == (f"INT{width(low, high)}" if low < 0 else "BINARY")  # ones of a sum
    assert kinds["pixels"] == "UINT8"


def test_float32_carries_all_results_of_a_program_of_24_bits() -> None:
    model = qonnx_model(program_of("residual", accumulator_bits=24)[0])
    wide = [info.name for info in model.graph.value_info if info.type.tensor_type.elem_type != onnx.TensorProto.FLOAT]
    made = [node.op_type for node in model.graph.node if node.output[0] in wide]
    assert set(made) == {"Cast", "Mul", "Add", "Mod", "Sub", "Div", "Clip"}  # of changes of grid, and a table's places
    model = qonnx_model(program_of("residual")[0])
    assert model.graph.output[0].type.tensor_type.elem_type == onnx.TensorProto.INT64


def test_maxima_that_float32_does_not_hold_are_refused() -> None:
    pixels = random_pixels(2, 8)
    layers = nn.Sequential(QuantConv2d(3, 4, 3, spec=EIGHT_BIT), nn.BatchNorm2d(4), nn.MaxPool2d(2), nn.Flatten())
    model = nn.Sequential(layers, QuantLinear(36, 2, spec=EIGHT_BIT)).eval()
    program = integer_program(model, normalized(pixels), **NORMALIZATION, grid_bits=26)
    with pytest.raises(ValueError, match=r"layer \S+: maxima beyond 2\^24: give at most 24 grid_bits"):
        qonnx_model(program)


def test_fewer_bits_of_accumulators_are_kept_to() -> None:
    program, pixels = program_of("residual", accumulator_bits=20, grid_bits=16)
    sums = [operation for operation in program.operations if isinstance(operation, Convolution)]
    assert max(operation.largest_sum for operation in sums) < 1 << 20
    program.run(pixels)
    with pytest.raises(ValueError, match="accumulator_bits 12: choose 16 to 31"):
        program_of("residual", accumulator_bits=12)


@pytest.mark.slow
@pytest.mark.parametrize(("bits", "least"), [(3, 945), (4, 939)])
def test_the_released_networks_in_qonnx(released: Released, bits: int, least: int) -> None:
    needs_qonnx()
    model, images, labels = released(bits)
    mean, std = CIFAR_APOT
    program = integer_program(model, images[:100], mean=mean, std=std)
    pixels = ((images * torch.tensor(std)[:, None, None] + torch.tensor(mean)[:, None, None]) * 255).round().byte()
    wanted = program.run(pixels.numpy())
    executed = 40
    logits = run_qonnx(clean_qonnx(qonnx_model(program)), pixels[:executed].numpy())
    assert np.array_equal(logits, wanted[:executed])
    correct = int((wanted.argmax(1) == labels.numpy()).sum())
    print(f"\n{bits} bits: {correct} of {len(labels)}; all logits of {executed} images in QONNX")
    assert correct >= least
