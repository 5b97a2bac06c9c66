from __future__ import annotations

import csv
import io
import json
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
from torch import nn

from apot_fat import load_weights
from apot_fat.models import create_model
from apot_fat.quant import EIGHT_BIT, QuantConv2d, QuantLinear, preset
from apot_fat.reporting import cost_report


def test_a_layer_by_hand() -> None:
    spec = preset("uniform-mobilenet", weight_bits=4, act_bits=3, weight_norm="none", weight_alpha=7.0)
    layer = QuantConv2d(2, 3, (1, 2), stride=2, groups=1, bias=True, spec=spec)
    with torch.no_grad():  # powers of two: 0 1 1 (2 + 1) 2 (4) 1 (4 + 1) 2 (4 + 2) 2 (8 − 1) 2, and so below 0
        layer.weight.copy_(torch.tensor([0, 1, 2, 3, 4, 5, 6, 7, -7, -1, -3, 9]).view(3, 2, 1, 2))
    report = cost_report(layer, (2, 2, 6, 8))
    row, others = report.rows
    assert asdict(row) == {
        "name": "QuantConv2d",
        "kind": "QuantConv2d",
        "weight_bits": 4,
        "act_bits": 3,
        "parameters": 12 + 3 + 2,
        "float32_bytes": 60,
        "packed_bytes": 6 + 12 + 8,
        "macs": 12 * 2 * 3 * 4,
        "bit_operations": 12 * 2 * 3 * 4 * 12,
        "shift_adds": (1 + 1 + 2 + 1 + 2 + 2 + 2 + 2 + 1 + 2 + 2) * 2 * 3 * 4,
        "float_macs": 0,
    }
    assert (others.parameters, others.packed_bytes, others.macs) == (0, 0, 0)
    assert report.input_shape == (2, 2, 6, 8)
    assert report.total.float_share == 0


def test_packing_rounds_up_to_the_byte() -> None:
    layer = QuantLinear(3, 3, bias=False, bit=3)
    assert cost_report(nn.Sequential(nn.Flatten(), layer), (1, 1, 3)).rows[0].packed_bytes == 4 + 8  # 27 bits


def test_float_layers_and_halves() -> None:
    model = nn.Sequential(
        QuantConv2d(3, 4, 3, padding=1, bias=True, spec=EIGHT_BIT),
        nn.BatchNorm2d(4),
        nn.Conv2d(4, 4, 3, groups=2, bias=False),
        QuantConv2d(4, 2, 1, spec=preset("apot-cifar", bits=4, act_bits=32)),
        nn.Flatten(),
        QuantLinear(8, 5, spec=EIGHT_BIT),
    )
    nn.init.constant_(model.get_parameter("5.weight"), -1)
    first, grouped, half, last, others = (report := cost_report(model, (3, 4, 4))).rows
    assert (first.weight_bits, first.act_bits, first.parameters, first.packed_bytes) == (8, 32, 112, 108 + 4 + 16)
    assert (first.macs, first.bit_operations, first.shift_adds, first.float_share) == (1728, 1728 * 256, 0, 1)
    assert (grouped.macs, grouped.packed_bytes, grouped.float32_bytes) == (72 * 4, 288, 288)
    assert (half.weight_bits, half.act_bits, half.parameters, half.packed_bytes) == (4, 32, 9, 4 + 4)
    assert (last.weight_bits, last.packed_bytes) == (32, 4 * 45)  # no positive weight: left in float
    assert (others.parameters, others.packed_bytes) == (8, 64)  # weight and bias; mean and variance
    assert report.total.float_share == 1
    assert report.total.parameters == sum(p.numel() for p in model.parameters())


def test_shared_layers_and_parameters_count_once_and_each_call_runs() -> None:
    shared = QuantLinear(4, 4, bias=False, bit=4)
    tied = nn.Linear(4, 4, bias=False)
    tied.weight = shared.weight
    report = cost_report(nn.Sequential(shared, shared, tied), (1, 3, 4))
    first, second, _ = report.rows
    assert (first.name, first.parameters, first.macs) == ("0", 18, 2 * 16 * 3)
    assert (second.name, second.parameters, second.float32_bytes, second.macs) == ("2", 0, 0, 16 * 3)


def test_powers_of_two_take_one_shift() -> None:
    for bits in (3, 8):  # at 8 the levels reach below every integer of 64 bits
        layer = QuantLinear(50, 2, spec=preset("apot-imagenet-pot", bits=bits))
        nonzero = int(layer.quantized_weight().count_nonzero())
        assert cost_report(layer, (1, 1, 50)).total.shift_adds == nonzero


def test_resnet20() -> None:
    model = create_model("resnet20", "apot-cifar", bits=3)
    report = cost_report(model, (3, 32, 32))
    assert len(report.rows) == 23
    total = report.total
    # first 3·9·16, 16 → 16 six times, 16 → 32 and 32 → 32 five times, 32 → 64 and 64 → 64 five times, shortcuts, last
    weights = 9 * (6 * 16**2 + 16 * 32 + 5 * 32**2 + 32 * 64 + 5 * 64**2) + 16 * 32 + 32 * 64
    inner = 9 * (6 * 16**2 * 1024 + (16 * 32 + 5 * 32**2) * 256 + (32 * 64 + 5 * 64**2) * 64)
    inner += 16 * 32 * 256 + 32 * 64 * 64
    assert total.macs == 27 * 16 * 1024 + inner + 640 == 40_813_184
    assert total.float_macs == 27 * 16 * 1024 + 640
    assert total.bit_operations == inner * 9 + total.float_macs * 256
    assert total.parameters == 272_514
    # codes, two thresholds a layer, 8-bit weights with a scale, biases, batch norm
    assert total.packed_bytes == weights * 3 // 8 + 20 * 8 + 432 + 4 + 640 + 4 + 40 + 16 * 784
    assert total.float32_bytes == 4 * (weights + 432 + 650) + 16 * 784
    assert 0 < total.shift_adds < inner  # one term a weight, none for 0
    assert cost_report(model, (4, 3, 32, 32)).total.macs == 4 * total.macs
    assert cost_report(create_model("resnet20", bits=32), (3, 32, 32)).total.float32_bytes == total.float32_bytes
    assert model.training
    fat = cost_report(create_model("resnet20", "fat-cifar", bits=3), (3, 32, 32)).total
    assert (fat.macs, fat.packed_bytes) == (total.macs, total.packed_bytes)
    assert fat.parameters > total.parameters


def test_released_network(reference: Path) -> None:
    for bits, packed, shift_adds in ((3, 115_008, 32_199_616), (4, 148_736, 48_686_208)):
        path = reference / f"reference/released/res20_{bits}bit/model_best.pth.tar"
        total = cost_report(load_weights(create_model("resnet20", bits=bits), path), (3, 32, 32)).total
        assert (total.packed_bytes, total.shift_adds) == (packed, shift_adds)


def test_texts() -> None:
    report = cost_report(create_model("resnet20", bits=3), (3, 32, 32))
    lines = report.table().splitlines()
    assert len(lines) == 2 + 23 + 1
    assert "40,813,184" in lines[-1]
    assert lines[-1].endswith("1.09")
    rows = list(csv.DictReader(io.StringIO(report.to_csv())))
    assert [row["name"] for row in rows[-2:]] == ["(others)", "total"]
    assert rows[-1]["weight_bits"] == ""
    assert int(rows[-1]["macs"]) == 40_813_184
    content = json.loads(report.to_json())
    assert content["input_shape"] == [1, 3, 32, 32]
    assert [layer["name"] for layer in content["layers"]] == [row.name for row in report.rows]
    assert content["total"]["macs"] == 40_813_184


@pytest.mark.parametrize("shape", [(), (32, 32), (3, 0, 32), (1, 1, 3, 32, 32), (3, 32.0, 32)])
def test_shapes_that_are_none(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"give \(C, H, W\) or \(N, C, H, W\)"):
        cost_report(nn.Identity(), shape)


def test_shapes_the_network_refuses() -> None:
    with pytest.raises(ValueError, match=r"input_shape \(1, 1, 32, 32\): CifarResNet refuses it \(.*channels"):
        cost_report(create_model("resnet20", bits=3), (1, 32, 32))


def test_a_network_of_tokens_is_given_some() -> None:
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(8, 2, dim_feedforward=12, batch_first=True)
    net = nn.Sequential(nn.Embedding(20, 8), layer, nn.Flatten(), nn.Linear(5 * 8, 3)).eval()
    report = cost_report(net, torch.zeros(2, 5, dtype=torch.int64))
    assert report.input_shape == (2, 5)
    macs = {row.name: row.macs for row in report.rows}
    assert macs["1.linear1"] == macs["1.linear2"] == 2 * 5 * 8 * 12
    assert macs["3"] == 2 * 5 * 8 * 3
    with pytest.raises(ValueError, match=r"input_shape \(2, 4\): Sequential refuses it"):
        cost_report(net, torch.zeros(2, 4, dtype=torch.int64))
